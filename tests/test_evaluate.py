"""Which data grn.evaluate scores with."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from grn import evaluate
from grn.cli import CONF
from grn.errors import UserError

PIPE = "pipe:aws s3 cp s3://b/{0..3}.tar -"


def data(trained, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("evaluate", ["ckpt=x.ckpt", *overrides])
    return evaluate._data(config, OmegaConf.create({"data": trained}))


def test_commands_of_a_checkpoint_are_not_run_unless_given_again(monkeypatch):
    one = {"_target_": "grn.data.images.ImageShardsDataModule", "train": PIPE, "heldout": [PIPE], "root": None}
    with pytest.raises(UserError, match=r"^ckpt=x\.ckpt has shards read by a command") as told:
        data(one)
    assert "give data.train=... data.heldout=... here, or, if you trust the file, set GRN_TRUST=pipe" in str(told.value)
    with pytest.raises(UserError, match=r"give data\.train=\.\.\. here"):
        data(one, "data.heldout=b.tar")
    given = data(one, f"data.heldout='{PIPE}'", "data.train=[a.tar]", "data.num_workers=3")
    assert (given.heldout, given.train, given.num_workers, given.root) == (PIPE, ["a.tar"], 3, None)
    monkeypatch.setenv("GRN_TRUST", "pipe")
    assert data(one) == one


def test_those_of_a_mixture(monkeypatch):
    parts = {
        "images": {"_target_": "grn.data.text_images.TextImageDataModule", "train": None, "heldout": "http://h/a.tar"},
        "train": {"_target_": "grn.data.text_images.TextImageDataModule", "train": "a.tar", "heldout": PIPE},
    }
    mixture = {"_target_": "grn.data.mixed_packs.MixedPacksDataModule", "parts": parts}
    with pytest.raises(
        UserError, match=r"give \+data\.parts\.images\.heldout=.* \+data\.parts\.train\.heldout=\.\.\. "
    ):
        data(mixture)
    given = data(mixture, f"+data.parts.train.heldout='{PIPE}'", "data.num_workers=1").parts
    assert given.train == parts["train"] | {"num_workers": 1}
    assert given.images == parts["images"] | {"num_workers": 1}
    with pytest.raises(UserError, match=r"^data\.parts\.clips: the checkpoint's data have only images, train$"):
        data(mixture, "+data.parts.clips.root=x")
    with pytest.raises(UserError, match=r"^data\.root: of a mixture, give \+data\.parts\.<name>\.root"):
        data(mixture, "data.root=x")


def test_places_of_a_checkpoint_that_are_none():
    hostile = {"_target_": "x.Strings", "first": PIPE}
    for odd in (hostile, [[PIPE]]):
        with pytest.raises(UserError, match=r"^ckpt=x\.ckpt: no shards can be at"):
            data({"_target_": "grn.data.images.ImageShardsDataModule", "train": None, "heldout": odd})
