"""Critters: what captions say is what is drawn, and new pairs of color and hat are nowhere in training."""

import hashlib
import io
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from grn.data.manifest import read_manifest
from grn.data.prepare.shards import shard_paths
from grn.data.stream.streaming import MAX_ENTRY_BYTES, read_shard
from grn.runtime.errors import UserError
from grn.toys.critters import (
    ATTRIBUTES,
    HELDOUT_PAIRS,
    LABEL_NAMES,
    SHORT_WORDINGS,
    WORDINGS,
    Critter,
    CrittersSource,
    caption,
    draw,
    read_caption,
    world,
)
from grn.toys.critters_judge import CrittersJudge
from grn.toys.dicebear import color_name

SOME = Critter("orange", "bell", "one eye", "a frown", "a fin", "teal")


def samples(root, split):
    urls = shard_paths(root, read_manifest(root), split)
    return [raw for url in urls for raw in read_shard(url, MAX_ENTRY_BYTES)]


def split_of(root, name):
    def read():
        raws = samples(root, name)
        pixels = [torch.from_numpy(np.array(Image.open(io.BytesIO(raw["png"])))).permute(2, 0, 1) for raw in raws]
        labels = torch.tensor([int(raw["cls"]) for raw in raws])
        yield {"pixels": torch.stack(pixels), "caption": [raw["txt"].decode() for raw in raws], "label": labels}

    return read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("critters") / "critters"
    assert CrittersSource(samples=120, val=40, new=30, shard_size=60, num_workers=0).write(root)
    return root


def test_captions_tell_the_attributes_they_name():
    assert caption(SOME) == "an orange bell critter with one eye, a frown and a fin on teal"
    draws = random.Random(0)
    for _ in range(200):
        critter = Critter(*(draws.choice(values) for values in ATTRIBUTES.values()))
        places = [values.index(value) for values, value in zip(ATTRIBUTES.values(), critter)]
        for wording in (*WORDINGS, *SHORT_WORDINGS):
            told = [name in wording for name in ATTRIBUTES]
            expected = [place if known else -1 for place, known in zip(places, told)]
            assert read_caption(caption(critter, wording).upper()) == expected, (critter, wording)
    assert read_caption("an astronaut riding a horse") == [-1] * 6


def test_every_attribute_shows():
    def pixels(critter):
        picture = Image.open(io.BytesIO(draw(critter, 64)))
        assert picture.size == (64, 64)
        return np.asarray(picture.convert("RGB")).astype(int)

    for name, values in ATTRIBUTES.items():
        drawn = [pixels(SOME._replace(**{name: value})) for value in values]
        for one, other in itertools.combinations(drawn, 2):
            assert (np.abs(one - other).max(axis=-1) > 30).sum() >= 60, name  # of 4096
    assert Image.open(io.BytesIO(draw(SOME, 32))).size == (32, 32)


def test_training_never_shows_new_pairs(folder):
    facts = {split: [json.loads(raw["json"]) for raw in samples(folder, split)] for split in ("train", "val", "new")}
    assert {split: len(own) for split, own in facts.items()} == {"train": 120, "val": 40, "new": 30}
    for split, own in facts.items():
        assert all(((it["color"], it["hat"]) in HELDOUT_PAIRS) == (split == "new") for it in own)
    every = [json.dumps(it) for own in facts.values() for it in own]
    assert len(set(every)) == len(every)
    for raw in samples(folder, "train"):
        critter = Critter(**json.loads(raw["json"]))
        assert int(raw["cls"]) == critter.label
        assert LABEL_NAMES[critter.label] == f"{critter.color} {critter.shape}"
        assert raw["png"] == draw(critter, 64)
        told = [
            values[place] for values, place in zip(ATTRIBUTES.values(), read_caption(raw["txt"].decode())) if place >= 0
        ]
        assert set(told) <= set(critter)
    lines = [json.loads(line) for line in (folder / "suite.jsonl").read_text().splitlines()]
    assert [line["tag"] for line in lines] == ["seen"] * 40 + ["new"] * 30


def test_shards_stay_as_they_are(tmp_path):
    CrittersSource(samples=30, val=6, new=6, shard_size=15, num_workers=0).write(tmp_path / "x")
    digest = hashlib.sha256((tmp_path / "x" / "suite.jsonl").read_bytes())
    for split in ("train", "val", "new"):
        for raw in samples(tmp_path / "x", split):
            digest.update(raw["__key__"].encode() + raw["cls"] + raw["txt"] + raw["json"])
    assert digest.hexdigest() == "6a009e5cd221076f48ea1f7e47ca6f02d9400617875e027c92240be3d3d9efb3"
    assert "style" not in read_manifest(tmp_path / "x")["parameters"]  # older data sets are up to date


@pytest.mark.parametrize("style", ["planets", "landscape", "pixel-art"])
def test_other_styles(tmp_path, style):
    assert CrittersSource(style=style, samples=20, val=6, new=6, shard_size=20, num_workers=0).write(tmp_path / "x")
    own, manifest = world(style), read_manifest(tmp_path / "x")
    assert manifest["num_labels"] == len(own.label_names) > 10
    raws = {split: samples(tmp_path / "x", split) for split in ("train", "val", "new")}
    assert len({raw["json"] for some in raws.values() for raw in some}) == 32
    for split, some in raws.items():
        for raw in some:
            values = tuple(json.loads(raw["json"]).values())
            assert own.is_new(values) == (split == "new")
            assert own.label_names[int(raw["cls"])] == " ".join(values[own.names.index(it)] for it in own.classes)
            caption = raw["txt"].decode()
            assert caption in {own.caption(values, it) for it in (*own.wordings, *own.short_wordings)}
            assert Image.open(io.BytesIO(raw["png"])).size == (64, 64)
    assert len({raw["png"] for raw in raws["train"]}) == 20


