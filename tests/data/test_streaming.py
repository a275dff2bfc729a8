"""One pass over shards and its shares, and what is done with shards that are not what they should be."""

import bz2
import gzip
import io
import logging
import lzma
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
from tars import write_tar
from torch.utils.data import DataLoader

from grn.data.images import ImageShardsDataModule
from grn.data.prepare.shards import shard_paths
from grn.data.stream.streaming import (
    MAX_ENTRY_BYTES,
    LoadingStopped,
    ShardStream,
    check_foreign_urls,
    read_shard,
    resolve_urls,
)
from grn.media.skips import Reason, Skip
from grn.runtime.errors import UserError


@pytest.fixture
def shards(tmp_path):
    """Six shards of 3..8 samples (33 in all); every fifth sample is bad."""
    urls, number = [], 0
    for shard in range(6):
        entries = []
        for _ in range(3 + shard):
            entries.append((f"{number:03d}.cls", b"bad" if number % 5 == 0 else b"%d" % number))
            number += 1
        urls.append(write_tar(tmp_path / f"s-{shard}.tar", entries))
    return urls


ALL = {f"{i:03d}" for i in range(33)}
GOOD = {key for key in ALL if int(key) % 5}


def decode(raw, number):
    if raw["cls"] == b"bad":
        raise Skip(Reason.BAD_LABEL)
    return raw["__key__"], number


def stream(urls, **arguments):
    return ShardStream(urls, decode, **arguments)


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr("grn.data.stream.streaming.rank_and_world_size", lambda: (rank, world_size))


def test_a_pass_keeps_the_order_of_the_shards_and_starts_over(shards):
    once = stream(shards)
    next(iter(once))
    assert [key for key, _ in once] == sorted(GOOD)
    assert [key for key, _ in once] == sorted(GOOD)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 2), (4, 2), (7, 2)])
def test_evaluation_shares_cover_a_pass_once_even_with_more_readers_than_shards(
    shards, monkeypatch, world_size, workers
):
    seen = Counter()
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        batches = DataLoader(stream(shards, num_workers=workers), 3, num_workers=workers, collate_fn=list)
        seen.update(key for batch in batches for key, _ in batch)
    assert seen == Counter(GOOD)


def test_every_rank_reads_everything_where_asked(shards, monkeypatch):
    as_rank(monkeypatch, 1, 2)
    assert [key for key, _ in stream(shards, split_by_rank=False)] == sorted(GOOD)


def test_skipped_samples_are_counted_across_workers_and_logged_once(shards, caplog):
    once = DataLoader(stream(shards, num_workers=2), 3, num_workers=2, collate_fn=list)
    assert sum(len(batch) for batch in once) == len(GOOD)
    assert once.dataset.skipped() == {"label is not an integer": len(ALL) - len(GOOD)}

    caplog.set_level(logging.WARNING)
    alone = stream(shards)
    list(alone)
    assert alone.skipped() == once.dataset.skipped()
    [message] = [record.getMessage() for record in caplog.records]
    assert "'000'" in message
    assert shards[0] in message


def keys_of(url, limits=MAX_ENTRY_BYTES):
    keys = []
    try:
        for raw in read_shard(url, limits):
            keys.append(raw["__key__"])
    except (tarfile.ReadError, OSError, EOFError):
        return keys, "broken"
    return keys, "whole"


def test_shard_cut_anywhere_is_noticed_and_gives_only_whole_samples(tmp_path):
    entries = [(f"{i}.{suffix}", bytes([65 + i]) * 700) for i in range(4) for suffix in ("cls", "png")]
    path = write_tar(tmp_path / "whole.tar", entries)
    data = Path(path).read_bytes()
    assert keys_of(path) == (["0", "1", "2", "3"], "whole")
    size = 2 * (512 + 1024)  # of a sample
    for cut in [1, 511, 512, 513, 1300, size, size + 1, 2 * size - 1, 2 * size, 3 * size + 700, 4 * size]:
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        keys, state = keys_of(str(tmp_path / "cut.tar"))
        assert state == "broken", cut
        # The sample before a cut header is held back as well: whether it was whole cannot be known.
        assert keys in (["0", "1", "2", "3"][: cut // size], ["0", "1", "2", "3"][: max(0, cut // size - 1)])


def test_damaged_header_in_the_middle_is_not_the_end(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"{i}.cls", b"1") for i in range(4)])
    data = bytearray(Path(path).read_bytes())
    data[2 * 1024 : 2 * 1024 + 512] = b"\x55" * 512
    (tmp_path / "x.tar").write_bytes(data)
    assert keys_of(path) == (["0"], "broken")


