import csv
import json

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf
from PIL import Image

from grn.media import pictures
from grn.media.pictures import RING
from grn.runs import wandb_runs
from grn.runs.sweeps import SweepTable, _curves, objective, table
from grn.runtime.errors import UserError


def point(folder, number, overrides, metrics, monitor=None, mode=RunMode.MULTIRUN, step=1):
    """A point of a sweep ends."""
    out = folder / str(number)
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps({"step": step, "metrics": metrics}))
    hydra = {"mode": mode, "runtime": {"output_dir": str(out)}, "overrides": {"task": overrides}}
    hydra["sweep"] = {"dir": str(folder), "subdir": str(number)}
    config = OmegaConf.create({"hydra": hydra, "monitor": monitor})
    SweepTable().on_job_end(config)
    return config


def rows_of(folder):
    with open(folder / "table.csv") as file:
        return list(csv.DictReader(file))


def test_points_come_by_their_metric_with_what_tells_them_apart(tmp_path, capsys):
    for number, (depth, fid) in enumerate([(2, 9.5), (4, 3.25), (8, 5.0)]):
        overrides = ["+experiment=x", f"model.depth={depth}", "data.labels=[1,2]"]
        config = point(tmp_path, number, overrides, {"val/loss": 1.0, "eval/fid": fid})
    rows = rows_of(tmp_path)
    assert [row["model.depth"] for row in rows] == ["4", "8", "2"]
    assert list(rows[0]) == ["point", "model.depth", "val/loss", "eval/fid"]
    SweepTable().on_multirun_end(config)
    printed = capsys.readouterr().out
    assert printed.index("3.25") < printed.index("9.5")
    assert "experiment" not in printed


def test_what_should_be_large_comes_large_first(tmp_path):
    for number, psnr in enumerate([30.0, 33.0]):
        point(tmp_path, number, [f"seed={number}"], {"psnr": psnr, "l1": number}, monitor="psnr")
    assert [row["point"] for row in rows_of(tmp_path)] == ["1", "0"]
    rows, columns = table(tmp_path, "l1")
    assert [row["point"] for row in rows] == ["0", "1"]
    assert columns == ["point", "seed", "l1"]


def test_points_without_the_metric_come_last(tmp_path):
    point(tmp_path, 0, ["seed=0"], {"l1": 1.0})
    point(tmp_path, 1, ["seed=1"], {"psnr": 1.0})
    assert [row["point"] for row in rows_of(tmp_path)] == ["1", "0"]


def test_a_new_sweep_forgets_the_points_of_the_last(tmp_path):
    config = point(tmp_path, 0, ["seed=0"], {"psnr": 1.0})
    config.cluster = {"dry_run": True}
    SweepTable().on_multirun_start(config)
    assert table(tmp_path, None)[0]
    config.cluster.dry_run = False
    SweepTable().on_multirun_start(config)
    assert table(tmp_path, None) == ([], ["point"])


def test_points_of_several_steps_are_drawn(tmp_path, capsys):
    for number, (step, fid) in enumerate([(200, 9.0), (100, 30.0), (300, 12.0)]):
        config = point(tmp_path, number, [f"ckpt=a/step_{step}.ckpt"], {"fid": fid, "isc": 1.0}, step=step)
    assert [(row["step"], row["fid"]) for row in rows_of(tmp_path)] == [
        ("200", "9.0"),
        ("300", "12.0"),
        ("100", "30.0"),
    ]
    SweepTable().on_multirun_end(config)
    assert f"drawn: {tmp_path / 'curve.png'}" in capsys.readouterr().out.replace("\n", "")
    with Image.open(tmp_path / "curve.png") as picture:
        heights = {}
        for x in range(picture.width):
            for y in range(picture.height):
                if picture.getpixel((x, y)) == pictures.BAR:
                    heights.setdefault(x, []).append(y)
    left, right = min(heights), max(heights)
    top = {x: min(ys) for x, ys in heights.items()}
    lowest = max(top, key=top.get)  # the fid at 200
    assert abs(lowest - (left + right) / 2) < 8
    assert top[left] < top[right] < top[lowest]


def test_numbers_that_were_swept_are_drawn_with_the_best_marked(tmp_path, capsys):
    fids = {("1.0", "10"): 9.0, ("1.5", "10"): 4.0, ("2.0", "10"): 6.0, ("1.0", "50"): 8.0, ("1.5", "50"): 5.0}
    for number, ((guidance, steps), fid) in enumerate(fids.items()):
        overrides = [f"sampler.guidance={guidance}", f"sampler.schedule.steps={steps}", "sampler=linear"]
        config = point(tmp_path, number, overrides, {"fid": fid})
    rows, columns = table(tmp_path, None)
    assert _curves(rows, columns, "sampler.guidance", "fid") == {
        "sampler.schedule.steps=10": [(1.5, 4.0), (2.0, 6.0), (1.0, 9.0)],
        "sampler.schedule.steps=50": [(1.5, 5.0), (1.0, 8.0)],
    }
    SweepTable().on_multirun_end(config)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"curve-sampler.guidance.png", "curve-sampler.schedule.steps.png"}
    assert "curve-sampler.guidance.png" in capsys.readouterr().out.replace("\n", "")
    with Image.open(tmp_path / "curve-sampler.guidance.png") as picture:
        marked = [x for x in range(picture.width) for y in range(picture.height) if picture.getpixel((x, y)) == RING]
    assert abs((min(marked) + max(marked)) / 2 - 332) < 40  # the middle of the axis, at 1.5; its value stands above
    assert marked


def test_the_table_and_its_curves_go_to_the_run_of_the_one_checkpoint(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(wandb_runs, "log_results", lambda ckpt, results, **_: logged.append((ckpt, results)))
    for number, ckpt in enumerate(("a/checkpoints/last.ckpt",) * 2):
        config = point(tmp_path, number, [f"sampler.guidance={number + 1}"], {"fid": 1.0 + number})
        path = tmp_path / str(number) / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"ckpt": ckpt}))
    SweepTable().on_multirun_end(config)
    assert not logged  # not asked for
    config.wandb = True
    SweepTable().on_multirun_end(config)
    ((ckpt, results),) = logged
    assert ckpt == "a/checkpoints/last.ckpt"
    assert [row["fid"] for row in results["sweep/table"]] == [1.0, 2.0]
    assert results["sweep/curve-sampler.guidance"] == tmp_path / "curve-sampler.guidance.png"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ckpt": "b/checkpoints/last.ckpt"}))
    SweepTable().on_multirun_end(config)
    assert len(logged) == 1  # of two checkpoints, whose run would it be?


def test_points_of_one_step_are_not_drawn(tmp_path):
    for number in range(2):
        config = point(tmp_path, number, [f"seed={number}"], {"fid": 1.0 + number})
    SweepTable().on_multirun_end(config)
    assert not (tmp_path / "curve.png").exists()  # the seed is a number like others
    assert "step" not in rows_of(tmp_path)[0]


def test_a_run_is_no_sweep(tmp_path):
    point(tmp_path, 0, ["seed=0"], {"psnr": 1.0}, mode=RunMode.RUN)
    point(tmp_path, ".", ["seed=0"], {"psnr": 1.0})
    assert not list(tmp_path.rglob("table.csv"))


def test_objective():
    metrics = {"rfid": 2.0, "psnr": 30.0}
    assert objective(metrics, None) == 2.0
    assert objective(metrics, "psnr") == 30.0
    assert objective({"seconds": 1.0}, None) is None
    with pytest.raises(UserError, match="monitor=fid was not measured; there is psnr, rfid"):
        objective(metrics, "fid")
