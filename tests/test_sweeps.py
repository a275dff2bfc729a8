import csv
import json

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from grn.errors import UserError
from grn.sweeps import SweepTable, objective, table


def point(folder, number, overrides, metrics, monitor=None, mode=RunMode.MULTIRUN):
    """A point of a sweep ends."""
    out = folder / str(number)
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps({"step": 1, "metrics": metrics}))
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
