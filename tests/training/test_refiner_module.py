from types import SimpleNamespace

import pytest
import torch

from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.networks.class_refiner import ClassRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError
from grn.sampling.bundle import RefinerBundle
from grn.sampling.request import Request
from grn.training import RefinerModule


def build(labeling="ind", *, training=None, **changes):
    torch.manual_seed(0)
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 2), blocks_per_stage=1, temporal=(False,)
    )
    sizes = {"channels": 3, "classes": 4} if labeling == "ind" else {"channels": 6, "classes": 2}
    network = ClassRefiner(
        **sizes | changes, num_labels=5, size=4, depth=2, width=16, heads=2, bottleneck=8, context_start=1,
        context_tokens=2,
    )  # fmt: skip
    return RefinerModule(RefinerBundle(network, tokenizer, Sampler(Linear(4)), labeling=labeling), **training or {})


def pixels():
    return torch.randint(256, (4, 3, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("labeling", ["ind", "bit"])
def test_tokens_of_both_labelings_carry_the_same_image(labeling):
    module = build(labeling)
    tokens = module.tokenize({"pixels": pixels()})
    assert tokens.shape == (4, *module.bundle.token_shape)
    assert tokens.max() < module.network.classes
    reconstructed = module.tokenizer(pixels().float() / 127.5 - 1)[0]
    expected = ((reconstructed.clamp(-1, 1) + 1) * 127.5).round()
    assert (module.bundle.decode(tokens).float() - expected).abs().max() <= 1


def test_the_tokenizer_stays_frozen_and_in_evaluation_mode():
    module = build().train()
    assert module.network.training
    assert not module.tokenizer.training
    assert not any(p.requires_grad for p in module.tokenizer.parameters())


@pytest.mark.parametrize("labeling", ["ind", "bit"])
def test_generation_is_a_function_of_seed_and_id(labeling):
    module = build(labeling).eval()
    request = Request(labels=(0, 1, 2, 3), seed=5)
    whole = module.bundle.generate(request).tokens
    ((_, part),) = module.bundle.generate_queue(request, ids=torch.tensor([2, 3]), batch_size=2)
    assert torch.equal(part.tokens, whole[2:])
    assert module.bundle.decode(whole).shape == (4, 3, 1, 16, 16)


def test_misfit_with_the_tokenizer_names_the_keys():
    with pytest.raises(UserError, match=r"model\.channels=4 .* needs model\.channels=3 model\.classes=4"):
        build(channels=4)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_position_of_a_step_is_drawn_for_once(ranks):
    """And rank after rank has those of its samples (`grn.data.stream.endless`)."""
    module = build()
    for batch_idx in range(3, 6):
        of_ranks = []
        for rank in range(ranks):
            module._trainer = SimpleNamespace(world_size=ranks, global_rank=rank, accumulate_grad_batches=3)
            of_ranks.append(module._positions(batch_idx, 8 // ranks))
        first = (batch_idx - 3) * 8
        assert torch.stack(of_ranks, dim=1).flatten().tolist() == list(range(first, first + 8))


def test_checkpoint_leaves_the_tokenizer_out_and_puts_it_back():
    module = build()
    module.checkpoint_extras = {"config": {"a": 1}}
    checkpoint = {"state_dict": module.state_dict(), "optimizer_states": [{}], "lr_schedulers": [{}]}
    whole = set(checkpoint["state_dict"])
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["config"] == {"a": 1}
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"network"}
    module.on_load_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == whole


def test_the_network_is_told_the_realized_share_where_asked_for():
    tokens, draws = torch.randint(4, (4, 3, 1, 4, 4)), {"seed": 1, "ids": torch.arange(4), "step": 2}
    told = {}
    for kind in ("nominal", "realized"):
        module = build(training={"signal_ratio_input": kind})
        module.network.register_forward_hook(lambda _, inputs, made, kind=kind: told.update({kind: inputs}))
        t, _ = module.predict_corrupted(tokens, torch.zeros(4, dtype=torch.long), **draws)
        assert torch.equal(t, told[kind][1])
    nominal, realized = told["nominal"][1], told["realized"][1]
    assert torch.equal(told["nominal"][0], told["realized"][0])  # the same corruption
    torch.testing.assert_close(realized * 48, (realized * 48).round())  # whole tokens of 3 * 4 * 4
    assert 0 < (realized - nominal).abs().max() < 0.3


def test_signal_ratios_are_shifted_in_training():
    draws = {"seed": 1, "ids": torch.arange(50), "step": 2}
    plain, shifted = (
        build(training={"signal_ratio_shift": alpha}).draw_signal_ratio(*draws.values()) for alpha in (1, 4.0)
    )
    torch.testing.assert_close(shifted, 1 - 4 * (1 - plain) / (1 + 3 * (1 - plain)))


@pytest.mark.parametrize(
    ("training", "complaint"),
    [
        ({"signal_ratio_shift": 0}, r"^training\.signal_ratio_shift=0 must be a positive number"),
        ({"signal_ratio_shift": "a"}, r"^training\.signal_ratio_shift=a must be a positive number"),
        ({"signal_ratio_shift": float("nan")}, r"^training\.signal_ratio_shift=nan must be a positive number"),
        ({"signal_ratio_input": "t"}, r"^training\.signal_ratio_input=t: choose among nominal, realized"),
    ],
)
def test_settings_of_the_signal_ratio_name_their_keys(training, complaint):
    with pytest.raises(UserError, match=complaint):
        build(training=training)
