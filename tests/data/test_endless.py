"""The order of training: the same on any number of ranks and workers, whole, and going on where a run broke off."""

import multiprocessing
from collections import Counter
from itertools import count, islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tars import write_labels

from grn.data.stream import endless
from grn.data.stream.endless import GlobalBatches, Place, ResumableLoader
from grn.media.skips import Reason, Skip
from grn.runtime.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Fourteen shards of 2..6 samples (54 in all); every fifth sample is bad."""
    folder, urls, number = tmp_path_factory.mktemp("shards"), [], 0
    for shard in range(14):
        numbers = range(number, number + 2 + shard * 7 % 5)
        labels = {f"{n:03d}": b"bad" if n % 5 == 0 else b"%d" % n for n in numbers}
        urls.append(write_labels(folder / f"s-{shard:02d}.tar", labels))
        number = numbers.stop
    return urls


ALL = {f"{i:03d}" for i in range(54)}
GOOD = {key for key in ALL if int(key) % 5}


def decode(raw, number):
    if raw["cls"] == b"bad":
        raise Skip(Reason.BAD_LABEL)
    return raw["__key__"], number


def make(urls, workers=0, **arguments):
    arguments = {"batch_size": 6, "rank_streams": 6, "worker_streams": 2, "shuffle_buffer": 4, "seed": 0} | arguments
    decoder = arguments.pop("decode", decode)
    return ResumableLoader(GlobalBatches(urls, decoder, collate=list, num_workers=workers, **arguments))


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(endless, "rank_and_world_size", lambda: (rank, world_size))


def run(monkeypatch, urls, count, *, ranks=1, workers=0, state=None, **arguments):
    """Rank after rank in this process: (global batches, the state after them as `state_dict` gathers it)."""
    shares, states = [], []
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        loader = make(urls, workers, **arguments)
        if state is not None:
            loader.load_state_dict(state)
        shares.append(list(islice(iter(loader), count)))
        states.append(loader.state_dict())
    batches = [[sample for samples in zip(*parts) for sample in samples] for parts in zip(*shares)]
    furthest = [max(places) for places in zip(*(state["places"] for state in states))]
    return batches, states[0] | {"places": furthest}


def passes(batches):
    """Number of the pass -> how often each key came."""
    counts = {}
    for key, number in (sample for batch in batches for sample in batch):
        counts.setdefault(number, Counter())[key] += 1
    return counts


LAYOUTS = [(1, 0), (1, 2), (2, 1), (2, 2), (3, 0), (6, 2)]


@pytest.mark.parametrize(("ranks", "workers"), LAYOUTS[1:])
def test_ranks_and_workers_change_nothing(shards, monkeypatch, ranks, workers):
    alone, state = run(monkeypatch, shards, 30)
    assert run(monkeypatch, shards, 30, ranks=ranks, workers=workers) == (alone, state)
    assert len(passes(alone)) > 3


def test_64_ranks_of_8_workers_read_what_one_process_reads(tmp_path, monkeypatch):
    """Each worker of each rank for itself, in this process."""
    urls = [write_labels(tmp_path / f"{n:03d}.tar", {f"{n:03d}-{i}": b"1" for i in range(2)}) for n in range(512)]
    sizes = {"batch_size": 128, "rank_streams": 64, "worker_streams": 8, "shuffle_buffer": 2, "seed": 3}
    count, batches = 24, [[None] * 128 for _ in range(24)]

    def read(rank, ranks, worker, workers):
        as_rank(monkeypatch, rank, ranks)
        monkeypatch.setattr(endless, "worker_and_workers", lambda: (worker, workers))
        return [samples for samples, _ in islice(GlobalBatches(urls, decode, collate=list, **sizes), count // workers)]

    expected = read(0, 1, 0, 1)
    assert len({key for batch in expected[:8] for key, _ in batch}) == 8 * 128  # a pass: nothing comes twice
    for rank in range(64):
        for worker in range(8):
            for turn, samples in enumerate(read(rank, 64, worker, 8)):
                batches[turn * 8 + worker][rank::64] = samples
    assert batches == expected


@pytest.mark.parametrize(
    ("broken", "resumed"), [((1, 0), (2, 2)), ((2, 1), (1, 0)), ((2, 2), (3, 1)), ((6, 2), (1, 1))]
)
def test_a_run_goes_on_with_other_numbers(shards, monkeypatch, broken, resumed):
    whole, end = run(monkeypatch, shards, 24)
    first, state = run(monkeypatch, shards, 11, ranks=broken[0], workers=broken[1])
    second, after = run(monkeypatch, shards, 13, ranks=resumed[0], workers=resumed[1], state=state)
    assert first + second == whole
    assert after == end


@pytest.mark.parametrize("done", [0, 1, 4, 9, 10, 25])
def test_resuming_gives_the_unbroken_sequence(shards, monkeypatch, done):
    whole, _ = run(monkeypatch, shards, 40)
    first, state = run(monkeypatch, shards, done)
    assert first == whole[:done]
    assert run(monkeypatch, shards, 40 - done, state=state)[0] == whole[done:]


def test_order_is_of_the_seed_and_the_pass(shards, monkeypatch):
    first, again, other = (run(monkeypatch, shards, 20, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again
    assert first != other
    keys = {number: [] for number in range(3)}
    for key, number in (sample for batch in first for sample in batch):
        keys.setdefault(number, []).append(key)
    assert keys[0] != keys[1] != keys[2]
    assert keys[0] != sorted(keys[0])


def test_streams_do_not_fall_behind_one_another(shards):
    """Where shards do not divide over the streams: who had more in a pass has fewer in the next."""
    data = make(shards, rank_streams=4, worker_streams=1).dataset  # 14 over 4
    read = Counter()
    for number in range(2):
        for stream in range(4):
            read[stream] += len(data._shards(stream, number))
    assert set(read.values()) == {7}


def test_streams_take_turns_where_a_batch_does_not_divide_over_them(shards, monkeypatch):
    data = make(shards, batch_size=4).dataset  # over two rows of six
    monkeypatch.setattr(data, "_stream", lambda stream: ((stream, Place()) for _ in count()))
    taken = Counter(stream for batch, _ in islice(data, 12) for stream in batch)
    assert taken == dict.fromkeys(range(12), 4)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Twenty shards of 0..9 samples whose keys are all different."""
    folder = tmp_path_factory.mktemp("pool")
    sizes = [7, 0, 3, 9, 1, 4, 4, 8, 2, 5] * 2
    return {
        write_labels(folder / f"{i}.tar", {f"{i}-{n}": b"1" for n in range(size)}): size for i, size in enumerate(sizes)
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_nothing_is_lost_or_doubled(pool, monkeypatch, draw):
    """Any shards, streams, buffer and batch; broken off anywhere, and gone on with on other ranks."""
    urls = draw.draw(st.lists(st.sampled_from(list(pool)), min_size=1, max_size=12, unique=True))
    keys = {f"{Path(url).stem}-{n}" for url in urls for n in range(pool[url])}
    if not keys:
        return
    columns = draw.draw(st.integers(1, min(6, len(urls))))
    rows = draw.draw(st.integers(1, len(urls) // columns))
    ranks, others = (draw.draw(st.sampled_from([r for r in range(1, 7) if columns % r == 0])) for _ in "ab")
    arguments = {
        "rank_streams": columns,
        "worker_streams": rows,
        "batch_size": ranks * others * draw.draw(st.integers(1, 4)),
        "shuffle_buffer": draw.draw(st.sampled_from([0, 1, 2, 5, 100])),
        "seed": draw.draw(st.integers(0, 3)),
    }
    first, state = run(monkeypatch, urls, draw.draw(st.integers(0, 12)), ranks=ranks, **arguments)
    second, state = run(monkeypatch, urls, 20, ranks=others, state=state, **arguments)
    seen = passes(first + second)
    whole = min(number for number, *_ in state["places"])  # earlier passes are behind every stream
    assert set(range(whole)) <= seen.keys()
    for number, counts in seen.items():
        assert max(counts.values()) == 1
        assert counts.keys() <= keys
        assert number >= whole or counts.keys() == keys


def test_resuming_reads_at_most_a_shard_and_two_blocks(tmp_path, monkeypatch):
    urls = [write_labels(tmp_path / f"{i}.tar", {f"{i}-{n}": b"1" for n in range(50)}) for i in range(20)]
    arguments = {"rank_streams": 1, "worker_streams": 1, "batch_size": 1, "shuffle_buffer": 10}
    _, state = run(monkeypatch, urls, 935, **arguments)
    read = Counter()
    shard = GlobalBatches.shard

    def counting(self, url):
        for raw in shard(self, url):
            read[url] += 1
            yield raw

    monkeypatch.setattr(GlobalBatches, "shard", counting)
    run(monkeypatch, urls, 1, state=state, **arguments)
    assert 0 < sum(read.values()) <= 50 + 2 * 10


def test_resuming_twice_and_saving_without_having_read(shards, monkeypatch):
    whole, _ = run(monkeypatch, shards, 30, workers=1)
    _, state = run(monkeypatch, shards, 7, workers=1)
    _, state = run(monkeypatch, shards, 6, workers=1, state=state)
    _, state = run(monkeypatch, shards, 0, workers=1, state=state)
    assert run(monkeypatch, shards, 17, workers=1, state=state)[0] == whole[13:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_when_iterated_again(shards, workers):
    whole = list(islice(iter(make(shards)), 20))
    loader = make(shards, workers)
    assert list(islice(iter(loader), 8)) + list(islice(iter(loader), 12)) == whole


def test_state_survives_a_safe_checkpoint(shards, tmp_path, monkeypatch):
    _, state = run(monkeypatch, shards, 5, workers=2)
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"urls": 13}, r"14 training shards, .*; this run has 13 training shards"),
        ({"rank_streams": 3}, r"6 data\.rank_streams, .*; this run has .* 3 data\.rank_streams"),
        ({"rank_streams": 4, "worker_streams": 3}, r"3 data\.worker_streams"),
    ],
)
def test_a_place_in_another_order_is_refused(shards, changed, message):
    state = make(shards).state_dict()
    urls = shards[: changed.pop("urls", None)]
    with pytest.raises(UserError, match=message) as caught:
        make(urls, **changed).load_state_dict(state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "workers", "changed", "message"),
    [
        (4, 0, {}, r"^4 ranks cannot share data\.rank_streams=6: .* data\.rank_streams=4$"),
        (1, 3, {}, r"^data\.num_workers=3 cannot share data\.worker_streams=2: .* data\.worker_streams=3$"),
        (1, 3, {"key": "data.parts.clips"}, r"^data\.parts\.clips\.num_workers=3 .*data\.parts\.clips\.worker_streams"),
        (1, 0, {"rank_streams": 8}, r"data\.rank_streams=8 times data\.worker_streams=2 needs 16 .* only 14: lower"),
    ],
)
def test_numbers_that_do_not_fit_name_the_keys(shards, monkeypatch, ranks, workers, changed, message):
    as_rank(monkeypatch, 0, ranks)
    with pytest.raises(UserError, match=message) as caught:
        make(shards, workers, **changed)
    assert "\n" not in str(caught.value)


