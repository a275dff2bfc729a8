"""Writing: plain webdataset shards, whole or not at all, the same bytes every time, by however many processes."""

import hashlib
import io
import json
import os
import time
from pathlib import Path

import commands
import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from grn.data.manifest import read_manifest
from grn.data.prepare.shards import Rejected, shard_paths, write_shards
from grn.data.stream.streaming import ShardStream, resolve_urls
from grn.media.skips import Reason
from grn.runtime.errors import UserError
from grn.toys.digits import LABEL_NAMES, DigitsSource, render


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "digits"
    assert DigitsSource().write(root)
    return root


def read_plainly(root, split):
    urls = [str(path) for path in sorted(root.glob(f"{split}-*.tar"))]
    return list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))


class Few:
    """Writes numbers; negative ones are rejected, and some go wrong. Counts its shards by files in `log`."""

    def __init__(self, log=None):
        self.log = log

    def __call__(self, numbers):
        for number in numbers:
            if number == "crash":
                raise KeyboardInterrupt
            if number == "mistake":
                raise UserError("data.root: no such thing")
            if number == "full":
                raise OSError(28, "No space left on device")
            if number < 0:
                yield Rejected(f"number {number}", Reason.BAD_LABEL.value if number % 2 else Reason.NO_LABEL.value)
                continue
            yield {"__key__": f"{number}", "png": b"x" * number, "cls": str(number), "txt": f"number {number}"}
        if self.log is not None:
            (self.log / f"{'-'.join(map(str, numbers))}").touch(exist_ok=False)


def write(root, **changes):
    arguments = {
        "name": "few",
        "parameters": {"a": 1},
        "shards": {"train": [(0, 2, 4), (1, 3, 5)], "val": [(0, 1, 2)]},
        "write": Few(),
        "facts": {"image_size": 8},
    }
    return write_shards(root, **(arguments | changes))