def test_what_is_counted_is_there():
    own = world("patchwork")
    every = {new: [own.at(index, new=new) for index in range(own.count(new=new))] for new in (False, True)}
    assert all(own.is_new(values) == new for new, some in every.items() for values in some)
    found = every[False] + every[True]
    assert len(set(found)) == len(found) == math.prod(len(it.values) for it in own.attributes)
    # Of a part that is missing, the color is always the first.
    planets = world("planets")
    moons, moon = (planets.names.index(name) for name in ("moons", "moon_color"))
    some = [planets.at(index, new=False) for index in range(0, planets.count(new=False), 997)]
    assert {values[moon] for values in some if values[moons] == "no moons"} == {
        next(iter(planets.attributes[moon].values))
    }
    assert len({values[moon] for values in some if values[moons] != "no moons"}) > 1


def test_colors_have_names():
    named = {"#ffffff": "white", "#000000": "black", "#17233f": "dark blue", "#8d5524": "brown", "#fda4af": "pale red"}
    assert {value: color_name(value) for value in named} == named


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"style": "adventurer"}, r"source\.style=adventurer must be one of DiceBear's styles under CC0: blobs, cameo"),
        ({"style": "../critters"}, r"source\.style=\.\./critters must be one of"),
        ({"style": "glass"}, r"source\.style=glass has too few options"),
        ({"samples": 0}, r"source\.samples=0"),
        ({"samples": 10**6}, "ask for fewer"),
        ({"size": 8}, r"source\.size=8 must lie in 16 to 1024"),
    ],
)
def test_mistakes(tmp_path, arguments, expected):
    with pytest.raises(UserError, match=expected):
        CrittersSource(**arguments).write(tmp_path / "x")


def test_the_judge_counts_what_was_told(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(CrittersJudge, "epochs", 1)
    prompts = [caption(SOME), "a blue critter with horns", "a dog"]
    judge = CrittersJudge(
        train=split_of(folder, "train"), val=split_of(folder, "val"), prompts=prompts, cache_dir=tmp_path
    )
    (cached,) = tmp_path.glob("critters-judge-*.safetensors")
    assert 0 <= judge.val_accuracy <= 1
    orange, blue = read_caption(prompts[0]), read_caption(prompts[1])
    wrong = [*orange[:4], ATTRIBUTES["hat"].index("horns"), orange[5]]
    read = torch.tensor([orange, wrong, [*blue[:4], blue[4], 0], [0] * 6])
    monkeypatch.setattr(judge, "_read", lambda images: (read, torch.randn(len(images), 64)))
    judge.update(torch.zeros(4, 3, 64, 64, dtype=torch.uint8), torch.tensor([0, 0, 1, 2]))
    scores = judge.compute()
    assert scores["hat_accuracy"] == (0.5 + 1) / 2
    assert scores["shape_accuracy"] == 1  # of one prompt alone
    assert scores["attribute_accuracy_seen"] == pytest.approx((1 + 5 / 6) / 2)
    assert (scores["pair_accuracy_seen"], scores["pair_accuracy_new"]) == (0.5, 1)
    assert scores["pair_accuracy"] == 0.75
    assert scores["critters_fid"] > 0
    judge.reset()
    with pytest.raises(UserError, match="no pictures"):
        judge.compute()
    cached.write_bytes(b"x")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        CrittersJudge(train=split_of(folder, "train"), val=split_of(folder, "val"), prompts=prompts, cache_dir=tmp_path)


def test_the_judge_of_classes(folder, monkeypatch):
    """Of pictures with a class alone it reads color and shape, and nothing that nobody has told it."""
    monkeypatch.setattr(CrittersJudge, "epochs", 1)
    splits = {name: without_captions(split_of(folder, name)) for name in ("train", "val")}
    judge = CrittersJudge(**splits)
    assert len(judge.asked) == len(LABEL_NAMES) == 36
    read = torch.tensor([read_caption("a pink tower critter"), read_caption("a pink bell critter")])
    monkeypatch.setattr(judge, "_read", lambda images: (read, torch.randn(len(images), 64)))
    judge.update(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.tensor([LABEL_NAMES.index("pink tower")] * 2))
    scores = judge.compute()
    assert (scores["color_accuracy"], scores["shape_accuracy"], scores["attribute_accuracy"]) == (1, 0.5, 0.75)
    assert not {"eyes_accuracy", "hat_accuracy", "pair_accuracy"} & scores.keys()
    with pytest.raises(UserError, match="prompts tell of hat, and no training picture does: data=critters_t2i"):
        CrittersJudge(**splits, prompts=["a pink critter with horns"])


def without_captions(split):
    return lambda: ({key: value for key, value in batch.items() if key != "caption"} for batch in split())


@pytest.mark.parametrize(
    ("prompts", "train", "expected"),
    [
        (["a dog"], "train", "no prompt tells of a critter"),
        ([caption(SOME)], None, r"the training split has no captions or classes of critters"),
    ],
)
def test_what_cannot_be_judged(folder, prompts, train, expected):
    with pytest.raises(UserError, match=expected):
        CrittersJudge(train=split_of(folder, train) if train else tuple, val=tuple, prompts=prompts)
