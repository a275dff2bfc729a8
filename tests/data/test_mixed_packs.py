"""Images and clips of several data sets in one pack: by weight, each in its own order, going on exactly."""

import json
from collections import Counter

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from test_text_videos import clip, make, png, write

from grn.data.mixed_packs import MixedPacksDataModule
from grn.evaluation.scoring import build_scores, real_splits
from grn.metrics.fvd import clip_batches
from grn.metrics.splits import image_batches
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    images, clips = {}, {}
    for number in range(12):
        images |= {f"image{number}.png": png((32 + number, 32)), f"image{number}.txt": b"an image"}
    for number in range(5):
        clips |= {f"clip{number}.mp4": clip(9 + number), f"clip{number}.txt": b"a clip"}
    clips |= {"torn.mp4": b"no video", "torn.txt": b"torn"}
    return {"images": write(root / "images.tar", images), "clips": write(root / "clips.tar", clips)}


def mixture(shards, weights=None, **clips):
    weights = weights or {"images": 3.0, "clips": 1.0}
    parts = {"images": make(shards["images"]), "clips": make(shards["clips"], **clips)}
    return MixedPacksDataModule(name="mixture", parts=parts, weights=weights, seed=1)


def batches(loader, number):
    return [batch for _, batch in zip(range(number), loader)]


def test_packs_hold_both_by_weight(shards):
    data = mixture(shards)
    data.setup("fit")
    found = batches(data.train_dataloader(), 30)
    kinds = [Counter("clip" if pixels.shape[1] > 1 else "image" for pixels in batch["pixels"]) for batch in found]
    total = sum(kinds, Counter())
    # A sixth of the clips is torn: 3 images to 5/6 of a clip.
    assert 0.14 < total["clip"] / total.total() < 0.30
    assert sum(kind["clip"] > 0 < kind["image"] for kind in kinds) > 15
    assert all(batch["tokens"] <= batch["max_tokens"] == 256 for batch in found)
    assert data.skipped() == {"video cannot be decoded": pytest.approx(5, abs=5)}
    images = [key for batch in found for key in batch["key"] if key.startswith("image")]
    counts = Counter(images)
    assert max(counts.values()) - min(counts.values()) <= 3  # pass after pass over its own shards


def test_scores_of_clips_and_of_images_read_what_is_like_them(shards):
    data = mixture(shards)

    class Score:
        def __init__(self, *, train, val, device, cache_dir):
            self.images = [len(batch) for batch in image_batches(train, name="training")]

    clips = real_splits(data, clips=True)
    found = list(clip_batches(clips["val"], 9, name="held-out"))
    assert sum(map(len, found)) == 5
    assert {tuple(batch.shape[1:]) for batch in found} == {(3, 9, 32, 48)}
    for of_clips, images in ((False, 12), (True, 4 * 9 + 13)):
        scores = build_scores({"x": Score}, real_splits(data, clips=of_clips), device=None, cache_dir=None)
        assert sum(scores["x"].images) == images
    with pytest.raises(UserError, match=r"^scores: samples are clips, and the held-out split has only images to comp"):
        list(real_splits(data.parts["images"], clips=True)["val"]())
    with pytest.raises(UserError, match=r"^scores: samples are images, and the training split has only clips to comp"):
        list(real_splits(data.parts["clips"], clips=False)["train"]())


def test_a_part_without_weight_is_not_drawn(shards):
    data = mixture(shards, {"images": 1.0, "clips": 0.0})
    data.setup("fit")
    keys = {key[:5] for batch in batches(data.train_dataloader(), 5) for key in batch["key"]}
    assert keys == {"image"}
    assert len(data.val_dataloader()) == 2


def test_it_goes_on_exactly(shards):
    whole = mixture(shards).train_dataloader()
    expected = batches(whole, 9)
    first = mixture(shards).train_dataloader()
    batches(first, 4)
    second = mixture(shards).train_dataloader()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for found, own in zip(batches(second, 5), expected[4:], strict=True):
        assert found["key"] == own["key"]
        assert all(map(torch.equal, found["pixels"], own["pixels"]))
    assert second.state_dict() == whole.state_dict()


def test_parts_that_differ_are_named(shards):
    with pytest.raises(UserError, match=r"data\.parts\.\*\.lookahead are {'images': 4, 'clips': 9}"):
        mixture(shards, lookahead=9).setup("fit")


def test_its_config_makes_it():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        made = compose("train", ["tokenizer.ckpt=x", "data=captioned_image_and_video", "data.max_tokens=900"])
    data = instantiate(made.data)
    assert isinstance(data, MixedPacksDataModule)
    assert {part.max_tokens for part in data.parts.values()} == {900}
    with pytest.raises(UserError, match=r"data\.flip: a mixture has no such key"):
        MixedPacksDataModule(name="x", parts=data.parts, weights=data.weights, flip=True)