def test_the_stream_goes_on_with_the_next_shard(tmp_path, shards):
    data = Path(shards[2]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:1500])
    (tmp_path / "garbage.tar").write_bytes(b"this is no tar" * 100)
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(data)[:40])
    broken = [str(tmp_path / name) for name in ("cut.tar", "garbage.tar", "cut.tar.gz", "missing.tar")]
    urls = [shards[0], *broken, shards[1]]
    once = stream(urls)
    assert [key for key, _ in once] == ["001", "002", "003", "004", "006"]
    assert once.skipped()["shard broken or truncated"] == 4


def test_large_and_repeated_and_foreign_entries(tmp_path):
    entries = [
        ("a.png", b"x" * 2000),
        ("a.cls", b"1"),
        ("b.cls", b"1"),
        ("b.cls", b"2"),
        ("c.mp4", b"x" * 5000),
        ("c.CLS", b"3"),
        ("README", b"no sample"),
        ("\udcff.cls", b"4"),
    ]
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        folder = tarfile.TarInfo("d.cls")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("e.cls")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    samples = {raw["__key__"]: raw for raw in read_shard(str(tmp_path / "x.tar"), {"png": 1000, "cls": 10})}
    assert samples.keys() == {"a", "b", "c", "\ufffd"}
    assert samples["a"]["png"] is Reason.OVERSIZE_ENTRY
    assert samples["a"]["cls"] == b"1"
    assert samples["b"]["cls"] is Reason.DUPLICATE_ENTRY
    assert (samples["c"]["mp4"], samples["c"]["cls"]) == (b"", b"3")


def test_gzip_and_pipe(tmp_path, shards):
    packed = tmp_path / "s.tar.gz"
    packed.write_bytes(gzip.compress(Path(shards[0]).read_bytes()))
    plain = list(read_shard(shards[0], MAX_ENTRY_BYTES))
    for url in (str(packed), f"pipe:cat {shards[0]}", f"file://{shards[0]}"):
        samples = list(read_shard(url, MAX_ENTRY_BYTES))
        assert [raw | {"__url__": ""} for raw in samples] == [raw | {"__url__": ""} for raw in plain]


def test_a_failing_pipe_is_a_broken_shard(shards):
    once = stream(["pipe:exit 3", shards[0]])
    assert [key for key, _ in once] == ["001", "002"]
    assert once.skipped()["shard broken or truncated"] == 1


def test_urls(shards, tmp_path):
    def resolved(patterns):
        return resolve_urls(patterns, key="data.train", remedy="make them")

    assert resolved(f"{tmp_path}/s-{{0..5}}.tar") == shards
    assert resolved(f"{tmp_path}/s-*.tar") == shards
    assert resolved([f"{tmp_path}/s-[01].tar", shards[1], shards[5]]) == [shards[0], shards[1], shards[5]]
    assert resolved(f"file://{shards[0]}") == [shards[0]]
    odd = write_tar(tmp_path / "odd[1].tar", [])
    assert resolved(odd) == [odd]
    others = ["http://h/a.tar", "pipe:curl -s http://h/a.tar | cat", "memory://bucket/a*.tar"]
    assert resolved(others) == others
    assert resolved("https://h/{00..02}.tar") == ["https://h/00.tar", "https://h/01.tar", "https://h/02.tar"]


