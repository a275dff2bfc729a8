"""What the demo says; that it does what its commands do is in test_end_to_end.py."""

import json
import sys
from pathlib import Path

import pytest

from grn import demo

METRICS = {
    demo.TOKENIZER: {"psnr": 37.61},
    demo.REFINER: {"judge_accuracy": 0.996, "judge_val_accuracy": 0.99, "fid": 11.5, "fid_val": 4.4}
    | {"nn_median_generated": 0.107, "nn_median_val": 0.1089, "steps_mean": 14.7},
}


def test_the_box_has_numbers_pictures_and_whole_commands(tmp_path, monkeypatch, capsys):
    """On a terminal of 80 columns, too, where a command that is broken in two cannot be copied."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("WANDB_SILENT", "false")
    monkeypatch.setattr(sys, "argv", ["demo"])
    monkeypatch.setattr(demo, "STAGES", ())
    for run, metrics in METRICS.items():
        (tmp_path / run / "evaluation").mkdir(parents=True)
        (tmp_path / run / "evaluation" / "metrics.json").write_text(json.dumps({"metrics": metrics}))
    demo.main()
    said = capsys.readouterr().out
    for number in ("37.6 dB", "99.6%", "99.0%", "11.5", "4.4", "0.107", "0.109", "14.7"):
        assert number in said
    for whole in (*(path for path, _ in demo.PICTURES), *demo.NEXT):
        assert whole in said


def test_a_mistake_of_a_stage_ends_the_demo(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "false")
    monkeypatch.setattr(sys, "argv", ["demo"])
    monkeypatch.setattr(demo, "STAGES", (demo.Stage("Score", "evaluate", ("ckpt=runs/nothing",)), *demo.STAGES))
    with pytest.raises(SystemExit, match=r"^error: ckpt: no such checkpoint or run folder: runs/nothing"):
        demo.main()
    assert "1/7  Score" in capsys.readouterr().out
    assert not Path("data").exists()


def test_it_takes_no_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--help"])
    demo.main()
    assert "python -m grn.demo" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["demo", "data=digits"])
    with pytest.raises(SystemExit, match=r"^error: data=digits: the demo takes no arguments$"):
        demo.main()
