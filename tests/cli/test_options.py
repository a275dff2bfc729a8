"""Another option of a group beside an experiment; and what a wrong key may have meant."""

import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from grn.cli.entry import entry_point
from grn.cli.help import page
from grn.cli.options import folders_of, outlived
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.runtime.failures import explain
from grn.runtime.near_misses import near_misses

ENTROPY = ["warmup", "scale", "offset", "min_steps", "max_steps"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["+experiment=digits_c2i", "sampler=linear"], [f"~sampler.schedule.{key}" for key in ENTROPY]),
        (["+experiment=digits_c2i", "sampler=checkpoint"], ["sampler.schedule=null"]),
        (["+experiment=digits_c2i", "sampler=entropy"], []),
        (["sampler=linear"], []),
        (["+experiment=digits_c2i", "data=tokens", "data.root=x"], []),  # whose batch size they have, too
        (["+experiment=digits_t2i", "callbacks=tokenizer"], ["~callbacks.scores"]),
        (["+experiment=digits_c2i", "data=checkpoint", "data.batch_size=3"], ["~data.flip"]),
        (["+experiment=nothing", "sampler=linear"], []),
        (["+experiment=digits_c2i", "sampler=nothing"], []),
    ],
)
def test_what_an_experiment_set_for_another_option(arguments, expected):
    assert outlived(arguments, CONF) == expected


