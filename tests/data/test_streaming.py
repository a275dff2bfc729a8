"""The order of a stream, its shares, its resumption, and what it does with shards that are not what they should be."""

import gzip
import io
import logging
import multiprocessing
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from grn.data.samples import Reason, Skip
from grn.data.streaming import MAX_ENTRY_BYTES, ResumableLoader, ShardStream, read_shard, resolve_urls
from grn.errors import UserError


def write_tar(path, entries):
    with tarfile.open(path, "w") as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


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


def tolerant(raw, number):
    return raw["__key__"], number


def stream(urls, **arguments):
    arguments = {"decode": decode, "endless": True, "shuffle": True, "shuffle_buffer": 4, "seed": 0} | arguments
    return ShardStream(urls, arguments.pop("decode"), **arguments)


def loader(urls, workers, batch_size=3, persistent=False, **arguments):
    return ResumableLoader(
        stream(urls, num_workers=workers, **arguments),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
        persistent_workers=persistent,
    )


def pass_of(urls, number, **arguments):
    keys = []
    for key, at in stream(urls, **arguments):
        if at > number:
            return keys
        if at == number:
            keys.append(key)
    return keys


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr("grn.data.streaming.rank_and_world_size", lambda: (rank, world_size))


def test_every_pass_is_whole_and_in_its_own_order(shards):
    orders = {tuple(pass_of(shards, number, seed=seed)) for seed in (0, 1) for number in (0, 1)}
    assert len(orders) == 4
    assert all(sorted(order) == sorted(GOOD) for order in orders)
    assert pass_of(shards, 1, seed=1) == pass_of(shards, 1, seed=1)


def test_unshuffled_pass_keeps_the_order_of_the_shards_and_starts_over(shards):
    once = stream(shards, endless=False, shuffle=False)
    next(iter(once))
    assert [key for key, _ in once] == sorted(GOOD)
    assert [key for key, _ in once] == sorted(GOOD)


@pytest.mark.parametrize("buffer", [0, 1, 2, 7, 1000])
def test_any_shuffle_buffer_keeps_every_sample(shards, buffer):
    assert sorted(pass_of(shards, 0, shuffle_buffer=buffer)) == sorted(GOOD)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (2, 0), (2, 2), (3, 2)])
def test_training_shares_cover_a_pass_once(shards, monkeypatch, world_size, workers):
    seen = Counter()
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        batches = iter(loader(shards, workers, batch_size=1, decode=tolerant))
        seen.update(key for [(key, number)] in islice(batches, 60) if number == 0)
    assert seen == Counter(ALL)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 2), (4, 2), (7, 2)])
def test_evaluation_shares_cover_a_pass_once_even_with_more_readers_than_shards(
    shards, monkeypatch, world_size, workers
):
    seen = Counter()
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        batches = loader(shards, workers, endless=False, shuffle=False)
        seen.update(key for batch in batches for key, _ in batch)
    assert seen == Counter(GOOD)


def test_every_rank_reads_everything_where_asked(shards, monkeypatch):
    as_rank(monkeypatch, 1, 2)
    assert [key for key, _ in stream(shards, endless=False, shuffle=False, split_by_rank=False)] == sorted(GOOD)


def test_too_few_shards_for_the_workers(shards, monkeypatch):
    as_rank(monkeypatch, 0, 4)
    with pytest.raises(UserError, match=r"data\.num_workers=2 on 4 ranks needs 8 shards"):
        stream(shards, num_workers=2)


# A pass has 27 good samples: 4 batches lie in the first pass, 9 end with it, 10 and 25 lie beyond.
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("done", [0, 4, 9, 10, 25])
def test_resuming_gives_the_unbroken_sequence(shards, workers, done):
    unbroken = list(islice(iter(loader(shards, workers)), 40))
    assert {number for batch in unbroken for _, number in batch} >= {0, 1, 2, 3}

    broken = loader(shards, workers)
    batches = iter(broken)
    assert list(islice(batches, done)) == unbroken[:done]
    state = broken.state_dict()
    del batches, broken

    resumed = loader(shards, workers, persistent=workers > 0)
    resumed.load_state_dict(state)
    assert list(islice(iter(resumed), 40 - done)) == unbroken[done:]