def _rank(rank, urls, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    unbroken = list(islice(iter(make(urls, 1)), 20))
    broken = make(urls, 1)
    list(islice(iter(broken), 6))
    state = broken.state_dict()
    resumed = make(urls, 2)
    resumed.load_state_dict(state)
    results.put((rank, state, list(islice(iter(resumed), 14)) == unbroken[6:], unbroken))
    dist.destroy_process_group()


def test_the_state_of_every_rank_is_that_of_all(shards, tmp_path, monkeypatch):
    """In two real processes; and one alone goes on from it."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, shards, tmp_path / "store", results)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    (_, state0, exact0, share0), (_, state1, exact1, share1) = sorted(
        (results.get(timeout=120) for _ in ranks), key=lambda result: result[0]
    )
    for process in ranks:
        process.join()
    assert exact0
    assert exact1
    whole, _ = run(monkeypatch, shards, 20)
    assert [batch[0::2] for batch in whole] == share0
    assert [batch[1::2] for batch in whole] == share1
    assert state0 == state1
    assert run(monkeypatch, shards, 14, state=state0)[0] == whole[6:]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_usable_is_one_clear_error(tmp_path, workers):
    urls = [write_labels(tmp_path / f"{i}.tar", {"a": b"bad", "b": b"bad"}) for i in range(2)]
    with pytest.raises(UserError) as caught:
        next(iter(make(urls, workers, rank_streams=1, worker_streams=1)))
    assert "no usable sample (label is not an integer: 32)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_archives_without_entries_are_an_error_too(tmp_path):
    with pytest.raises(UserError, match="they are empty"):
        next(iter(make([write_labels(tmp_path / "0.tar", {})], rank_streams=1, worker_streams=1)))


def test_a_stream_outlives_shards_without_a_usable_sample(tmp_path):
    """Though all that it has in some pass is one of them."""
    good = write_labels(tmp_path / "good.tar", {"a": b"1", "b": b"1"})
    (tmp_path / "garbage.tar").write_bytes(b"this is no tar" * 100)
    loader = make([good, str(tmp_path / "garbage.tar")], rank_streams=2, worker_streams=1, batch_size=2)
    batches = list(islice(iter(loader), 30))
    assert {key for batch in batches for key, _ in batch} == {"a", "b"}
    assert loader.dataset.skipped().keys() == {"shard broken or truncated"}


@pytest.mark.parametrize("workers", [0, 2])
def test_repeated_batches_are_the_first_ones_again_and_again(shards, workers):
    """Also by a loader that goes on from the middle of a turn."""
    first = list(islice(iter(make(shards)), 3))
    loader = make(shards, workers, repeated=3)
    assert list(islice(iter(loader), 3)) == first
    assert list(islice(iter(loader), 4)) == [*first, first[0]]
    other = make(shards, workers, repeated=3)
    other.load_state_dict(loader.state_dict())
    assert list(islice(iter(other), 3)) == [first[1], first[2], first[0]]