def test_urls_that_are_not_there(tmp_path):
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "folder.tar").mkdir()
    wrong = {"gone-*.tar": "no shards at", "gone.tar": "no shard at", "folder.tar": "no shard at"}
    for name, message in (wrong | {"empty.tar": "is empty"}).items():
        with pytest.raises(
            UserError, match=rf"^data\.train: .*{message}|^data\.train: the shard .*{message}"
        ) as caught:
            resolve_urls(str(tmp_path / name), key="data.train", remedy="make them")
        assert str(caught.value).endswith("; make them")
    with pytest.raises(UserError, match=r"^data\.train names no shards"):
        resolve_urls([], key="data.train", remedy="make them")
    with pytest.raises(UserError, match=r"^data\.train=.*[Uu]nbalanced"):
        resolve_urls("a{b.tar", key="data.train", remedy="make them")


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..999999999999}.tar",
        "{9..-1000000}.tar",
        "{0..9999}-{000..999..2}.tar",
        "{a,b}" * 40,
        "{0..1" + "0" * 5000 + "}",
    ],
)
def test_braces_that_stand_for_too_much(pattern):
    """Told at once: braceexpand would make them all."""
    with pytest.raises(UserError, match=r"^data\.train=.*(more than 1000000 shards|digits)") as told:
        resolve_urls(pattern, key="data.train", remedy="make them")
    assert len(str(told.value)) < 500
    with pytest.raises(UserError, match=r"^x\.json names shards .*(more than|digits).*give data\.train="):
        check_foreign_urls("x.json", {"data.train": pattern})


def test_a_file_is_no_command_whatever_it_is_called(tmp_path, monkeypatch):
    """Where the folder of the shards is the one at hand, their names begin the url."""
    monkeypatch.chdir(tmp_path)
    odd = write_tar("pipe:touch run-0.tar", [("a.cls", b"1")])
    write_tar("~nobody.tar", [("a.cls", b"2")])
    for pattern in (f"file://{odd}", "*run-0.tar", f"./{odd}"):
        assert resolve_urls(pattern, key="data.train", remedy="make them") == [str(tmp_path / odd)]
    named = {"splits": {"train": {"shards": [{"name": odd, "bytes": Path(odd).stat().st_size}]}}}
    root = Path("{pipe:touch run,x}")
    with pytest.raises(UserError, match=r"^data\.val: no shards at"):
        ImageShardsDataModule(name="x", batch_size=1, image_size=8, root=root).urls("val")
    for url in (*shard_paths(".", named, "train"), *resolve_urls("*.tar", key="data.train", remedy="make them")):
        assert len(list(read_shard(url, MAX_ENTRY_BYTES))) == 1
    assert not list(tmp_path.glob("run*"))


@pytest.mark.parametrize(
    "url", ["pipe:touch x", ["a.tar", "{pipe,x}:touch x"], "s3://bucket/{0..2}.tar", "gs://b/x", "hf://x/y", "PIPE://x"]
)
def test_commands_out_of_a_file_are_not_run(url, monkeypatch):
    with pytest.raises(
        UserError, match=r"^x\.json has shards read by a command.* give data\.train=\.\.\. here,"
    ) as told:
        check_foreign_urls("x.json", {"data.train": url, "data.val": None})
    assert "\n" not in str(told.value)
    monkeypatch.setenv("GRN_TRUST", f"mine,{str(told.value).rpartition('=')[2]}")  # as it says
    check_foreign_urls("x.json", {"data.train": url})


def test_paths_and_http_out_of_a_file_are_read():
    check_foreign_urls("x", {"a": None, "b": "/a/{0..3}.tar", "c": ["https://h/a.tar", "file:///x", "x:y.tar"]})
    for odd in ({"_target_": "x"}, [["pipe:x"]], 3, [None]):
        with pytest.raises(UserError, match=r"^x: no shards can be at .*give b=\.\.\."):
            check_foreign_urls("x", {"b": odd})


def test_entries_cannot_say_which_sample_they_are_of(tmp_path):
    entries = [("a.cls", b"1"), ("a.__key__", b"x"), ("a.__URL__", b"x"), ("b.__url__", b"x")]
    path = write_tar(tmp_path / "x.tar", entries)
    assert list(read_shard(path, MAX_ENTRY_BYTES)) == [{"__key__": "a", "__url__": path, "cls": b"1"}]


def test_a_command_that_falls_silent_is_not_waited_for(shards, monkeypatch):
    monkeypatch.setattr("grn.data.stream.tar.MAX_SILENCE", 1)
    start = time.monotonic()
    once = stream([f"pipe:cat {shards[0]}; exec sleep 1000", "pipe:exec sleep 1000", shards[1]])
    assert [key for key, _ in once] == ["001", "003", "004", "006"]  # whether 002 was whole is not known
    assert once.skipped()["shard broken or truncated"] == 2
    samples = read_shard(f"pipe:cat {shards[3]}; exec sleep 1000", MAX_ENTRY_BYTES)
    next(samples)
    samples.close()  # as where only the first samples are wanted
    assert time.monotonic() - start < 60