def test_an_experiment_on_top_of_another(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - digits_c2i\nname: mine\n")
    found = outlived(["+experiment=mine", "sampler=linear"], CONF, [tmp_path])
    assert found == [f"~sampler.schedule.{key}" for key in ENTROPY]


@pytest.mark.parametrize("base", ["digits_c2i", "/experiment/digits_c2i"])
def test_an_experiment_that_overrides_an_option_of_another(tmp_path, base):
    (tmp_path / "experiment").mkdir()
    text = f"# @package _global_\ndefaults:\n  - {base}\n  - override /sampler: linear\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text + "sampler: {schedule: {steps: 9}}\n")
    gone = [f"~sampler.schedule.{key}" for key in ENTROPY]
    assert outlived(["+experiment=mine"], CONF, [tmp_path]) == gone
    assert outlived(["+experiment=mine", "sampler=entropy"], CONF, [tmp_path]) == ["~sampler.schedule.steps"]
    (tmp_path / "experiment" / "mine.yaml").write_text(text + "sampler: {schedule: {warmup: 9}}\n")
    assert outlived(["+experiment=mine"], CONF, [tmp_path]) == gone[1:]  # its own mistake is told


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder of configs, which is a package's: an experiment on top of one of ours."""
    folder = tmp_path / "a_package" / "conf"
    (folder / "experiment").mkdir(parents=True)
    for init in (folder.parent / "__init__.py", folder / "__init__.py"):
        init.touch()
    defaults = "defaults:\n  - /experiment/digits_c2i\n  - override /sampler: linear\n"
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{defaults}")
    (folder / "mine.yaml").write_text(f"defaults: [train]\nhydra: {{searchpath: ['file://{folder}']}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("a_package", "a_package.conf"):  # another test's
        monkeypatch.delitem(sys.modules, module, raising=False)
    return folder


@pytest.mark.parametrize(
    ("config_dir", "override", "name"),
    [
        ("{folder}", None, "train"),
        (None, "hydra.searchpath=[file://{folder}]", "train"),
        (None, "hydra.searchpath=[pkg://a_package.conf]", "train"),
        ("{folder}", None, "mine"),  # whose own searchpath names it again
    ],
)
def test_folders_of_configs(package, config_dir, override, name):
    given = [override.format(folder=package)] if override else []
    found = folders_of(config_dir and config_dir.format(folder=package), given, name)
    assert found == [package] * (2 if name == "mine" else 1)


@pytest.mark.parametrize("place", ["pkg://no_package.conf", "file:///no/folder", "no/folder"])
def test_a_searchpath_that_is_not_there(place):
    with pytest.raises(UserError, match=r"hydra.searchpath: there is no .*no.(package|folder)"):
        folders_of(None, [f"hydra.searchpath=[{place}]"], "train")


def test_a_searchpath_of_a_package_without_its_mark(package):
    (package / "__init__.py").unlink()
    with pytest.raises(UserError, match=r"a_package.conf is no package without an __init__.py"):
        folders_of(None, ["hydra.searchpath=[pkg://a_package.conf]"], "train")


def test_an_experiment_of_two_others(tmp_path):
    (tmp_path / "experiment").mkdir()
    for name, text in {
        "first": "defaults:\n  - override /sampler: entropy\nsampler: {schedule: {warmup: 3}}\n",
        "second": "defaults:\n  - override /cluster: cpu\n",
        "both": "defaults: [first, second]\n",
    }.items():
        (tmp_path / f"experiment/{name}.yaml").write_text(f"# @package _global_\n{text}")
    assert outlived(["+experiment=both", "sampler=linear"], CONF, [tmp_path]) == ["~sampler.schedule.warmup"]


@pytest.mark.parametrize("sweep", [[], ["-m", "training.warmup_steps=1,2"]])
def test_an_experiment_of_a_package(run, package, sweep):
    given = ["+experiment=mine", "hydra.searchpath=[pkg://a_package.conf]"]
    configs = run(*given, *sweep, experiment=None)
    assert [config["sampler"]["schedule"].keys() for config in configs] == [{"_target_", "steps"}] * (
        1 + len(sweep) // 2
    )


def test_help_lists_the_experiments_of_a_package(package):
    assert ", mine, " in page("train", [], CONF, [package])


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*arguments) -> the configs that a command of train's config is started with."""

    def run(*arguments, experiment="digits_c2i"):
        seen = []

        @entry_point("train")
        def main(config):
            seen.append(OmegaConf.to_container(config))

        (tmp_path / "tokenizer.ckpt").touch()
        for split in ("train", "val"):
            (tmp_path / f"{split}-0.tar").touch()
        given = [f"tokenizer.ckpt={tmp_path}/tokenizer.ckpt", f"data.root={tmp_path}", f"paths.runs={tmp_path}"]
        chosen = [f"+experiment={experiment}"] if experiment else []
        monkeypatch.setattr(sys, "argv", ["train", *chosen, *given, *arguments])
        main()
        return seen

    return run


def test_a_run_with_another_sampler(run):
    (config,) = run("sampler=linear")
    assert config["sampler"]["schedule"] == {"_target_": "grn.method.schedules.Linear", "steps": 50}
    assert config["sampler"]["guidance"] == 1.5  # the experiment's own, which linear knows


def test_a_sweep_over_samplers(run):
    linear, entropy = run("-m", "sampler=linear,entropy")  # after other arguments, which Hydra alone would refuse
    assert linear["sampler"]["schedule"] == {"_target_": "grn.method.schedules.Linear", "steps": 50}
    assert entropy["sampler"]["schedule"]["warmup"] == 3


@pytest.mark.parametrize(
    ("verb", "given", "expected"),
    [
        ("train", "guidance", "did you mean sampler.guidance?"),
        ("train", "lr", "did you mean training.learning_rate?"),
        ("train", "batch_size", "did you mean data.batch_size or "),
        ("train", "steps", "trainer.max_steps"),
        ("train", "training.lr", "did you mean learning_rate?"),
        ("train", "modle.depth", "did you mean model?"),
        ("train", "model.dpeth", "did you mean depth?"),
        ("train", "gpus", "cluster.devices"),
        ("sample", "guidance", "did you mean sampler.guidance?"),
        ("sample", "num_steps", "did you mean sampler.schedule.steps, with sampler=linear,?"),
        ("sample", "prompt", "did you mean prompts?"),
        ("sample", "zzz", "known here: "),
        ("evaluate", "learning_rate", "known here: "),
    ],
)
def test_near_misses(verb, given, expected):
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(Exception, match="override") as error:
        compose(verb, [f"{given}=3"])
    line = explain(error.value)
    assert line.startswith("no config key "), line
    assert expected in line
    assert "film_states" not in line.partition("known here")[0]
    assert "hydra" not in line


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("+experiment=digit_c2i", "there is no experiment=digit_c2i; did you mean digits_c2i or "),
        ("sampler=lineer", "there is no sampler=lineer; did you mean linear? there are calibrated, checkpoint, "),
        ("scores=zzz", "there is no scores=zzz; there are checkpoint, clip, "),
        ("+experiment=of/nobody", "there is no experiment=of/nobody; there are c2i_bit_B, "),
        ("+experiment=mine", "there is no sampler=lineer; did you mean linear? there are "),
    ],
)
def test_options_that_a_group_does_not_have(argument, expected, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /sampler: lineer\n"
    )
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(MissingConfigException) as error:
        compose("train", [argument, f"hydra.searchpath=[file://{tmp_path}]"])
    assert explain(error.value).startswith(expected)


def test_near_misses_of_a_tree():
    tree = OmegaConf.create({"a": {"width": 1, "b": {"width": 2}}, "height": 3, "hydra": {"width": 4}})
    assert near_misses("width", tree) == ["a.width", "a.b.width"]
    assert near_misses("heigth", tree) == ["height"]
    assert near_misses("a.wdith", tree) == ["a.width"]
    assert near_misses("c", tree) == []