def test_resuming_twice_and_saving_without_having_read(shards):
    unbroken = list(islice(iter(loader(shards, 1)), 30))
    first = loader(shards, 1)
    list(islice(iter(first), 7))
    second = loader(shards, 1)
    second.load_state_dict(first.state_dict())
    list(islice(iter(second), 6))
    third = loader(shards, 1)
    third.load_state_dict(second.state_dict())
    fourth = loader(shards, 1)
    fourth.load_state_dict(third.state_dict())
    assert list(islice(iter(fourth), 17)) == unbroken[13:]


def test_state_survives_a_safe_checkpoint(shards, tmp_path):
    saved = loader(shards, 2)
    list(islice(iter(saved), 5))
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == saved.state_dict()


def test_state_of_other_workers_or_ranks_is_refused(shards, monkeypatch):
    state = loader(shards, 1).state_dict()
    with pytest.raises(UserError, match=r"1 ranks with data\.num_workers=1, this run has 1 with 2"):
        loader(shards, 2).load_state_dict(state)
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(UserError, match=r"this run has 2 with 1"):
        loader(shards, 1).load_state_dict(state)


def test_an_endless_stream_goes_on_when_iterated_again(shards):
    whole = list(islice(stream(shards), 20))
    parts = stream(shards)
    assert list(islice(parts, 8)) + list(islice(parts, 12)) == whole


def _rank(rank, urls, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    unbroken = list(islice(iter(loader(urls, 1)), 20))
    broken = loader(urls, 1)
    list(islice(iter(broken), 6))
    state = broken.state_dict()
    resumed = loader(urls, 1)
    resumed.load_state_dict(state)
    results.put((rank, state, list(islice(iter(resumed), 14)) == unbroken[6:], unbroken))
    dist.destroy_process_group()


def test_every_rank_goes_on_from_the_state_that_rank_0_saves(shards, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, shards, tmp_path / "store", results)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    (_, state0, exact0, keys0), (_, state1, exact1, keys1) = sorted(
        (results.get(timeout=120) for _ in ranks), key=lambda result: result[0]
    )
    for process in ranks:
        process.join()
    assert state0 == state1
    assert state0["ranks"][0] != state0["ranks"][1]
    assert exact0
    assert exact1
    assert keys0 != keys1


def test_skipped_samples_are_counted_across_workers_and_logged_once(shards, caplog):
    once = loader(shards, 2, endless=False, shuffle=False)
    assert sum(len(batch) for batch in once) == len(GOOD)
    assert once.dataset.skipped() == {"label is not an integer": len(ALL) - len(GOOD)}

    caplog.set_level(logging.WARNING)
    alone = stream(shards, endless=False, shuffle=False)
    list(alone)
    assert alone.skipped() == once.dataset.skipped()
    [message] = [record.getMessage() for record in caplog.records]
    assert "'000'" in message
    assert shards[0] in message


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_usable_is_one_clear_error(tmp_path, workers):
    urls = [write_tar(tmp_path / f"{i}.tar", [("a.cls", b"bad"), ("b.cls", b"bad")]) for i in range(2)]
    with pytest.raises(UserError) as caught:
        next(iter(loader(urls, workers)))
    assert "no usable sample (label is not an integer: 4)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_archives_without_entries_are_an_error_too(tmp_path):
    with pytest.raises(UserError, match="they are empty"):
        next(iter(stream([write_tar(tmp_path / "0.tar", [])])))


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
    once = stream(urls, endless=False, shuffle=False)
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
    once = stream(["pipe:exit 3", shards[0]], endless=False, shuffle=False)
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
    others = ["http://h/a.tar", "pipe:curl -s http://h/a.tar | cat", "s3://bucket/a*.tar"]
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
