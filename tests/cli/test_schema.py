"""Wrong keys and values of wrong types end in one line that names the key, before anything is built."""

import sys
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import grn.cli.entry  # noqa: F401  its resolvers
from grn.cli.schema import check_settings
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OF_DATA = {
    "image_folder_c2i": ["model.num_labels=10", "model.size=8"],
    "captions_t2i": ["data.resolutions=[[64,64]]", "training.size=[64,64]"],
}  # what only prepared data tell


@pytest.fixture(autouse=True)
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


def composed(*overrides):
    return compose("train", [*overrides, "paths.run=somewhere"])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_fits(experiment):
    check_settings(composed(f"+experiment={experiment}", *OF_DATA.get(experiment, ())))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.gradient_clip=abc", "training.gradient_clip=abc: it must be a valid number"),
        ("training.warmup_steps=true", "training.warmup_steps=True: it must be a valid integer"),
        ("training.label_dropout=[1]", "training.label_dropout=[1]: it must be a valid number"),
        ("training.lr_schedule=1.5", "training.lr_schedule=1.5: it must be a valid string"),
        ("+training.learning_rat=1", "training.learning_rat: grn.training.RefinerModule takes no such key; is "),
        ("+training.zzz=1", "training.zzz: grn.training.RefinerModule takes no such key: leave it out"),
        ("+sampler.zzz=1", "sampler.zzz: grn.method.sampler.Sampler takes no such key"),
        ("model.depth=2.5", "model.depth=2.5: it must be a valid integer"),
        ("data.flip=abc", "data.flip=abc: it must be a valid boolean"),
        ("callbacks.grid.num={a:1}", "callbacks.grid.num={'a': 1}: it must be a valid integer"),
        ("callbacks.last.every_n_train_steps=a", "callbacks.last.every_n_train_steps=a: it must be a valid integer"),
        ("scores.fid.isc=abc", "scores.fid.isc=abc: it must be a valid boolean"),
        ("+scores.fid.zzz=1", "scores.fid.zzz: grn.metrics.fid.GenerationScores takes no such key"),
        ("+callbacks.zzz=1", "callbacks.zzz=1 must say what is built, _target_: ..., or be null"),
        ("trainer.max_steps=abc", "trainer.max_steps=abc: it must be a valid integer"),
    ],
)
def test_mistakes(override, said):
    with pytest.raises(UserError) as mistake:
        check_settings(composed("+experiment=digits_c2i", override))
    assert str(mistake.value).startswith(said)


def test_what_null_leaves_open():
    check_settings(composed("+experiment=digits_c2i", "callbacks.grid=null", "sampler.guidance=null"))


def test_annotations_of_other_packages_are_theirs(monkeypatch):
    def score(width: int = 2): ...

    monkeypatch.setitem(sys.modules, "somebodys", SimpleNamespace(score=score))
    config = composed("+experiment=digits_c2i", "+callbacks.theirs={_target_:somebodys.score,width:abc}")
    check_settings(config)
    config.callbacks.theirs = {"_target_": "somebodys.score", "wdith": 3}
    with pytest.raises(UserError, match=r"^callbacks\.theirs\.wdith: somebodys\.score takes no such key; is width"):
        check_settings(config)
