"""Packs: full, of whole samples, the same on any number of ranks and workers, and going on where a run broke off."""

import math
import random
from itertools import islice, pairwise

import pytest
from hydra import compose, initialize_config_dir
from tars import write_labels

from grn.data.stream import endless
from grn.data.stream.endless import GlobalBatches, ResumableLoader
from grn.data.stream.packing import PackedBatches
from grn.media.skips import Reason, Skip
from grn.method.resolutions import resolutions_at
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError

SIZES = (17, 64, 80, 257, 1025)
BUDGET = 4096


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Eight shards of 40 samples of mixed sizes, every ninth of them not to be used, two too large for any pack."""
    folder, draws, urls = tmp_path_factory.mktemp("shards"), random.Random(0), []
    for shard in range(8):
        labels = {}
        for number in range(shard * 40, shard * 40 + 40):
            size = BUDGET + 1 if number in (50, 150) else draws.choice(SIZES) + draws.randrange(30)
            labels[f"{number:03d}"] = b"bad" if number % 9 == 0 else b"%d" % size
        urls.append(write_labels(folder / f"s-{shard}.tar", labels))
    return urls


def decode(raw, number):
    if raw["cls"] == b"bad":
        raise Skip(Reason.BAD_LABEL)
    return {"key": raw["__key__"], "pass": number, "size": int(raw["cls"])}


def collate(packs):
    return [[(s["key"], s["pass"], s["tokens"]) for s in pack] for pack in packs]


def size(sample):
    return sample["size"]


def run(monkeypatch, urls, count, *, ranks=1, workers=0, state=None, **arguments):
    """Rank after rank in this process: (global batches of packs, the state after them as `state_dict` gathers it)."""
    arguments = {"batch_size": 4, "rank_streams": 4, "worker_streams": 2, "shuffle_buffer": 8, "seed": 0} | arguments
    shares, states = [], []
    for rank in range(ranks):
        monkeypatch.setattr(endless, "rank_and_world_size", lambda rank=rank: (rank, ranks))
        batches = PackedBatches(
            urls,
            decode,
            collate=collate,
            tokens=size,
            max_tokens=BUDGET,
            lookahead=16,
            num_workers=workers,
            **arguments,
        )
        loader = ResumableLoader(batches)
        if state is not None:
            loader.load_state_dict(state)
        shares.append(list(islice(iter(loader), count)))
        states.append(loader.state_dict())
    packs = [[pack for position in zip(*parts) for pack in position] for parts in zip(*shares)]
    furthest = [max(places) for places in zip(*(state["places"] for state in states))]
    return packs, states[0] | {"places": furthest}


def test_packs_are_full_and_miss_nothing(shards, monkeypatch):
    batches, state = run(monkeypatch, shards, 60)
    packs = [pack for batch in batches for pack in batch]
    filled = [sum(tokens for *_, tokens in pack) / BUDGET for pack in packs]
    assert max(filled) <= 1
    assert min(filled) > 0.9
    assert sum(filled) / len(filled) >= 0.95
    given = [(key, number) for pack in packs for key, number, _ in pack]
    assert len(given) == len(set(given))
    usable = {f"{n:03d}" for n in range(320) if n % 9 and n not in (50, 150)}
    behind = min(oldest[0] for _, oldest, *_ in state["places"])  # passes that no stream has anything left of
    passes = [{key for key, own in given if own == number} for number in range(behind)]
    assert len(passes) > 1
    assert all(own == usable for own in passes)
    assert sum(place[0] for place in state["places"]) == len(packs)


RECIPE = (CONF / "experiment" / "t2i_2B.yaml").read_text().splitlines()
STAGES = ["", *(line.strip("# ") for line in RECIPE if line.startswith("#   ckpt_path=last "))]


@pytest.mark.parametrize("stage", range(3))
def test_the_stages_of_t2i_2B_train_and_fill_their_packs(tmp_path, stage):
    """As its own header has them: each goes on beyond the last one, with samples of its size."""

    def composed(stage):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", ["+experiment=t2i_2B", "tokenizer.ckpt=x", *STAGES[stage].split()])

    assert len(STAGES) == 3
    config = composed(stage)
    if stage > 0:
        assert config.trainer.max_steps > composed(stage - 1).trainer.max_steps
    sizes = list(resolutions_at(config.data.pixels).values())
    assert tuple(config.training.size) in sizes
    draws = random.Random(0)  # captions of 10 to 120 tokens
    labels = [math.prod(draws.choice(sizes)) // 16**2 + 1 + draws.randint(10, 120) for _ in range(500)]
    url = write_labels(tmp_path / "x.tar", {f"{number:03d}": b"%d" % label for number, label in enumerate(labels)})
    max_tokens, lookahead = config.data.max_tokens, config.data.lookahead
    settings = {"tokens": size, "max_tokens": max_tokens, "lookahead": lookahead, "batch_size": 40}
    batch, _ = next(iter(PackedBatches([url], decode, collate=collate, **settings)))
    assert sum(tokens for pack in batch for *_, tokens in pack) >= 0.95 * len(batch) * max_tokens


def test_every_pack_begins_with_what_has_waited_longest(shards, monkeypatch):
    one = {"rank_streams": 1, "worker_streams": 1, "batch_size": 1}
    packs = [[tuple(sample[:2]) for sample in pack] for (pack,) in run(monkeypatch, shards, 60, **one)[0]]
    streamed = GlobalBatches(shards, decode, collate=list, shuffle_buffer=8, seed=0, **one)
    order = [(sample["key"], sample["pass"]) for (sample,), _ in islice(iter(streamed), 1000)]
    order = {sample: place for place, sample in enumerate(order)}
    for number, pack in enumerate(packs):
        assert all(order[pack[0]] < order[later] for own in packs[number + 1 :] for later in own)
    assert sum(order[a] > order[b] for pack in packs for a, b in pairwise(pack)) > 20


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (2, 2), (4, 1)])
def test_ranks_and_workers_change_nothing(shards, monkeypatch, ranks, workers):
    alone = run(monkeypatch, shards, 12)
    assert run(monkeypatch, shards, 12, ranks=ranks, workers=workers) == alone


@pytest.mark.parametrize("done", [0, 1, 5, 18, 39])
def test_resuming_gives_the_unbroken_sequence(shards, monkeypatch, done):
    whole, end = run(monkeypatch, shards, 40)
    first, state = run(monkeypatch, shards, done)
    second, after = run(monkeypatch, shards, 40 - done, ranks=2, workers=1, state=state)
    assert first + second == whole
    assert after == end


def test_samples_that_no_pack_holds_are_counted(shards, monkeypatch):
    monkeypatch.setattr(endless, "rank_and_world_size", lambda: (0, 1))
    loader = ResumableLoader(PackedBatches(
        shards, decode, collate=collate, tokens=size, max_tokens=BUDGET, batch_size=1, shuffle_buffer=1, lookahead=4
    ))  # fmt: skip
    list(islice(iter(loader), 40))
    assert loader.dataset.skipped()[Reason.TOO_MANY_TOKENS.value] >= 2


def test_nothing_but_what_no_pack_holds_is_an_error(shards, monkeypatch):
    monkeypatch.setattr(endless, "rank_and_world_size", lambda: (0, 1))
    batches = PackedBatches(shards, decode, collate=collate, tokens=size, max_tokens=8, batch_size=1)
    with pytest.raises(UserError, match="more tokens than a pack has"):
        next(iter(batches))
