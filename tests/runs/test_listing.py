"""What run folders hold, read while others write them, and whatever is in them."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from grn.runs import listing as run_list
from grn.runs.listing import find_runs, newest_pictures, read_curves, read_metrics, read_run

CONFIG = """\
training:
  _target_: grn.training.RefinerModule
trainer:
  max_steps: 100
"""


def make_run(folder, *, config=CONFIG, rows=("0,1.5,", "9,0.5,0.25"), version=0, scores=None, at=None):
    for part in ("checkpoints", f"csv/version_{version}"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    (folder / f"csv/version_{version}/metrics.csv").write_text("\n".join(["step,train/loss,val/loss", *rows]) + "\n")
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"weights")
    if scores is not None:
        (folder / "metrics.json").write_text(json.dumps({"step": 100, "metrics": scores}))
    if at is not None:
        for path in (*folder.rglob("*.csv"), folder / "config.yaml", folder / "checkpoints" / "last.ckpt"):
            os.utime(path, (at, at))
    return folder


def test_a_run_tells_its_kind_its_step_and_its_scores(tmp_path):
    folder = make_run(tmp_path / "digits", scores={"val/loss": 0.25, "eval/fid": float("nan")})
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text(json.dumps({"step": 90, "metrics": {"fid": 12.5}}))
    run = read_run(folder)
    assert (run.name, run.kind, run.step, run.max_steps, run.problems) == ("digits", "refiner", 100, 100, ())
    assert run.checkpoint == folder / "checkpoints" / "last.ckpt"
    assert (run.writer, run.is_running) == (None, False)
    assert run.scores["val/loss"] == 0.25
    assert run.scores["fid"] == 12.5
    assert run.scores["eval/fid"] != run.scores["eval/fid"]


@pytest.mark.parametrize(
    ("target", "kind"),
    [("TokenizerModule", "tokenizer"), ("TextRefinerModule", "text refiner"), ("Unknown", None), ("[1]", None)],
)
def test_the_kind_is_the_config_s(tmp_path, target, kind):
    assert read_run(make_run(tmp_path / "run", config=CONFIG.replace("RefinerModule", target))).kind == kind


def test_runs_come_the_newest_first_with_those_of_sweeps(tmp_path):
    make_run(tmp_path / "old", at=1000)
    make_run(tmp_path / "sweeps" / "lr" / "0", at=3000)
    make_run(tmp_path / "new", at=2000)
    (tmp_path / "new" / "samples").mkdir()
    (tmp_path / "new" / "samples" / "config.yaml").touch()  # within a run there are no others
    (tmp_path / ".hidden" / "checkpoints").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "old")  # the same run, which is told once
    assert [run.name for run in find_runs(tmp_path)] == ["sweeps/lr/0", "new", "link"]
    assert find_runs(tmp_path / "nowhere") == []


def test_a_run_that_has_only_begun_is_one(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(CONFIG)
    (run,) = find_runs(tmp_path)
    assert (run.step, run.checkpoint, run.scores, run.problems) == (None, None, {}, ())
    assert read_curves(run.folder) == {}
    assert newest_pictures(run.folder) == {}


def test_the_last_step_of_long_curves_is_read_from_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(run_list, "TAIL", 64)
    assert read_run(make_run(tmp_path / "run", rows=[f"{step},0.5," for step in range(0, 1000, 7)])).step == 995


def test_steps_that_are_trained_again_replace_those_of_before(tmp_path):
    folder = make_run(tmp_path / "run", rows=["0,4,", "10,3,", "20,2,0.5"])
    make_run(folder, rows=["10,2.5,", "20,1.5,"], version=1)
    make_run(folder, rows=["30,1,"], version=10)  # after 9, not after 1
    curves = read_curves(folder)
    assert curves["train/loss"] == [(0, 4), (10, 2.5), (20, 1.5), (30, 1)]
    assert "val/loss" not in curves  # its only point was of a step that is not of this run any more
    assert read_run(folder).step == 31


def test_curves_that_are_being_written_or_are_none(tmp_path):
    folder = make_run(tmp_path / "run", rows=["0,1,", "x,2,", "1,nan,", "2,inf,3", "", "3,1e3,abc", "4"])
    assert read_curves(folder) == {"train/loss": [(0, 1), (3, 1000)], "val/loss": [(2, 3)]}
    make_run(folder, rows=["9" * 5000 + ",1,", '"' + "1" * 200_000], version=1)  # longer than csv reads
    make_run(folder, version=2)
    (folder / "csv/version_2/metrics.csv").write_text("epoch,other\n1,2\n")
    assert read_curves(folder)["train/loss"] == [(0, 1), (3, 1000)]


def test_long_curves_are_thinned_evenly(tmp_path):
    folder = make_run(tmp_path / "run", rows=[f"{step},{step}," for step in range(5000)])
    curve = read_curves(folder, points=100)["train/loss"]
    assert len(curve) == 100
    assert (curve[0], curve[-1]) == ((0, 0), (4999, 4999))
    assert max(b - a for (a, _), (b, _) in itertools.pairwise(curve)) <= 52


def test_the_newest_picture_of_each_kind(tmp_path):
    folder = make_run(tmp_path / "run")
    names = ("pictures/samples-step0000900.png", "pictures/samples-step0001000.png", "pictures/refinement.gif")
    names += ("evaluation/nearest.png", "pictures/notes.txt", "pictures/.hidden.png")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"picture")
    (folder / "pictures" / "empty.png").touch()
    (folder / "pictures" / "secret.png").symlink_to("/etc/passwd")
    assert newest_pictures(folder) == {
        "pictures/refinement.gif": folder / names[2],
        "pictures/samples.png": folder / names[1],
        "evaluation/nearest.png": folder / names[3],
    }


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"metrics": 3}',
        '{"metrics": {"a": "b"}}',
        '{"metrics": {"a": 1' + "0" * 400 + "}}",
    ],
)
def test_damaged_scores_are_a_line(tmp_path, content):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.json is damaged"):
        read_metrics(folder / "metrics.json")
    run = read_run(folder)
    assert len(run.problems) == 1
    assert (run.scores, run.step) == ({}, 10)


@pytest.mark.parametrize(
    "content", ["a: [", "!!python/object/apply:os.system [x]", "[" * 50_000, "a: 2026-99-99", "\x00", "- 1\n- 2"]
)
def test_a_damaged_config_is_a_line_at_most(tmp_path, content):
    run = read_run(make_run(tmp_path / "run", config=content))
    assert len(run.problems) <= 1
    assert (run.kind, run.max_steps, run.step) == (None, None, 10)


def test_files_that_are_none_or_too_large_are_not_read(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.json").symlink_to("/etc/passwd")
    os.mkfifo(folder / "fifo")
    (folder / "config.yaml").unlink()
    os.rename(folder / "fifo", folder / "config.yaml")  # which nobody ever writes to
    assert len(read_run(folder).problems) == 2
    monkeypatch.setattr(run_list, "MAX_CURVES", 10)
    assert read_curves(folder) == {}


def test_nothing_heavy_is_imported():
    code = "import sys, grn.runs.listing; assert not {'torch', 'lightning', 'hydra'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
