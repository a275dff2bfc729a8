"""Searches by Optuna: hydra_plugins/grn_optuna.py in a small Hydra app."""

import json
import sys

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from grn.runs.studies import own_trial, storage_of
from grn.runs.sweeps import Failed, SweepTable
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError

optuna = pytest.importorskip("optuna", minversion="4", reason="pip install 'grn[optuna]'")
grn_optuna = pytest.importorskip("hydra_plugins.grn_optuna")

SEARCH = ["-m", "hydra.sweeper.study_name=s", "hydra/sweeper=search"]


@pytest.fixture
def search(tmp_path, monkeypatch):
    """search(task, *overrides): runs the app of that task; returns the study."""
    (tmp_path / "conf").mkdir()
    config = {"x": 0.0, "kind": "a", "pair": None, "overwrite": False, "monitor": "loss"}
    own = {"job_logging": {"root": {"handlers": []}, "handlers": {}}, "output_subdir": None}
    own |= {"searchpath": [f"file://{CONF}"], "sweep": {"dir": str(tmp_path / "sweep"), "subdir": "${hydra.job.num}"}}
    (tmp_path / "conf" / "app.yaml").write_text(OmegaConf.to_yaml(config | {"hydra": own}))

    def run(task, *overrides):
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["app", *SEARCH, *overrides])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        hydra.main(config_path=str(tmp_path / "conf"), config_name="app", version_base="1.3")(task)()
        return optuna.load_study(study_name="s", storage=storage_of(None, tmp_path / "sweep"))

    yield run
    GlobalHydra.instance().clear()


def states(study):
    return [trial.state.name.lower() for trial in study.trials]


def test_points_are_searched_and_a_search_goes_on(search):
    seen = []

    def task(config):
        assert HydraConfig.get().job.num == len(seen)
        seen.append((config.x, config.kind, config.pair))
        return (config.x - 1) ** 2

    space = ["x=interval(0.0,2.0)", "kind=choice(a,b)", "pair=choice([0.0,1.0],[0.2,1.0])"]
    study = search(task, *space, "hydra.sweeper.n_trials=4")
    assert (len(seen), states(study)) == (4, ["complete"] * 4)
    assert all(0 <= x <= 2 and kind in "ab" and pair[1] == 1 for x, kind, pair in seen)
    assert study.best_value == min((x - 1) ** 2 for x, *_ in seen)
    study = search(task, *space, "hydra.sweeper.n_trials=6")
    assert len(seen) == len({x for x, *_ in seen}) == len(study.trials) == 6  # none is drawn again
    search(task, *space, "hydra.sweeper.n_trials=6")
    assert len(seen) == 6
    again = search(lambda config: 1.0, *space, "hydra.sweeper.n_trials=1", "overwrite=true")
    assert len(again.trials) == 1


def test_a_point_that_fails_leaves_the_others(search):
    values = iter([1.0, Failed("it is odd"), float("nan"), 0.5])
    study = search(lambda config: next(values), "x=interval(0.0,2.0)", "hydra.sweeper.n_trials=4")
    assert states(study) == ["complete", "fail", "fail", "complete"]
    assert study.trials[1].user_attrs["failed"] == "it is odd"
    assert "loss is nan, no finite number" in study.trials[2].user_attrs["failed"]
    assert study.best_trial.number == 3


def test_a_point_that_was_killed_comes_again(search):
    seen = []

    def task(config):
        seen.append(config.x)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return config.x

    asked = ["x=interval(0.0,2.0)", "hydra.sweeper.n_trials=3"]
    with pytest.raises(KeyboardInterrupt):
        search(task, *asked)
    study = search(task, *asked)
    assert states(study) == ["complete", "fail", "complete", "complete"]
    assert seen[2] == seen[1]
    assert len(set(seen)) == 3


def test_points_are_ended_early(search):
    def task(config):
        trial = own_trial()
        assert trial.number == HydraConfig.get().job.num
        for step in range(3):
            trial.report(config.x, step)
            if trial.should_prune():
                trial.set_user_attr("pruned", step)
                break
        return config.x

    pruner = ["hydra.sweeper.pruner={_target_:optuna.pruners.MedianPruner,n_startup_trials:2}"]
    study = search(task, "x=interval(0.0,2.0)", "hydra.sweeper.n_trials=8", *pruner)
    assert {"pruned", "complete"} == set(states(study))
    worst = [trial.params["x"] for trial in study.trials if trial.state.name == "PRUNED"]
    assert min(worst) > min(trial.params["x"] for trial in study.trials)


def test_several_goals(search):
    study = search(
        lambda config: [config.x, 2 - config.x], "x=interval(0.0,2.0)", "hydra.sweeper.n_trials=3",
        "hydra.sweeper.direction=[minimize,maximize]",
    )  # fmt: skip
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert len(study.best_trials) == 1
    with pytest.raises(UserError, match="the study s has others"):
        search(lambda config: 1.0, "x=interval(0.0,2.0)")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["x=interval(0.0,2.0)", "hydra.sweeper.direction=down"], "must be minimize or maximize"),
        (["x=interval(0.0,2.0)", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials"),
        (["x=1"], "there is nothing to search"),
        (["x=tag(log,interval(0.0,2.0))"], "hydra.sweeper.params.x: "),
        (["x=interval(0.0,2.0)", "hydra.sweeper.storage=nonsense://"], "hydra.sweeper.storage cannot be opened"),
        (
            [
                "x=interval(0.0,2.0)", "hydra.sweeper.direction=[minimize,minimize]",
                "hydra.sweeper.pruner={_target_:optuna.pruners.MedianPruner}",
            ],
            "Optuna ends no points early of several directions",
        ),
    ],
)  # fmt: skip
def test_mistakes(search, overrides, expected):
    with pytest.raises(Exception) as error:  # noqa: PT011  Hydra wraps what a constructor raises
        search(lambda config: 1.0, *overrides)
    chain = [error.value]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    (mistake,) = [cause for cause in chain if isinstance(cause, UserError)]
    assert expected in str(mistake)


def test_search_spaces():
    given = ["a=interval(1,8)", "b=tag(log,interval(1e-4,1e-2))", "c=range(2,9,3)", "d=choice(x,[1,2])", "e=5", "a=3"]
    space, fixed = grn_optuna.search_space(OverridesParser.create().parse_overrides(given))
    assert space == {
        "b": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        "c": optuna.distributions.IntDistribution(2, 8, step=3),
        "d": optuna.distributions.CategoricalDistribution(["x", "[1,2]"]),
    }
    assert fixed == ["e=5", "a=3"]


def test_points_that_failed_are_in_the_table(tmp_path):
    class Returned:
        _return_value = Failed("no such file")

    hydra_config = {"mode": "MULTIRUN", "runtime": {"output_dir": str(tmp_path / "0")}, "overrides": {"task": ["x=1"]}}
    hydra_config["sweep"] = {"dir": str(tmp_path), "subdir": "0"}
    config = OmegaConf.create({"hydra": hydra_config, "monitor": None})
    config.hydra.mode = hydra.types.RunMode.MULTIRUN
    (tmp_path / "0").mkdir()
    SweepTable().on_job_end(config, job_return=Returned())
    assert json.loads((tmp_path / "0" / "point.json").read_text())["failed"] == "no such file"
    assert (tmp_path / "table.csv").read_text() == "point,failed\n0,no such file\n"
