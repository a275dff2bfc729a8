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


@pytest.fixture(autouse=True)
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


def composed(*overrides):
    return compose("train", [*overrides, "paths.run=somewhere"])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_fits(experiment):
    check_settings(composed(f"+experiment={experiment}"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.gradient_clip=abc", "training.gradient_clip=abc: it must be a valid number"),
        ("training.warmup_steps=true", "training.warmup_steps=True: it must be a valid integer"),
        ("training.label_dropout=[1]", "training.label_dropout=[1]: it must be a valid number"),
        ("training.lr_schedule=1.5", "training.lr_schedule=1.5: it must be 'constant' or 'cosine'"),
        ("training.lr_schedule=cosin", "training.lr_schedule=cosin: it must be 'constant' or 'cosine'"),
        ("training.signal_ratio_input=x", "training.signal_ratio_input=x: it must be 'nominal' or 'realized'"),
        ("+sampler.update=x", "sampler.update=x: it must be 'redraw' or 'psi'"),
        ("+sampler.kappa_form=x", "sampler.kappa_form=x: it must be 'constant' or 'rescaled'"),
        ("++sampler.schedule.grid=x", "sampler.schedule.grid=x: it must be 'linear', 'cosine' or 'shifted'"),
        ("+training.learning_rat=1", "training.learning_rat: grn.training.RefinerModule takes no such key; is "),
        ("+training.prompts=[a]", "training.prompts: grn.training.RefinerModule takes no such key"),
        ("training.labeling=1", "training.labeling=1: it must be 'ind' or 'bit'"),
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


def test_what_other_packages_do_with_more_arguments_is_theirs(monkeypatch):
    def score(*, width=2, **options): ...

    def odd(width: "no such name" = 2): ...  # noqa: F722

    monkeypatch.setitem(sys.modules, "somebodys", SimpleNamespace(score=score, odd=odd))
    more = "+callbacks.theirs={_target_:somebodys.score,zzz:1}", "+callbacks.odd={_target_:somebodys.odd,width:abc}"
    check_settings(composed("+experiment=digits_c2i", *more, "+callbacks.gone={_target_:nobodys.score,zzz:1}"))


@pytest.mark.parametrize("text", ["training.size=8", "training.negative_prompt=3", "training.frames=true"])
def test_what_text_refiners_draw_is_typed(text):
    with pytest.raises(UserError, match=f"^{text.partition('=')[0]}="):
        check_settings(composed("+experiment=digits_t2i", text))


COMMANDS = {
    "evaluate": ("scores", "suite", "sampler"),
    "sample": ("sampler",),
    "encode": ("data",),
    "bench": ("benchmark",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_other_commands_fits(command):
    for group in COMMANDS[command]:
        for path in sorted((CONF / group).glob("*.yaml")):
            check_settings(compose(command, [f"{group}={path.stem}"]))
