"""Which checkpoint a run folder means."""

import pytest
import torch

from grn.checkpoints.native import find_checkpoint, read_checkpoint
from grn.runtime.errors import UserError


def write(folder, kind, *names):
    (folder / "checkpoints").mkdir(parents=True)
    for name in names:
        model = {"_target_": "grn.networks.tokenizer.HBQTokenizer"}
        config = {"training": {"_target_": f"grn.training.{kind}"}, "model": model, "name": name}
        torch.save({"state_dict": {}, "global_step": 1, "config": config}, folder / "checkpoints" / f"{name}.ckpt")
    return folder


@pytest.mark.parametrize(
    ("kind", "meant"), [("RefinerModule", "last"), ("TextRefinerModule", "last"), ("TokenizerModule", "best")]
)
def test_a_run_folder_means_the_last_of_a_refiner_and_the_best_of_a_tokenizer(tmp_path, kind, meant):
    both = write(tmp_path / "both", kind, "last", "best", "step_00000001")
    assert find_checkpoint(both).stem == meant
    assert read_checkpoint(both).config.name == meant
    for name in ("last", "best", "step_00000001"):  # told otherwise
        assert read_checkpoint(both / "checkpoints" / f"{name}.ckpt").config.name == name
    for name in ("last", "best"):
        assert find_checkpoint(write(tmp_path / name, kind, name)).stem == name


def test_a_damaged_last_is_not_passed_over(tmp_path):
    run = write(tmp_path / "run", "RefinerModule", "last", "best")
    (run / "checkpoints" / "last.ckpt").write_bytes(b"half")
    with pytest.raises(UserError, match=r"^ckpt: .*last\.ckpt cannot be read as a checkpoint"):
        find_checkpoint(run)


@pytest.mark.parametrize("kind", ["RefinerModule", "TokenizerModule"])
@pytest.mark.parametrize("name", ["last", "best"])
def test_a_link_to_nothing_is_not_passed_over(tmp_path, kind, name):
    run = write(tmp_path / "run", kind, *{"last", "best"} - {name})
    link = run / "checkpoints" / f"{name}.ckpt"
    link.symlink_to(tmp_path / "gone.ckpt")
    for place in (run, link):
        with pytest.raises(UserError, match=rf"^tokenizer\.ckpt: {link} is a link to .*gone\.ckpt, which is not there"):
            find_checkpoint(place, key="tokenizer.ckpt")
