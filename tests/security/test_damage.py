"""A checkpoint that is not what was written is neither gone on from nor exported; `last` has one before it."""

import contextlib
import os
import shutil
import zipfile

import pytest
import torch
from checkpoints import contents, saved

from grn.checkpoints.native import read_checkpoint
from grn.checkpoints.sharded import verify
from grn.runtime.errors import UserError
from grn.training.checkpoint_io import CheckpointIO
from grn.weights.integrity import keep_previous
from grn.weights.reading import read_untrusted


def flipped(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_bit_of_any_tensor_is_found(tmp_path):
    run = saved(tmp_path)
    path = run / "checkpoints" / "last.ckpt"
    sound = path.read_bytes()
    shutil.copy(path, path.with_name("best.ckpt"))
    with zipfile.ZipFile(path) as archive:
        parts = [archive.read(entry) for entry in archive.infolist() if entry.file_size > 8]
    tried = 0
    for part in parts:
        path.write_bytes(sound)
        flipped(path, sound.find(part) + len(part) // 2)
        with pytest.raises(UserError, match=r"^ckpt_path: .*last\.ckpt is damaged \(.*\); .*ckpt_path=best"):
            verify(path, key="ckpt_path")
        with pytest.raises(UserError, match=r"^ckpt: .*last\.ckpt is damaged \(.*\); .*ckpt=.*best\.ckpt"):
            read_checkpoint(path)
        tried += 1
    assert tried > 20
    path.write_bytes(sound[:-100])
    with pytest.raises(UserError, match=r"is damaged \(File is not a zip file\)"):
        verify(path, key="ckpt_path")
    path.write_bytes(sound)
    verify(path, key="ckpt_path")


def test_what_unpacks_to_more_than_the_file_is_not_read(tmp_path):
    """A gigabyte of zeros packs into a megabyte."""
    path = saved(tmp_path) / "checkpoints" / "last.ckpt"
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match="a part of it is compressed"):
        read_untrusted(path, "x")


def test_last_keeps_the_one_before_it(tmp_path):
    path, io = tmp_path / "last.ckpt", CheckpointIO()
    for step in range(3):
        io.save_checkpoint({"step": step}, path)
        found = {name: torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("last", "previous") if
                 (tmp_path / f"{name}.ckpt").exists()}  # fmt: skip
        assert found == {"last": {"step": step}} | ({"previous": {"step": step - 1}} if step else {})
    io.save_checkpoint({"step": 0}, tmp_path / "best.ckpt")
    io.save_checkpoint({"step": 1}, tmp_path / "best.ckpt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_killed_at_any_moment_there_is_a_last(tmp_path, monkeypatch):
    """Every rename and link is one moment; what comes after it does not happen."""
    for moment in range(6):
        folder = tmp_path / str(moment)
        path, io = folder / "last.ckpt", CheckpointIO()
        for step in range(2):
            io.save_checkpoint({"step": step}, path)
        calls = []

        def killed(real, calls=calls, moment=moment):
            def call(*arguments):
                calls.append(real)
                if len(calls) > moment:
                    raise KeyboardInterrupt
                return real(*arguments)

            return call

        with monkeypatch.context() as patched:
            for name in ("link", "replace"):
                patched.setattr(os, name, killed(getattr(os, name)))
            with contextlib.suppress(KeyboardInterrupt):
                io.save_checkpoint({"step": 2}, path)
        assert torch.load(path, weights_only=True)["step"] in (1, 2)
    assert len(calls) == 4


def test_a_file_system_without_links_keeps_one(tmp_path, monkeypatch, caplog):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    path = saved(tmp_path) / "checkpoints" / "last.ckpt"
    keep_previous(path)
    assert "the one before it is not kept (Operation not permitted)" in caplog.text
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    assert contents()["global_step"] == read_checkpoint(path).step