def contents(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_digits_are_plain_webdataset_stratified_and_disjoint(digits):
    train, val = read_plainly(digits, "train"), read_plainly(digits, "val")
    assert (len(train), len(val)) == (1500, 297)
    assert len({sample["__key__"] for sample in train + val}) == 1797
    for samples in (train, val):
        counts = np.bincount([int(sample["cls"]) for sample in samples], minlength=10)
        whole = np.bincount([int(sample["cls"]) for sample in train + val], minlength=10)
        assert np.abs(counts - whole * len(samples) / 1797).max() < 1
    for sample in val:
        assert sample["txt"].decode() == f"a handwritten {LABEL_NAMES[int(sample['cls'])]}"
        image = Image.open(io.BytesIO(sample["png"]))
        assert (image.mode, image.size, image.format) == ("RGB", (32, 32), "PNG")
    assert len(list(digits.glob("train-*.tar"))) == 10
    assert len(list(digits.glob("val-*.tar"))) == 4


def test_digits_render_spans_the_range_and_keeps_the_picture():
    digit = np.zeros((8, 8))
    digit[2:6, 2:6] = 16
    image = np.asarray(Image.open(io.BytesIO(render(digit, 32))))
    assert image.shape == (32, 32, 3)
    assert (image[..., 0] == image[..., 2]).all()
    assert image[16, 16, 0] == 255
    assert image[0, 0, 0] == 0


def test_manifest_tells_what_lies_there(digits):
    manifest = read_manifest(digits)
    assert manifest["label_names"] == list(LABEL_NAMES)
    assert (manifest["num_labels"], manifest["image_size"]) == (10, 32)
    for split, samples in (("train", 1500), ("val", 297)):
        shards = manifest["splits"][split]["shards"]
        assert sum(shard["samples"] for shard in shards) == manifest["splits"][split]["samples"] == samples
        for shard in shards:
            data = (digits / shard["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert shard_paths(digits, manifest, split) == [str(digits / shard["name"]) for shard in shards]


def test_bytes_are_the_same_twice(digits, tmp_path):
    DigitsSource().write(tmp_path / "again")
    names = sorted(path.name for path in digits.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((digits / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_other_seed_splits_otherwise(digits, tmp_path):
    DigitsSource(seed=1).write(tmp_path / "other")
    keys = [{sample["__key__"] for sample in read_plainly(root, "val")} for root in (digits, tmp_path / "other")]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("keys", [{"val": 3}, {"val": 1797}, {"image_size": 0}, {"train_shards": 0}])
def test_digits_keys_out_of_range(tmp_path, keys):
    with pytest.raises(UserError, match="source"):
        DigitsSource(**keys).write(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_writing_again_does_nothing(tmp_path, caplog):
    caplog.set_level("INFO")
    assert write(tmp_path / "d")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}
    assert not write(tmp_path / "d")
    assert "up to date" in caplog.text
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}


def test_other_parameters_need_overwrite(tmp_path):
    root = tmp_path / "d"
    write(root)
    with pytest.raises(UserError, match=r"data\.root=.* a=1, not 2: .*overwrite=true"):
        write(root, parameters={"a": 2})
    assert read_manifest(root)["parameters"] == {"a": 1}
    assert write(root, parameters={"a": 2}, shards={"train": [(0, 1)], "val": [(2,)]}, overwrite=True)
    assert read_manifest(root)["parameters"] == {"a": 2}
    assert {path.name for path in root.iterdir()} == {"manifest.json", "train-000000.tar", "val-000000.tar"}
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_damaged_shards_are_told_and_mended_by_overwrite(tmp_path):
    root = tmp_path / "d"
    write(root)
    shard = root / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-000001\.tar has .*overwrite=true"):
        write(root)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar is missing.*overwrite=true"):
        write(root)
    assert write(root, overwrite=True)
    assert not write(root)


CRASHING = {"train": [(0, 2, 4), ("crash",), (6,)], "val": [(0, 1, 2)]}
ROUGH = {"train": [(0, -1, 2), (-2, -4), (1, 3)], "val": [(5, -3)]}


def test_a_crash_leaves_root_alone_and_what_is_finished(tmp_path):
    root, partial = tmp_path / "d", tmp_path / ".d.partial"
    with pytest.raises(KeyboardInterrupt):
        write(root, shards=CRASHING)
    assert list(tmp_path.iterdir()) == [partial]
    assert [path.name for path in (partial / "shards").iterdir()] == ["train-000000.tar"]
    write(root, overwrite=True)
    kept = contents(root)
    with pytest.raises(KeyboardInterrupt):
        write(root, shards=CRASHING, parameters={"a": 2}, overwrite=True)
    assert contents(root) == kept
    assert {path.name for path in tmp_path.iterdir()} == {"d", ".d.partial"}


def interrupted(root, log, **changes):
    """The first of three shards is written, then something kills the run."""
    shards = {"train": [(0, 2, 4), (1, 3, 5)], "val": [(0, 1, 2)]}

    class Killed(Few):
        def __call__(self, numbers):
            if numbers != (0, 2, 4):
                raise KeyboardInterrupt
            yield from super().__call__(numbers)

    with pytest.raises(KeyboardInterrupt):
        write(root, shards=shards, write=Killed(log), **changes)


def test_a_killed_run_writes_only_what_is_missing(tmp_path, caplog):
    caplog.set_level("INFO")
    (log := tmp_path / "log").mkdir()
    interrupted(tmp_path / "d", log)
    done = tmp_path / ".d.partial" / "shards" / "train-000000.tar"
    before = done.stat().st_mtime_ns
    (done.parent / ".train-000001.tar.abc").mkdir()  # as SIGKILL leaves it
    assert write(tmp_path / "d", write=Few(log))
    assert "1 of 3 shards are written already" in caplog.text
    assert (tmp_path / "d" / done.name).stat().st_mtime_ns == before
    assert sorted(path.name for path in log.iterdir()) == ["0-1-2", "0-2-4", "1-3-5"]
    assert {path.name for path in tmp_path.iterdir()} == {"d", "log"}
    write(tmp_path / "whole")
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["tar cut", "tar gone", "record gone", "record cut", "record of another kind"])
def test_what_is_damaged_is_written_again(tmp_path, damage):
    (log := tmp_path / "log").mkdir()
    interrupted(tmp_path / "d", log)
    partial = tmp_path / ".d.partial"
    tar, record = partial / "shards" / "train-000000.tar", partial / "train-000000.json"
    {
        "tar cut": lambda: tar.write_bytes(tar.read_bytes()[:-1]),
        "tar gone": tar.unlink,
        "record gone": record.unlink,
        "record cut": lambda: record.write_text(record.read_text()[:20]),
        "record of another kind": lambda: record.write_text("[1]"),
    }[damage]()
    (log / "0-2-4").unlink()
    write(tmp_path / "d", write=Few(log))
    assert (log / "0-2-4").exists()
    write(tmp_path / "whole")
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters": {"a": 2}}, "a=1, not 2"),
        ({"name": "others"}, "name=few, not others"),
        ({"facts": {"image_size": 16}}, "image_size=8, not 16"),
        ({"shards": {"train": [(0, 2, 4), (1, 3, 7)], "val": [(0, 1, 2)]}}, "shards=3 of digest"),
    ],
)
def test_a_beginning_of_other_arguments_needs_overwrite(tmp_path, changes, said):
    (log := tmp_path / "log").mkdir()
    interrupted(tmp_path / "d", log)
    with pytest.raises(UserError, match=rf"\.d\.partial holds a partial data set made with {said}.*overwrite=true"):
        write(tmp_path / "d", **changes)
    assert (tmp_path / ".d.partial" / "shards" / "train-000000.tar").exists()
    (log / "0-2-4").unlink()
    assert write(tmp_path / "d", **changes, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"d", "log"}


def test_overwrite_starts_afresh(tmp_path):
    (log := tmp_path / "log").mkdir()
    interrupted(tmp_path / "d", log)
    (log / "0-2-4").unlink()
    write(tmp_path / "d", write=Few(log), overwrite=True)
    assert (log / "0-2-4").exists()


def test_a_partial_folder_that_is_not_ours_is_left_alone(tmp_path):
    partial = tmp_path / ".d.partial"
    for text in (None, "", "[]", '{"name": "few", "parameters": 3, "facts": {}, "shards": ""}'):
        partial.mkdir(exist_ok=True)
        (partial / "thesis.txt").write_text("years of work")
        if text is not None:
            (partial / "identity.json").write_text(text)
        for overwrite in (False, True):
            with pytest.raises(UserError, match=r"\.d\.partial exists and was not written by GRN: remove it"):
                write(tmp_path / "d", overwrite=overwrite)
    assert (partial / "thesis.txt").read_text() == "years of work"


@pytest.mark.full
def test_workers_write_the_same_bytes(tmp_path):
    assert write(tmp_path / "alone", shards=ROUGH)
    assert write(tmp_path / "workers", shards=ROUGH, num_workers=2)
    assert contents(tmp_path / "alone") == contents(tmp_path / "workers")


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("trouble", "said"),
    [("mistake", "^data.root: no such thing$"), ("full", "train-000001.tar: no space is left.*again")],
)
def test_trouble_is_one_line_and_what_is_finished_stays(tmp_path, num_workers, trouble, said):
    shards = {"train": [(0, 2, 4), (1, trouble)], "val": [(0, 1, 2)]}
    with pytest.raises(UserError, match=said):
        write(tmp_path / "d", shards=shards, num_workers=num_workers)
    names = {path.name for path in (tmp_path / ".d.partial" / "shards").iterdir()}
    assert "train-000000.tar" in names
    assert "train-000001.tar" not in names


def test_rejected_samples_are_listed_counted_and_told(tmp_path, caplog):
    caplog.set_level("INFO")
    root = tmp_path / "d"
    assert write(root, shards=ROUGH)
    lines = [json.loads(line) for line in (root / "rejected.jsonl").read_text().splitlines()]
    assert lines == [
        {"split": "train", "shard": "train-000000.tar", "item": "number -1", "reason": "label is not an integer"},
        {"split": "train", "shard": "train-000001.tar", "item": "number -2", "reason": "no label"},
        {"split": "train", "shard": "train-000001.tar", "item": "number -4", "reason": "no label"},
        {"split": "val", "shard": "val-000000.tar", "item": "number -3", "reason": "label is not an integer"},
    ]
    splits = read_manifest(root)["splits"]
    assert {name: (split["samples"], split["rejected"]) for name, split in splits.items()} == {
        "train": (4, 3),
        "val": (1, 1),
    }
    assert "rejected 4 (label is not an integer: 2, no label: 2)" in caplog.text


def test_a_shard_without_usable_samples_has_no_tar_and_breaks_no_reader(tmp_path):
    root = tmp_path / "d"
    write(root, shards=ROUGH)
    paths = shard_paths(root, read_manifest(root), "train")
    assert [Path(path).name for path in paths] == ["train-000000.tar", "train-000002.tar"]
    assert sorted(root.glob("*.tar")) == [*map(Path, paths), root / "val-000000.tar"]
    urls = resolve_urls(f"{root}/train-*.tar", key="data.train", remedy="")
    keys = [raw["__key__"] for raw in ShardStream(urls, lambda raw, _: raw)]
    assert keys == ["0", "2", "1", "3"]
    assert not write(root, shards=ROUGH)


def test_a_split_without_usable_samples_is_refused_and_tried_again(tmp_path):
    shards = {"train": [(0, 1)], "val": [(-1, -2), (-3,)]}
    for _ in range(2):
        with pytest.raises(UserError, match=r"val split .*\(label is not an integer: 2, no label: 1\)"):
            write(tmp_path / "d", shards=shards)
    assert not (tmp_path / "d").exists()

    class Mended(Few):
        def __call__(self, numbers):
            return super().__call__([abs(number) for number in numbers])

    assert write(tmp_path / "d", shards=shards, write=Mended())
    assert [sample["cls"] for sample in read_plainly(tmp_path / "d", "val")] == [b"1", b"2", b"3"]


def test_ranks_share_the_work_and_the_last_one_publishes(tmp_path, caplog):
    caplog.set_level("INFO")
    (log := tmp_path / "log").mkdir()
    root = tmp_path / "d"
    assert write(root, write=Few(log), rank=1, world_size=2)
    assert not root.exists()
    assert [path.name for path in log.iterdir()] == ["1-3-5"]
    assert "rank 1 is done; 2 of 3 shards are still with the others" in caplog.text
    assert write(root, write=Few(log), rank=0, world_size=2)
    assert not write(root, write=Few(log), rank=1, world_size=2)
    write(tmp_path / "alone")
    assert contents(root) == contents(tmp_path / "alone")
    assert {path.name for path in tmp_path.iterdir()} == {"d", "alone", "log"}


def test_ranks_overwrite_together(tmp_path):
    """Whoever comes later must not undo what the other has just written."""
    root, arguments = tmp_path / "d", {"parameters": {"a": 2}, "overwrite": True, "world_size": 2}
    write(root)
    (log := tmp_path / "log").mkdir()
    interrupted(root, log, parameters={"a": 3}, overwrite=True)
    (log / "0-2-4").unlink()
    assert write(root, write=Few(log), rank=0, **arguments)
    assert read_manifest(root)["parameters"] == {"a": 1}
    assert write(root, write=Few(log), rank=1, **arguments)
    assert read_manifest(root)["parameters"] == {"a": 2}
    assert not write(root, write=Few(log), rank=0, **arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"d", "log"}


def write_as_rank(rank, folder, trials, shards):
    for trial in range(trials):
        assert write(folder / f"{trial}", shards=shards, rank=rank, world_size=2)
        while not (folder / f"{trial}").is_dir():  # so that the next trial starts at the same time
            time.sleep(0.001)


@pytest.mark.slow
def test_ranks_at_the_same_time(tmp_path):
    """Every shard is finished as both look, and one of them publishes."""
    shards = {"train": [(i, i + 1) for i in range(40)], "val": [(0,)]}
    commands.spawn(write_as_rank, (tmp_path, 5, shards), nprocs=2)
    write(tmp_path / "alone", shards=shards)
    assert contents(tmp_path / "0") == contents(tmp_path / "alone")
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2", "3", "4", "alone"}


def test_a_publication_that_lost_the_race_is_fine(tmp_path, monkeypatch):
    root, replace = tmp_path / "d", os.replace

    def late(source, target):
        if Path(target).name == "complete":  # the other process does all of it just before
            monkeypatch.setattr("grn.data.prepare.shards.os.replace", replace)
            assert write(root, rank=1, world_size=2)
        replace(source, target)

    write(root, rank=1, world_size=2)
    monkeypatch.setattr("grn.data.prepare.shards.os.replace", late)
    assert write(root, rank=0, world_size=2)
    write(tmp_path / "alone")
    assert contents(root) == contents(tmp_path / "alone")
    assert {path.name for path in tmp_path.iterdir()} == {"d", "alone"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"shards": {"train": [(1,)], "val": []}}, "val split has no samples"),
    ],
)
def test_arguments_out_of_range(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        write(tmp_path / "d", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["old", "root"])
def test_a_failed_move_brings_the_old_data_back_and_the_next_call_the_new(tmp_path, monkeypatch, moment):
    root, replace = tmp_path / "d", os.replace
    write(root)

    def failing(source, target):
        if Path(target).name == "old" and moment == "old":
            raise OSError("disk gone")
        if Path(source).name == "complete":
            raise OSError("disk gone")
        replace(source, target)

    monkeypatch.setattr("grn.data.prepare.shards.os.replace", failing)
    with pytest.raises(OSError, match="disk gone"):
        write(root, parameters={"a": 2}, overwrite=True)
    assert read_manifest(root)["parameters"] == {"a": 1}
    monkeypatch.undo()
    (log := tmp_path / "log").mkdir()
    assert write(root, parameters={"a": 2}, write=Few(log), overwrite=True, rank=0, world_size=2) is True
    assert [*log.iterdir()] == []
    assert read_manifest(root)["parameters"] == {"a": 2}


def test_never_replaces_what_it_did_not_write(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("mine", "file"):
        with pytest.raises(UserError, match=r"data\.root="):
            write(tmp_path / name, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert write(tmp_path / "empty")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 1, "splits": {}}',
        '{"format": 99}',
        "\xff",
        '{"format": 1, "splits": {"train": {"samples": 1, "shards": [{"name": "../x.tar", "bytes": 1}]}}}',
        '{"format": 1, "splits": {"train": {"samples": 1, "shards": [{"name": "x.tar", "bytes": "1"}]}}}',
        '{"format": 1, "splits": {}, "name": "x", "parameters": [], "num_labels": null, "label_names": null}',
    ],
)
def test_hostile_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_manifest_is_json_with_a_format(tmp_path):
    write(tmp_path / "d")
    assert json.loads((tmp_path / "d" / "manifest.json").read_text())["format"] == 1
    assert read_manifest(tmp_path) is None
