"""Which data grn.evaluate scores with, and what it has no use for."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from grn.evaluation import evaluate
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError

PIPE = "pipe:aws s3 cp s3://b/{0..3}.tar -"


def data(trained, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("evaluate", ["ckpt=x.ckpt", *overrides])
    return evaluate._data(config, OmegaConf.create({"data": trained}))


def test_commands_of_a_checkpoint_are_not_run_unless_given_again(monkeypatch):
    one = {"_target_": "grn.data.images.ImageShardsDataModule", "train": PIPE, "val": [PIPE], "root": None}
    with pytest.raises(UserError, match=r"^ckpt=x\.ckpt has shards read by a command") as told:
        data(one)
    assert "give data.train=... data.val=... here, or, if you trust the file, set GRN_TRUST=pipe" in str(told.value)
    with pytest.raises(UserError, match=r"give data\.train=\.\.\. here"):
        data(one, "data.val=b.tar")
    given = data(one, f"data.val='{PIPE}'", "data.train=[a.tar]", "data.num_workers=3")
    assert (given.val, given.train, given.num_workers, given.root) == (PIPE, ["a.tar"], 3, None)
    monkeypatch.setenv("GRN_TRUST", "pipe")
    assert data(one) == one


def test_those_of_a_mixture(monkeypatch):
    parts = {
        "images": {"_target_": "grn.data.text_images.TextImageDataModule", "train": None, "val": "http://h/a.tar"},
        "train": {"_target_": "grn.data.text_images.TextImageDataModule", "train": "a.tar", "val": PIPE},
    }
    mixture = {"_target_": "grn.data.mixed_packs.MixedPacksDataModule", "parts": parts}
    with pytest.raises(UserError, match=r"give \+data\.parts\.images\.val=.* \+data\.parts\.train\.val=\.\.\. "):
        data(mixture)
    given = data(mixture, f"+data.parts.train.val='{PIPE}'", "data.num_workers=1").parts
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
            data({"_target_": "grn.data.images.ImageShardsDataModule", "train": None, "val": odd})


FVD = {
    "_target_": "grn.metrics.fvd.FrechetVideoDistance",
    "_partial_": True,
    "network": {"_target_": "grn.metrics.video_networks.video_network", "_partial_": True, "path": "evil.pt"},
    "reference": "train",
}


def scores(trained, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("evaluate", ["ckpt=x.ckpt", *overrides])
    return evaluate._scores(config, None if trained is None else OmegaConf.create({"scores": trained}))


def test_files_of_scores_are_given_here():
    with pytest.raises(
        UserError, match=r"scores\.fvd\.network\.path names the file evil\.pt.*\+scores\.fvd\.network\.path"
    ):
        scores({"fvd": FVD})
    given = scores({"fvd": FVD}, "+scores.fvd.network.path=mine.pt", "+scores.fvd.frames=8")
    assert given == {"fvd": FVD | {"frames": 8, "network": FVD["network"] | {"path": "mine.pt"}}}
    judge = {"_target_": "grn.toys.judge.DigitsJudge", "_partial_": True}
    assert scores({"judge": judge}) == {"judge": judge}
    assert scores({"fvd": FVD}, "scores=none") == {}
    assert "judge" in scores({"fvd": FVD}, "scores=digits")


def test_what_a_checkpoint_says_of_scores_is_not_called():
    evil = FVD | {"network": {"_target_": "grn.runtime.files.write_text", "_partial_": True, "path": "x", "text": "y"}}
    for odd in ({"fvd": evil}, {"fvd": FVD | {"_partial_": False}}, {"x": {"_target_": "os.system", "command": "x"}}):
        with pytest.raises(UserError, match=r"^ckpt: x\.ckpt is not to be trusted: scores\."):
            scores(odd, "+scores.fvd.network.path=mine.pt") if "fvd" in odd else scores(odd)
    with pytest.raises(UserError, match=r"^scores\.fid: the checkpoint's scores are fvd"):
        scores({"fvd": FVD}, "+scores.fid.reference=x")


def test_data_of_a_checkpoint_are_of_the_listed_classes():
    for odd in (
        {"_target_": "grn.data.prepare.shard_encoder.ShardEncoder"},
        {"_target_": "grn.data.images.ImageShardsDataModule", "evil": 1},
    ):
        with pytest.raises(UserError, match=r"^ckpt: x\.ckpt is not to be trusted: data"):
            data(odd)


@pytest.mark.parametrize("given", ["num=0", "seed=2", "batch_size=1", "sampler=linear", "sampler.guidance=3"])
def test_a_tokenizer_draws_no_samples(monkeypatch, tmp_path, given):
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 2), blocks_per_stage=1, temporal=(False,)
    )
    monkeypatch.setattr(evaluate, "_load", lambda _: (tokenizer, None, {}))
    monkeypatch.setattr(evaluate, "_keys_given", lambda: ["ckpt", given.partition("=")[0]])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("evaluate", [f"ckpt={tmp_path}", "device=cpu", given])
    with pytest.raises(UserError, match=rf"^{given.partition('=')[0]} says how a refiner draws samples: leave it out"):
        evaluate.evaluate(config)
