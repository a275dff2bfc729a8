"""Where a run goes on, and when there is nothing to go on with."""

import json
import logging

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from grn.cli import CONF
from grn.errors import UserError
from grn.runs import checkpoint_to_resume
from grn.train import train


@pytest.fixture
def config(tmp_path):
    """config(key=value, ...) of a run whose last checkpoint is of step 100."""

    def of(*overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(
                "train",
                ["+experiment=digits_tokenizer", f"paths.data={tmp_path}", f"paths.runs={tmp_path}", *overrides],
            )

    run = tmp_path / "digits_tokenizer"
    (run / "checkpoints").mkdir(parents=True)
    plain = OmegaConf.to_container(of("trainer.max_steps=100"))
    parts = {part: plain[part] for part in ("model", "text_encoder", "training", "data", "seed")}
    parts = OmegaConf.to_container(OmegaConf.create(parts | {"paths": plain["paths"], "name": "x"}), resolve=True)
    contents = {"state_dict": {}, "global_step": 100, "config": parts}
    for name in ("last", "best"):
        torch.save(contents, run / "checkpoints" / f"{name}.ckpt")
    (run / "metrics.json").write_text(json.dumps({"step": 100, "metrics": {"val/psnr": 30.0}}))
    return of


def test_a_run_whose_steps_are_done_says_so(config, tmp_path, caplog):
    """To scripts that call again, what was measured; to who asks to go on, how."""
    for place in ("last", "best", f"{tmp_path}/digits_tokenizer/checkpoints/last.ckpt"):
        for steps in (100, 60, 0):
            with pytest.raises(UserError, match=rf"of step 100 already, and trainer\.max_steps={steps} .*give more"):
                train(config(f"ckpt_path={place}", f"trainer.max_steps={steps}"))
        for steps in (101, -1):
            assert checkpoint_to_resume(config(f"ckpt_path={place}", f"trainer.max_steps={steps}")).step == 100
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    caplog.set_level(logging.INFO)
    assert train(config("ckpt_path=auto", "trainer.max_steps=100")) == {"val/psnr": 30.0}
    assert "digits_tokenizer is done: it is at step 100 of trainer.max_steps" in caplog.text
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
