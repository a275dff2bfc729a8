"""Mistakes that commands find before they start."""

import errno
import subprocess
import sys

import pytest

from grn import train
from grn.cli import entry_point


def line_of(monkeypatch, main, *arguments):
    """What a command ends with on stderr."""
    monkeypatch.setattr(sys, "argv", ["grn.train", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert isinstance(exit.value.code, str)
    assert "\n" not in exit.value.code
    return exit.value.code


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model.depth=2", "model.depth=3"),
        ("+data.extra=1", "data.extra=2"),
        ("cluster=cpu", "cluster=ddp"),
        ("ckpt_path=a=b", "++ckpt_path=a=c"),
    ],
)
def test_a_key_that_is_set_twice(monkeypatch, first, second):
    line = line_of(monkeypatch, train.main, "+experiment=digits_c2i", first, "seed=1", second)
    assert line.endswith(f" is set twice, by {first} and by {second}: leave one out")


def test_a_full_disk_under_any_file(monkeypatch, tmp_path):
    @entry_point("train")
    def main(config):
        raise OSError(errno.ENOSPC, "No space left on device")

    line = line_of(monkeypatch, main, f"hydra.run.dir={tmp_path}/run")
    assert line.startswith(f"error: {tmp_path}/run: no space is left on its disk")


def test_slurm_without_the_extra(tmp_path):
    """What a missing package means is said, not the plugin's name; in a process of its own, since Hydra looks once."""
    launcher = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"
    arguments = ["grn.train", "cluster=slurm_1x8", f"paths.runs={tmp_path}"]
    code = f"import sys; sys.modules['{launcher}'] = None; sys.argv = {arguments}; from grn import train; train.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    expected = "error: cluster=slurm... submits by hydra-submitit-launcher: pip install 'grn[cluster]'\n"
    assert (done.returncode, done.stderr) == (1, expected)
