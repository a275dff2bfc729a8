"""The studies of experiments/ as commands: their help, what they say without points, and that they go on."""

import json
import runpy
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STUDIES = sorted(path.parent.name for path in EXPERIMENTS.glob("*/study.py"))
TABLE_ALONE = {"labelings": "--settings", "memory": "--tabulate", "entropy_sampling": None}  # others: --seeds


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("script", [*(f"{name}/study.py" for name in STUDIES), "quantization_rounds/plot.py"])
def test_help_writes_nothing(script, monkeypatch, capsys):
    path = EXPERIMENTS / script
    before = files(path.parent)
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {path.name}")
    assert files(path.parent) == before


@pytest.mark.parametrize("name", [*STUDIES, "quantization_rounds"])
def test_without_points_or_runs_it_says_so_in_one_line(name, tmp_path, monkeypatch):
    path = next((EXPERIMENTS / name).glob("*.py"))
    before = files(path.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRN_RUNS", raising=False)
    argument = None if path.name == "plot.py" else TABLE_ALONE.get(name, "--seeds")
    monkeypatch.setattr("sys.argv", [str(path), *([argument] if argument else [])])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code.startswith("error: ")
    assert "runs/" in ended.value.code
    assert "\n" not in ended.value.code
    assert files(path.parent) == before
    assert not list(tmp_path.iterdir())


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Of a point's three seeds one is there; its file stays as it was, the others are measured."""
    monkeypatch.setenv("GRN_RUNS", str(tmp_path))
    study = runpy.run_path(str(EXPERIMENTS / "memory" / "study.py"))
    point = study["POINTS"][0]
    (there := study["OUT"] / f"{point.name}-2.json").parent.mkdir()
    there.write_text("{}")
    asked = []
    evaluate = lambda config: asked.append(config.seed) or {"judge_accuracy": 0.5, "fid": float(config.seed)}  # noqa: E731
    monkeypatch.setitem(study["measure"].__globals__, "evaluate", evaluate)
    for _ in range(2):
        study["measure"]((point,), {"digits": "runs/digits_c2i"})
        assert asked == [1, 3]
    assert there.read_text() == "{}"
    assert json.loads((study["OUT"] / f"{point.name}-3.json").read_text())["fid"] == 3.0
