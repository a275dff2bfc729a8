"""One W&B run for each run folder, read back from its files; and what happens where W&B cannot be reached."""

import json
import logging
import socket
import time

import pytest
import wandb
from PIL import Image
from wandb_files import wandb_records

from grn.runs import wandb_runs
from grn.runs.wandb_runs import finish, log_results, open_run, read_record
from grn.runtime.errors import UserError
from grn.training.wandb_logger import RunLogger


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it reads the environment once
    yield
    wandb.teardown()


def start(folder, steps, *, resumed, **arguments):
    """What a start of training logs, step by step, with a validation under the last one; the id."""
    logger = RunLogger(save_dir=str(folder), project="grn", name="run", resumed=resumed, offline=True, **arguments)
    for step in steps:
        logger.log_metrics({"train/loss": 1.0 / (1 + step)}, step)
    logger.log_metrics({"val/loss": 0.5}, steps[-1])
    identity = logger.experiment.id
    finish()
    return identity


def rows(folder):
    """(id, W&B's step, {key: value}) of every row of all starts, in their order."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        identity = None
        for record in wandb_records(path):
            identity = record.run.run_id or identity
            if record.history.item:
                row = {"/".join(it.nested_key) or it.key: json.loads(it.value_json) for it in record.history.item}
                found.append((identity, int(row["_step"]), row))
    return found


def test_a_run_goes_on_in_its_wandb_run(tmp_path):
    first = start(tmp_path, range(4), resumed=None)
    assert read_record(tmp_path) == {"id": first, "project": "grn", "entity": None, "step": 3}
    assert start(tmp_path, range(4, 6), resumed="last") == first
    # Killed at step 5, whose last checkpoint was made after step 3.
    assert start(tmp_path, range(4, 8), resumed="auto") == first
    (tmp_path / "checkpoints").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    results = {"evaluate/fid": 3.5, "evaluate/samples": tmp_path / "grid.png"}
    results["sweep/table"] = [{"point": "0", "fid": 3.5}, {"point": "1", "steps": 8}]
    log_results(tmp_path / "checkpoints" / "best.ckpt", results, step=8, offline=True)
    assert start(tmp_path, range(8, 9), resumed="best") == first
    found = rows(tmp_path)
    assert {identity for identity, _, _ in found} == {first}
    steps = [step for _, step, _ in found]
    assert steps == sorted(set(steps))
    made = [(row["trainer/global_step"], row.get("train/loss"), row.get("val/loss")) for _, _, row in found]
    losses = dict.fromkeys((3, 5, 9), 0.5)  # of the row, of the last step of each start
    expected = [(step, 1 / (1 + step), losses.get(row)) for row, step in enumerate([0, 1, 2, 3, 4, 5, 4, 5, 6, 7])]
    assert made == [*expected, (8, None, None), (8, 1 / 9, 0.5)]
    assert steps[:6] == [0, 1, 2, 3, 4, 5]  # as Lightning counts them
    scored = found[-2][2]
    assert scored["evaluate/fid"] == 3.5
    assert any(key.startswith("evaluate/samples") for key in scored)
    assert any(key.startswith("sweep/table") for key in scored)
    (path,) = tmp_path.glob("wandb/*/files/media/table/sweep/table*.json")
    assert json.loads(path.read_text())["columns"] == ["point", "fid", "steps"]
    assert start(tmp_path, range(1), resumed=None) != first


def test_results_of_a_folder_without_a_wandb_run_go_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_runs, "open_run", lambda *_, **__: pytest.fail("opened"))
    log_results(tmp_path / "run" / "checkpoints" / "best.ckpt", {"fid": 1.0}, step=3, offline=True)


@pytest.mark.parametrize(
    "record", ["{", "[]", '{"id": "../x", "project": "p", "entity": null, "step": 1}', '{"id": "a"}']
)
def test_a_record_of_something_else_is_named(tmp_path, record):
    (tmp_path / "wandb.json").write_text(record)
    with pytest.raises(UserError, match=r"wandb\.json does not name a W&B run"):
        read_record(tmp_path)


@pytest.mark.parametrize("server", ["refuses", "is mute"])
def test_goes_on_offline_where_wandb_cannot_be_reached(tmp_path, monkeypatch, caplog, server):
    monkeypatch.setattr(wandb_runs, "REACH", 1)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if server == "is mute":
            listening.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        begun = time.monotonic()
        with caplog.at_level(logging.WARNING):
            run = open_run(tmp_path, offline=False, project="grn")
        assert time.monotonic() - begun < 60  # on a busy machine; wandb alone takes minutes
        run.finish()
    (said,) = [record.getMessage() for record in caplog.records if record.name == wandb_runs.__name__]
    assert said.startswith("W&B cannot be reached (")
    assert "continues offline; `wandb sync " in said
    assert "\n" not in said
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_settings_that_wandb_does_not_take(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.setenv("WANDB_CONSOLE", "loud")
    with pytest.raises(UserError, match=r"W&B does not take a setting .*console"):
        open_run(tmp_path, offline=True, project="grn")
    monkeypatch.setenv("WANDB_MODE", "somehow")
    with pytest.raises(UserError, match="WANDB_MODE=somehow must be one of online, offline, disabled, or unset"):
        open_run(tmp_path, offline=True, project="grn")
    monkeypatch.delenv("WANDB_CONSOLE")
    monkeypatch.setenv("WANDB_MODE", "")
    run = open_run(tmp_path, offline=True, project="grn")
    run.finish()
    assert read_record(tmp_path) is None  # of the logger's run alone
    assert run.id
