"""Where a run goes on, and when there is nothing to go on with."""

import json
import logging
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from grn.checkpoints.native import Checkpoint
from grn.runs.folder import check_tokenizer, checkpoint_to_resume
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.training.train import train


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
    names = ("model", "text_encoder", "training", "data", "seed", "callbacks", "scores", "paths")
    parts = {part: plain[part] for part in names} | {"name": "x"}
    parts = OmegaConf.to_container(OmegaConf.create(parts), resolve=True)
    contents = {"state_dict": {}, "global_step": 100, "config": parts, "lr_schedulers": []}
    for name in ("last", "best"):
        torch.save(contents, run / "checkpoints" / f"{name}.ckpt")
    (run / "metrics.json").write_text(json.dumps({"step": 100, "metrics": {"val/psnr": 30.0}}))
    return of


def test_a_run_whose_steps_are_done_says_so(config, tmp_path, caplog):
    """To scripts that call again, what was measured; to who asks to go on, how."""
    for place in ("last", "best", f"{tmp_path}/digits_tokenizer/checkpoints/last.ckpt"):
        for steps in (100, 60, 1):
            with pytest.raises(UserError, match=rf"of step 100 already, and .*={steps} .*raise it to continue"):
                train(config(f"ckpt_path={place}", f"trainer.max_steps={steps}"))
        for steps in (101, -1):
            assert checkpoint_to_resume(config(f"ckpt_path={place}", f"trainer.max_steps={steps}")).step == 100
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    caplog.set_level(logging.INFO)
    assert train(config("ckpt_path=auto", "trainer.max_steps=100")) == {"val/psnr": 30.0}
    assert "digits_tokenizer is done: it is at step 100 of trainer.max_steps" in caplog.text
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_damaged_or_lost_last_names_another(config, tmp_path):
    folder = tmp_path / "digits_tokenizer" / "checkpoints"
    (folder / "last.ckpt").rename(folder / "previous.ckpt")
    with pytest.raises(
        UserError, match=r"^ckpt_path=auto: there is no .*last\.ckpt.*: resume with ckpt_path=previous$"
    ):
        checkpoint_to_resume(config("ckpt_path=auto", "trainer.max_steps=200"))
    assert checkpoint_to_resume(config("ckpt_path=previous", "trainer.max_steps=200")).step == 100
    data = (folder / "previous.ckpt").read_bytes()
    place = data.index(b"RefinerModule") if b"RefinerModule" in data else data.index(b"TokenizerModule")
    (folder / "last.ckpt").write_bytes(data[:place] + b"t" + data[place + 1 :])
    for wanted in ("last", "auto"):
        with pytest.raises(UserError, match=r"last\.ckpt is damaged .*: ckpt_path=previous or ckpt_path=best$"):
            checkpoint_to_resume(config(f"ckpt_path={wanted}", "trainer.max_steps=200"))


def test_a_last_that_leads_nowhere_is_told(config, tmp_path):
    last = tmp_path / "digits_tokenizer" / "checkpoints" / "last.ckpt"
    last.unlink()
    last.symlink_to(tmp_path / "scratch" / "x.ckpt")
    for wanted in ("last", "auto"):
        with pytest.raises(UserError, match=rf"^ckpt_path={wanted}: .*last\.ckpt is a link to .*x\.ckpt, which is not"):
            checkpoint_to_resume(config(f"ckpt_path={wanted}", "trainer.max_steps=200"))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            "callbacks.ema.decays=[0.99,0.9]",
            r"callbacks\.ema\.decays=\[0\.99, 0\.9\]: .* holds no average of 0\.9, only of 0\.99",
        ),
        ("model.weights=x.ckpt", r"model\.weights=x\.ckpt has no effect with ckpt_path=last"),
        ("+text_encoder.weights=x", r"text_encoder\.weights=x has no effect with ckpt_path=last"),
        ("data.seed=5", r"was trained with data\.seed=0, this run has data\.seed=5"),
        ("+data.parts={images:{}}", r"was trained on data\.parts=\[\], this run has data\.parts=\['images'\]"),
    ],
)
def test_what_could_not_take_effect_is_refused_by_name(config, overrides, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        checkpoint_to_resume(config("ckpt_path=last", "trainer.max_steps=200", *overrides.split()))
    assert "\n" not in str(error.value)


def test_a_frozen_text_encoder_is_read_from_anywhere_again(config):
    """Its weights stand in no checkpoint."""
    given = config(
        "ckpt_path=last", "trainer.max_steps=200", "+text_encoder={path: google/umt5-xxl, weights: moved.pth}"
    )
    assert checkpoint_to_resume(given).step == 100


def test_a_run_from_before_a_key_of_the_model_goes_on_with_its_default(config, tmp_path):
    path = tmp_path / "digits_tokenizer" / "checkpoints" / "last.ckpt"
    contents = torch.load(path, weights_only=True)
    assert contents["config"]["model"].pop("rounds") == 4
    torch.save(contents, path)
    assert checkpoint_to_resume(config("ckpt_path=last", "trainer.max_steps=200")).step == 100
    with pytest.raises(UserError, match=r"was trained with model\.rounds=4, this run has model\.rounds=3"):
        checkpoint_to_resume(config("ckpt_path=last", "trainer.max_steps=200", "model.rounds=3"))


def test_a_milestone_without_optimiser_state_is_not_gone_on_from(config, tmp_path):
    folder = tmp_path / "digits_tokenizer" / "checkpoints"
    contents = torch.load(folder / "last.ckpt", weights_only=True)
    del contents["lr_schedulers"]
    torch.save(contents, folder / "step_00000100.ckpt")
    with pytest.raises(UserError, match=r"step_00000100\.ckpt has no optimizer state .*give another one"):
        checkpoint_to_resume(config(f"ckpt_path={folder}/step_00000100.ckpt", "trainer.max_steps=200"))
    with pytest.raises(UserError, match=r"overwrite=true leaves milestones where they are: remove .*step_00000100"):
        checkpoint_to_resume(config("overwrite=true", "trainer.max_steps=200"))


def test_another_tokenizer_is_refused():
    def of(sha256):
        return {"tokenizer": {"sha256": sha256, "path": f"{sha256}.ckpt"}}

    earlier = Checkpoint(Path("last.ckpt"), OmegaConf.create(), of("a"))
    check_tokenizer(earlier, of("a"))
    check_tokenizer(Checkpoint(Path("last.ckpt"), OmegaConf.create(), {}), {"config": {}})  # of a tokenizer itself
    with pytest.raises(UserError, match=r"^tokenizer\.ckpt=b\.ckpt is not the tokenizer of last\.ckpt \(a\.ckpt\)"):
        check_tokenizer(earlier, of("b"))
