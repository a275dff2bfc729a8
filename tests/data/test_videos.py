"""Clips in shards: their batches, and in turn with images."""

import pytest
import torch
import webdataset as wds

from grn.data.images import ImageShardsDataModule
from grn.data.mixed import MixedDataModule
from grn.data.videos import VideoShardsDataModule
from grn.runtime.errors import UserError
from grn.toys.digits import DigitsSource


@pytest.fixture(scope="module")
def root(tmp_path_factory, moving_digits):
    """Two training shards and a held-out one, as somebody else would write them; one video in each is broken."""
    root = tmp_path_factory.mktemp("data")
    files = sorted(moving_digits(root / "files", 9).glob("*.mp4"))
    for i, name in enumerate(("train-000000", "train-000001", "val-000000")):
        with wds.TarWriter(str(root / f"{name}.tar"), encoder=False) as tar:
            for path in files[3 * i : 3 * i + 3]:
                caption = path.with_suffix(".txt").read_bytes()
                tar.write({"__key__": path.stem, "mp4": path.read_bytes(), "txt": caption})
            tar.write({"__key__": f"broken{i}", "mp4": files[0].read_bytes()[:200], "txt": b"nothing"})
    return root


def clips(root, **arguments):
    return VideoShardsDataModule(
        **{"name": "video", "root": root, "image_size": 32, "frames": 5, "fps": [3, 6, 8], "batch_size": 2} | arguments
    )


def test_batches_are_clips(root):
    data = clips(root, num_workers=1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["pixels"].shape == (2, 3, 5, 32, 32)
    assert batch["pixels"].dtype == torch.uint8
    assert "moving right" in batch["caption"][0]
    movement = batch["pixels"].float().diff(dim=2).abs().mean(dim=(0, 1, 3, 4))
    assert (movement > 1).all()


def test_the_val_split_is_the_same_every_time(root):
    data = clips(root)
    first, second = ([batch["pixels"] for batch in data.split_dataloader("val")] for _ in range(2))
    assert [len(pixels) for pixels in first] == [2, 1]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert sum(data.skipped().values()) == 1


def test_training_draws_other_clips_in_every_pass(root):
    data = clips(root, batch_size=6)
    loader = iter(data.train_dataloader())
    first, second = (dict(zip(b["key"], b["pixels"])) for b in (next(loader), next(loader)))
    assert first.keys() == second.keys()
    assert sum(not torch.equal(first[key], second[key]) for key in first) >= 4


def test_images_and_clips_in_turn(root, tmp_path):
    DigitsSource(train_shards=2).write(tmp_path / "digits")
    images = ImageShardsDataModule(
        name="digits", root=tmp_path / "digits", image_size=32, num_labels=10, batch_size=8, num_workers=1
    )
    data = MixedDataModule(
        name="mixture", parts={"images": images, "clips": clips(root)}, weights={"images": 1, "clips": 1}
    )
    data.setup("fit")
    loader = iter(data.train_dataloader())
    shapes = {tuple(next(loader)["pixels"].shape) for _ in range(12)}
    assert shapes == {(8, 3, 1, 32, 32), (2, 3, 5, 32, 32)}


@pytest.mark.parametrize("arguments", [{"frames": 0}, {"fps": []}, {"fps": [8, -1]}, {"image_size": 0}])
def test_wrong_keys_are_named(root, arguments):
    with pytest.raises(UserError, match=rf"data\.{next(iter(arguments))}="):
        clips(root, **arguments)
