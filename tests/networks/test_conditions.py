import pytest
import torch
from refining import refine
from torch import nn

from grn.method.sampler import Sampler
from grn.method.schedules import EntropyGuided, Linear
from grn.networks.conditions import Text, text_condition
from grn.networks.text_encoder import ByteT5
from grn.networks.text_refiner import TextRefiner

SHAPE = (3, 1, 2, 4)


@pytest.fixture(params=["one_way", "full"])
def refiner(request):
    torch.manual_seed(0)
    network = TextRefiner(
        channels=3, classes=4, depth=2, width=48, heads=4, attention=request.param, mlp_ratio=5.0, text_width=16
    )
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return network.eval()


@pytest.fixture
def encoder():
    torch.manual_seed(1)
    return ByteT5(width=16, depth=1, heads=2, hidden=32, max_length=24).eval()


def logits(refiner, condition):
    tokens = torch.zeros(len(condition), *SHAPE, dtype=torch.long)
    with torch.no_grad():
        return refiner.predict(tokens, torch.full((len(condition),), 0.5), condition.cache, condition.index)


def test_rows_are_taken_joined_and_replaced(refiner, encoder):
    condition = text_condition(refiner, encoder, ["a three", "an eight", "a three"], negative=["", "blurred", ""])
    assert len(condition) == 3
    assert len(condition.cache) == 4  # each text once

    def alone(caption):
        return logits(refiner, text_condition(refiner, encoder, [caption]))[0]

    for given, captions in (
        (condition, ["a three", "an eight", "a three"]),
        (condition.select(torch.tensor([1])), ["an eight"]),
        (condition.null(), ["", "blurred", ""]),
        (
            condition.join(condition.select(torch.tensor([1, 2])).null()),
            ["a three", "an eight", "a three", "blurred", ""],
        ),
        (condition.null().select(torch.tensor([1])).null(), ["blurred"]),
    ):
        expected = torch.stack([alone(caption) for caption in captions])
        torch.testing.assert_close(logits(refiner, given), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(alone("a three"), alone("an eight"), atol=1e-2)


def test_texts_of_two_caches_do_not_join(refiner, encoder):
    first, second = (text_condition(refiner, encoder, ["a three"]) for _ in range(2))
    with pytest.raises(ValueError, match="must be of one cache"):
        first.join(second)
    with pytest.raises(ValueError, match="2 captions have 1 negative ones"):
        text_condition(refiner, encoder, ["a", "b"], negative=["c"])


@pytest.mark.parametrize(
    "schedule", [Linear(4), EntropyGuided(warmup=1, scale=40, offset=-35, min_steps=3, max_steps=7)]
)
def test_the_sampler_takes_texts(refiner, encoder, schedule):
    """A sample is a function of its id and text, whatever else stands in its batch, also as samples leave it."""
    sampler = Sampler(schedule, guidance=2.0, guidance_interval=(0.2, 0.9))
    captions = ["a three", "an eight left of a zero", "", "a seven"]

    def refined(condition, ids):
        return refine(
            lambda tokens, t, text: refiner.predict(tokens, t, text.cache, text.index),
            condition,
            sampler,
            shape=SHAPE,
            classes=4,
            seed=0,
            ids=torch.tensor(ids),
        ).tokens

    condition = text_condition(refiner, encoder, captions)
    assert isinstance(condition, Text)
    together = refined(condition, [0, 1, 2, 3])
    for row in range(4):
        assert torch.equal(refined(condition.select(torch.tensor([row])), [row])[0], together[row])