def test_reading_ends_soon_after_stop(shards):
    once = stream(shards)
    samples = iter(once)
    next(samples)
    once.stop(15)
    with pytest.raises(LoadingStopped):
        next(samples)


def parts(tmp_path, count=3):
    """Archives of three samples each, and the keys of them all."""
    paths = [write_tar(tmp_path / f"p{i}.tar", [(f"{i}{k}.cls", b"1") for k in range(3)]) for i in range(count)]
    return [Path(path).read_bytes() for path in paths], [f"{i}{k}" for i in range(count) for k in range(3)]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_archives_one_after_the_other_are_read_to_the_last(tmp_path, pack):
    data, keys = parts(tmp_path)
    (tmp_path / "c.tar").write_bytes(b"".join(map(pack, data)))
    assert keys_of(str(tmp_path / "c.tar")) == (keys, "whole")
    (tmp_path / "c.tar").write_bytes(pack(b"".join(data)))
    assert keys_of(str(tmp_path / "c.tar")) == (keys, "whole")


def test_an_archive_may_end_in_any_number_of_zeros(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.cls", b"1")])
    data = Path(path).read_bytes()[: 2 * 512]
    for zeros in (512, 700, 1024, 10_240, 2**20 + 7):
        (tmp_path / "x.tar").write_bytes(data + bytes(zeros))
        assert keys_of(path) == (["a"], "whole"), zeros
    (tmp_path / "x.tar").write_bytes(bytes(1024))
    assert keys_of(path) == ([], "whole")


@pytest.mark.parametrize("junk", [b"x", b"x" * 512, b"x" * 5000, None])
def test_what_follows_an_archive_and_is_none_is_named_with_its_place(tmp_path, caplog, junk):
    (first, second, _), keys = parts(tmp_path)
    path = tmp_path / "c.tar"
    path.write_bytes(first + (second[:1100] if junk is None else junk))  # None: cut in the second archive
    once = stream([str(path)])
    assert [key for key, _ in once] == keys[:3]
    assert once.skipped() == {"shard broken or truncated": 1}
    [message] = [record.getMessage() for record in caplog.records]
    assert str(path) in message
    if junk is None:  # the sample before the cut is held back, too
        assert f"at byte {len(first) + 1024}: unexpected end" in message
    else:
        assert f"behind the end of an archive, at byte {len(first)}: " in message


CLUTTER = ("{}/.DS_Store", "__MACOSX/{}", "a/__MACOSX/._{}", "{}/Thumbs.db", "{}/desktop.ini", "PaxHeader/{}",
           "PaxHeaders.123/{}", "a/@eaDir/{}")  # fmt: skip


def test_what_archivers_and_file_managers_add_is_passed_over(tmp_path):
    entries = []
    for key in ("a/x", "a/y", "z"):
        for suffix in ("png", "cls"):
            folder, _, name = f"{key}.{suffix}".rpartition("/")
            entries += [(f"{folder}/._{name}" if folder else f"._{name}", b"\0\5\x16\7" * 40)]
            entries += [(odd.format(f"{key}.{suffix}"), b"junk") for odd in CLUTTER]
            entries += [(f"{key}.{suffix}", b"1")]
    samples = list(read_shard(write_tar(tmp_path / "x.tar", entries), MAX_ENTRY_BYTES))
    assert [raw.pop("__key__") for raw in samples] == ["a/x", "a/y", "z"]
    assert all(raw.keys() == {"__url__", "png", "cls"} for raw in samples)


def test_what_a_decoder_raises_is_a_counted_skip(shards, caplog):
    def surprised(raw, number):
        if raw["cls"] == b"bad":
            raise AttributeError("no such thing")
        return raw["__key__"]

    once = ShardStream(shards, surprised)
    assert list(once) == sorted(GOOD)
    assert once.skipped() == {"sample cannot be decoded": len(ALL) - len(GOOD)}
    assert "sample cannot be decoded (AttributeError: no such thing)" in caplog.text
