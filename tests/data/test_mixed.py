"""Mixing data sets: whose turn it is, and going on where a run broke off."""

from collections import Counter
from itertools import islice

import pytest
import torch

from grn.data.images import ImageShardsDataModule
from grn.data.mixed import MixedDataModule
from grn.data.stream import streaming
from grn.runtime.errors import UserError
from grn.toys.digits import DigitsSource


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    DigitsSource().write(root)
    return root


def mixture(root, *, weights=None, seed=0, workers=0):
    def part(name, batch_size):
        return ImageShardsDataModule(
            name="digits",
            root=root,
            image_size=32,
            num_labels=10,
            batch_size=batch_size,
            num_workers=workers,
            key=f"data.parts.{name}",
        )

    parts = {"small": part("small", 4), "large": part("large", 10)}
    return MixedDataModule(name="mixture", parts=parts, weights=weights or {"small": 3, "large": 1}, seed=seed)


def taken(loader, count):
    return [tuple(batch["key"]) for batch in islice(iter(loader), count)]


def test_batches_are_whole_and_drawn_in_proportion(root):
    loader = mixture(root).train_dataloader()
    sizes = Counter(map(len, taken(loader, 60)))
    assert sizes.keys() == {4, 10}
    assert 30 <= sizes[4] <= 55
    turns = Counter(loader.draw(number) for number in range(4000))
    assert turns["small"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_the_draw_depends_on_the_seed_alone(root):
    first, second, other = (mixture(root, seed=seed).train_dataloader() for seed in (0, 0, 1))
    assert taken(first, 20) == taken(second, 20) != taken(other, 20)


@pytest.mark.parametrize("workers", [0, 1])
def test_it_goes_on_where_it_broke_off(root, workers):
    whole = taken(mixture(root, workers=workers).train_dataloader(), 30)
    loader = mixture(root, workers=workers).train_dataloader()
    first = taken(loader, 13)
    again = mixture(root, workers=workers).train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert first + taken(again, 17) == whole


def test_a_part_of_no_weight_is_validated_alone(root):
    data = mixture(root, weights={"small": 0, "large": 1})
    loader = data.train_dataloader()
    assert set(map(len, taken(loader, 10))) == {10}
    assert [len(next(iter(part))["key"]) for part in data.val_dataloader()] == [4, 10]
    assert data.skipped() == {}
    with pytest.raises(UserError, match=r"is of large, this run has small, large: .*data\.parts"):
        mixture(root).train_dataloader().load_state_dict(loader.state_dict())


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_split_goes_through_the_parts_that_are_drawn_one_after_the_other(root, monkeypatch, ranks):
    small, large = (
        [key for batch in mixture(root).parts[name].split_dataloader("val") for key in batch["key"]]
        for name in ("small", "large")
    )
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(streaming, "rank_and_world_size", lambda rank=rank: (rank, ranks))
        loader = mixture(root).split_dataloader("val", share=ranks > 1)
        shares.append([key for batch in loader for key in batch["key"]])
    if ranks == 1:
        assert shares == [small + large]
    assert all(shares)
    assert Counter(key for share in shares for key in share) == Counter(small + large)
    data = mixture(root, weights={"small": 0, "large": 1})
    assert [key for batch in data.split_dataloader("val") for key in batch["key"]] == large


def test_a_part_of_no_weight_needs_no_training_shards(root, tmp_path):
    (tmp_path / "some").mkdir()
    for shard in root.glob("val-*.tar"):
        (tmp_path / "some" / shard.name).write_bytes(shard.read_bytes())
    data = mixture(root, weights={"small": 0, "large": 1})
    data.parts["small"].root = tmp_path / "some"
    data.setup("fit")
    data.weights["small"] = 1
    with pytest.raises(UserError, match=r"data\.parts\.small\.train: no shards"):
        data.setup("fit")


@pytest.mark.parametrize("weights", [{"small": 1}, {"small": 0, "large": 0}, {"small": -1, "large": 2}])
def test_weights_that_do_not_fit(root, weights):
    with pytest.raises(UserError, match=r"data\.weights"):
        mixture(root, weights=weights)


def test_the_length_is_the_trainers(root):
    data = mixture(root)
    with pytest.raises(TypeError):
        len(data.train_dataloader())
    data.trainer = type("Trainer", (), {"max_steps": 7, "accumulate_grad_batches": 2, "overfit_batches": 0.0})()
    assert len(data.train_dataloader()) == 14
    data.trainer.max_steps = -1
    with pytest.raises(UserError, match=r"^trainer\.max_steps must be given: a mixture of data has no epochs"):
        data.train_dataloader()
    assert torch.utils.data.get_worker_info() is None


def test_a_mixture_repeats_its_first_batches(root):
    keys = [batch["key"] for batch in islice(mixture(root).train_dataloader(), 2)]
    data = mixture(root)
    data.trainer = type("Trainer", (), {"max_steps": 7, "accumulate_grad_batches": 1, "overfit_batches": 2})()
    loader = data.train_dataloader()
    assert [batch["key"] for batch in islice(loader, 5)] == [*keys, *keys, keys[0]]
    state, other = loader.state_dict(), data.train_dataloader()
    other.load_state_dict(state)
    assert [batch["key"] for batch in islice(other, 2)] == keys[::-1]
    data.trainer.overfit_batches = 0.5
    with pytest.raises(UserError, match=r"trainer\.overfit_batches=0\.5: give a whole number"):
        data.train_dataloader()
