"""Folders as sources: what becomes of good files, what is said of bad ones, whatever the number of processes."""

import io
import json
import os
import re
import signal
import struct
import sys
import time
import zlib
from pathlib import Path

import av
import commands
import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from grn import prepare
from grn.data.manifest import read_manifest
from grn.data.prepare.folders import CaptionedImages, ClassFolders, Clips, list_files, make_keys
from grn.data.prepare.shards import shard_paths
from grn.data.samples import ImageDecoder
from grn.data.stream.streaming import ShardStream
from grn.media.images import IMAGE_FORMATS, center_crop, decode_image
from grn.media.skips import Reason
from grn.runtime.errors import UserError


def picture(seed=0, size=(40, 30), format="JPEG", **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(data, format=format, **options)
    return data.getvalue()


def bomb():
    """A PNG of 300 bytes that says it has 10^10 pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def video(seconds=1, size=64):
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(8 * seconds):
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), 10 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return data.getvalue()


def put(folder, files):
    """{path: bytes or str} -> files."""
    for path, data in files.items():
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


@pytest.fixture
def classes(tmp_path):
    """Three classes of seven training images and two for validation."""
    files = {}
    for label, name in enumerate(("n02", "n01", "n03")):
        files |= {f"train/{name}/{name}_{i}.JPEG": picture(10 * label + i) for i in range(7)}
        files |= {f"val/{name}/val.{i}.png": picture(100 * label + i, format="PNG") for i in range(2)}
    return put(tmp_path / "images", files)


def class_folders(folder, **changes):
    return ClassFolders(**({"root": str(folder), "image_size": 16, "shard_size": 6, "num_workers": 0} | changes))


def captioned(folder, **changes):
    return CaptionedImages(**({"root": str(folder), "val": 2, "shard_size": 3, "num_workers": 0} | changes))


def clips(folder, **changes):
    return Clips(**({"root": str(folder), "val": 1, "num_workers": 0} | changes))


def read(root, split):
    """Key -> sample, as plain webdataset reads it."""
    urls = shard_paths(root, read_manifest(root), split)
    samples = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    return {sample["__key__"]: sample for sample in samples}


def rejected(root):
    path = root / "rejected.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["item"]: line["reason"] for line in lines}


def contents(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_classes_are_sorted_cropped_and_lossless(classes, tmp_path):
    assert class_folders(classes).write(tmp_path / "d")
    manifest = read_manifest(tmp_path / "d")
    assert (manifest["name"], manifest["image_size"], manifest["num_labels"]) == ("imagenet", 16, 3)
    assert manifest["label_names"] == ["n01", "n02", "n03"]
    train, val = read(tmp_path / "d", "train"), read(tmp_path / "d", "val")
    assert (len(train), len(val)) == (21, 6)
    for key, sample in train.items():
        name = key.partition("/")[0]
        assert sample["cls"] == str(manifest["label_names"].index(name)).encode()
        original = decode_image((classes / "train" / f"{key}.JPEG").read_bytes())
        written = Image.open(io.BytesIO(sample["png"]))
        assert np.array_equal(np.asarray(written), np.asarray(center_crop(original, 16)))
    assert set(val) == {f"{name}/val%2E{i}" for name in ("n01", "n02", "n03") for i in range(2)}
    assert rejected(tmp_path / "d") == {}


def test_shards_are_even_and_mix_the_classes(classes, tmp_path):
    class_folders(classes).write(tmp_path / "d")
    shards = read_manifest(tmp_path / "d")["splits"]["train"]["shards"]
    assert [shard["samples"] for shard in shards] == [6, 5, 5, 5]
    for path in shard_paths(tmp_path / "d", read_manifest(tmp_path / "d"), "train"):
        assert len({sample["cls"] for sample in wds.WebDataset([path], shardshuffle=False)}) > 1
    class_folders(classes, seed=1).write(tmp_path / "other")
    orders = [list(read(tmp_path / name, "train")) for name in ("d", "other")]
    assert orders[0] != orders[1]
    assert set(orders[0]) == set(orders[1])


def test_the_stream_of_training_reads_them(classes, tmp_path):
    class_folders(classes).write(tmp_path / "d")
    urls = shard_paths(tmp_path / "d", read_manifest(tmp_path / "d"), "train")
    stream = ShardStream(urls, ImageDecoder(image_size=16, num_labels=3))
    samples = list(stream)
    assert len(samples) == 21
    assert stream.skipped() == {}
    assert samples[0]["pixels"].shape == (3, 1, 16, 16)


def test_names_captions_and_formats(classes, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("n02 tench, Tinca tinca\nn01\tgoldfish\nn03 great white shark\nn99 unused\n\n")
    source = class_folders(classes, names=str(names), caption="a photo of {name}", format="webp")
    source.write(tmp_path / "d")
    assert read_manifest(tmp_path / "d")["label_names"] == ["goldfish", "tench, Tinca tinca", "great white shark"]
    sample = read(tmp_path / "d", "train")["n02/n02_3"]
    assert (sample["cls"], sample["txt"]) == (b"1", b"a photo of tench, Tinca tinca")
    assert Image.open(io.BytesIO(sample["webp"])).format == "WEBP"
    class_folders(classes, format="jpg", quality=30).write(tmp_path / "jpg")
    assert Image.open(io.BytesIO(read(tmp_path / "jpg", "train")["n02/n02_3"]["jpg"])).format == "JPEG"


def test_colour_profiles_are_left_out(classes, tmp_path):
    put(classes, {"train/n01/profile.png": picture(format="PNG", size=(16, 16), icc_profile=bytes(100_000))})
    class_folders(classes).write(tmp_path / "d")
    assert len(read(tmp_path / "d", "train")["n01/profile"]["png"]) < 2000


def hostile(folder):
    """Files that must be rejected, and why."""
    put(
        folder,
        {
            "empty.jpg": b"",
            "cut.jpg": picture(size=(400, 400))[:900],
            "text.png": "no picture",
            "bomb.png": bomb(),
            "pixel.png": picture(size=(1, 1), format="PNG"),
            "line.png": picture(size=(60_000, 8), format="PNG"),
        },
    )
    with open(folder / "huge.jpg", "wb") as file:
        file.truncate(65 * 2**20)
    (folder / "broken.jpg").symlink_to("nowhere")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "loop").symlink_to(".")
    os.mkfifo(folder / "pipe.jpg")
    (folder / ".hidden.jpg").write_bytes(b"")
    return {
        "empty.jpg": Reason.UNDECODABLE_IMAGE.value,
        "cut.jpg": Reason.UNDECODABLE_IMAGE.value,
        "text.png": Reason.UNDECODABLE_IMAGE.value,
        "bomb.png": "too many pixels",
        "pixel.png": Reason.TOO_SMALL.value,
        "huge.jpg": Reason.OVERSIZE_ENTRY.value,
        "broken.jpg": Reason.UNREADABLE_FILE.value,
        "loop.jpg": Reason.UNREADABLE_FILE.value,
        "pipe.jpg": Reason.UNREADABLE_FILE.value,
    }


def test_bad_images_are_rejected_with_their_reason(classes, tmp_path):
    reasons = hostile(classes / "train" / "n01")
    class_folders(classes, image_size=96).write(tmp_path / "large")
    reasons["line.png"] = "too many pixels"  # once it is 96 pixels high
    assert rejected(tmp_path / "large") == {f"train/n01/{name}": reason for name, reason in reasons.items()}
    assert read_manifest(tmp_path / "large")["splits"]["train"]["samples"] == 21


def test_what_may_not_be_read_is_told(classes, tmp_path):
    (tmp_path / "secret").touch(mode=0)
    if os.access(tmp_path / "secret", os.R_OK):
        pytest.skip("root reads everything; .ci/run runs this without that power")
    (classes / "train" / "n01" / "n01_0.JPEG").chmod(0)
    class_folders(classes).write(tmp_path / "d")
    assert rejected(tmp_path / "d") == {"train/n01/n01_0.JPEG": Reason.UNREADABLE_FILE.value}
    (classes / "train" / "n02").chmod(0)
    with pytest.raises(UserError, match=r"root: the folder .*n02 cannot be read"):
        class_folders(classes).write(tmp_path / "other")


def test_class_folders_that_are_links_or_deep(classes, tmp_path):
    put(tmp_path / "elsewhere", {"a.jpg": picture(1), "deep/er/b.JPG": picture(2)})
    for split in ("train", "val"):
        (classes / split / "n00").symlink_to(tmp_path / "elsewhere")
    class_folders(classes).write(tmp_path / "d")
    assert {key for key in read(tmp_path / "d", "train") if key.startswith("n00")} == {"n00/a", "n00/deep/er/b"}


@pytest.mark.parametrize("under", ["", "train/"])
def test_a_folder_of_classes_is_split_by_itself(tmp_path, under):
    """One image in ten, of all classes alike, in as many shards as the default loaders read; the same every time."""
    for name, count in {"cats": 11, "dogs": 11, "one": 1}.items():
        put(tmp_path / "photos" / under / name, {f"{i}.png": picture(i) for i in range(count)})
    for number in range(2):
        class_folders(tmp_path / "photos", shard_size=None).write(tmp_path / f"d{number}")
    manifest = read_manifest(tmp_path / "d0")
    assert manifest["splits"] == read_manifest(tmp_path / "d1")["splits"]
    assert (manifest["num_labels"], manifest["label_names"]) == (3, ["cats", "dogs", "one"])
    train, val = (read(tmp_path / "d0", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (21, 2)
    assert {key.partition("/")[0] for key in val} == {"cats", "dogs"}
    assert not train.keys() & val.keys()
    assert len(manifest["splits"]["train"]["shards"]) == 8
    class_folders(tmp_path / "photos", val=20).write(tmp_path / "most")
    assert len(read(tmp_path / "most", "train")) == 3
    with pytest.raises(UserError, match=r"^source\.val=21 must be at most 20: each class trains from one image"):
        class_folders(tmp_path / "photos", val=21).write(tmp_path / "more")


@pytest.mark.parametrize(
    ("spoil", "changes", "said"),
    [
        (None, {"root": None}, r"^root must be given: root=/path/to"),
        (None, {"root": "/no/where"}, r"^root=/no/where is not a folder"),
        (None, {"num_labels": 1000}, r"3 class folders, but data\.num_labels=1000: give data\.num_labels=3"),
        (None, {"image_size": 0}, r"source\.image_size=0"),
        (None, {"format": "gif"}, r"source\.format=gif must be one of png, jpg, webp"),
        (None, {"quality": 0}, r"source\.quality=0"),
        (None, {"shard_size": 0}, r"source\.shard_size=0"),
        (None, {"num_workers": -1}, "num_workers=-1"),
        (None, {"caption": "a photo of {label}"}, r"source\.caption=.*\{name\}"),
        (None, {"names": "/no/where"}, r"source\.names=/no/where cannot be read"),
        ("names", {}, r"source\.names=.* has no name for 2 classes, the first is n02"),
        ("no train", {}, r"root=.* has val/<class>/ and no train/<class>/"),
        ("flat val", {}, r"root=.*: val/ has no class folders: move each image to val/<class>/"),
        ("more classes in val", {}, r"root=.*: val/n04 is a class that train/ does not have"),
        ("an empty class", {}, r"root=.*: train/n00 holds no files \*\.\{png,jpg,jpeg,webp\}"),
        ("an empty val", {}, r"root=.*: val/n00 holds no files"),
    ],
)
def test_class_folders_that_are_not_as_they_should_be(classes, tmp_path, spoil, changes, said):
    if spoil == "names":
        (tmp_path / "names.txt").write_text("n01 goldfish\nn02\nn04 other\n")
        changes = {"names": str(tmp_path / "names.txt")}
    elif spoil == "no train":
        (classes / "train").rename(classes / "training")
    elif spoil in ("flat val", "an empty val"):
        (classes / "val").rename(classes / "validation")
        (classes / "val").mkdir()
        if spoil == "flat val":
            put(classes / "val", {"a.jpg": picture()})
        else:
            (classes / "train" / "n00").mkdir()
            put(classes / "train" / "n00", {"a.jpg": picture()})
            (classes / "val" / "n00").mkdir()
    elif spoil == "more classes in val":
        (classes / "val" / "n04").mkdir()
    elif spoil == "an empty class":
        (classes / "train" / "n00").mkdir()
    with pytest.raises(UserError, match=said) as error:
        class_folders(classes, **changes).write(tmp_path / "d")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "d").exists()


@pytest.mark.full  # of any shards: test_shards.py
@pytest.mark.slow
def test_processes_and_ranks_change_no_byte(classes, tmp_path):
    hostile(classes / "train" / "n02")
    class_folders(classes).write(tmp_path / "alone")
    class_folders(classes, num_workers=2).write(tmp_path / "workers")
    for rank in range(2):
        class_folders(classes).write(tmp_path / "ranks", rank=rank, world_size=2)
    assert contents(tmp_path / "alone") == contents(tmp_path / "workers") == contents(tmp_path / "ranks")
    assert not class_folders(classes, num_workers=3).write(tmp_path / "alone")


def test_other_parameters_need_overwrite(classes, tmp_path):
    class_folders(classes).write(tmp_path / "d")
    assert not class_folders(classes).write(tmp_path / "d")
    with pytest.raises(UserError, match=r"data\.root=.* made with image_size=16, not 24: .*overwrite=true"):
        class_folders(classes, image_size=24).write(tmp_path / "d")
    assert class_folders(classes, image_size=24).write(tmp_path / "d", overwrite=True)


def test_captioned_images_keep_their_bytes(tmp_path):
    files = {f"a/{i}.jpg": picture(i) for i in range(6)} | {f"a/{i}.txt": f"number {i}\n" for i in range(6)}
    files |= {"b/x.y.WEBP": picture(7, format="WEBP"), "b/x.y.json": '{"caption": "a json", "source": "web"}'}
    files |= {"b/two.png": picture(8, format="PNG"), "b/two.jpeg": picture(9), "b/two.txt": "both"}
    put(tmp_path / "images", files)
    captioned(tmp_path / "images").write(tmp_path / "d")
    train, val = read(tmp_path / "d", "train"), read(tmp_path / "d", "val")
    assert (len(train), len(val)) == (7, 2)
    samples = train | val
    assert set(samples) == {*(f"a/{i}" for i in range(6)), "b/x%2Ey", "b/two+png", "b/two+jpeg"}
    assert samples["a/3"]["jpg"] == files["a/3.jpg"]
    assert samples["a/3"]["txt"] == b"number 3\n"
    assert samples["b/x%2Ey"]["webp"] == files["b/x.y.WEBP"]
    assert json.loads(samples["b/x%2Ey"]["json"])["source"] == "web"
    assert samples["b/two+jpeg"]["txt"] == samples["b/two+png"]["txt"] == b"both"
    assert rejected(tmp_path / "d") == {}
    decoder = ImageDecoder(image_size=8, center_crop=True)
    stream = ShardStream(shard_paths(tmp_path / "d", read_manifest(tmp_path / "d"), "train"), decoder)
    assert {sample["key"]: sample["caption"] for sample in stream}.items() <= {
        **{f"a/{i}": f"number {i}" for i in range(6)},
        "b/x%2Ey": "a json",
        "b/two+png": "both",
        "b/two+jpeg": "both",
    }.items()


def test_captioned_images_can_be_cropped(tmp_path):
    put(tmp_path / "images", {f"{i}.jpg": picture(i) for i in range(4)} | {f"{i}.txt": "x" for i in range(4)})
    captioned(tmp_path / "images", image_size=16, format="png").write(tmp_path / "d")
    for key, sample in (read(tmp_path / "d", "train") | read(tmp_path / "d", "val")).items():
        original = decode_image((tmp_path / "images" / f"{key}.jpg").read_bytes())
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), np.asarray(center_crop(original, 16)))
    assert read_manifest(tmp_path / "d")["image_size"] == 16


def test_train_and_val_are_the_splits_where_both_are_there(tmp_path):
    files = {f"{part}/{i}.jpg": picture(i) for part in ("train", "val") for i in range(3)}
    put(tmp_path / "images", files | {path.replace("jpg", "txt"): path for path in files})
    captioned(tmp_path / "images", val=99).write(tmp_path / "d")
    assert {sample["txt"] for sample in read(tmp_path / "d", "val").values()} == {
        f"val/{i}.jpg".encode() for i in range(3)
    }
    assert set(read(tmp_path / "d", "train")) == {"0", "1", "2"}


def test_bad_captions_and_images_are_rejected_with_their_reason(tmp_path):
    folder = tmp_path / "images" / "train"
    put(tmp_path / "images", {f"{part}/{i}.jpg": picture(i) for part in ("train", "val") for i in range(2)})
    put(tmp_path / "images", {f"{part}/{i}.txt": "good" for part in ("train", "val") for i in range(2)})
    reasons = hostile(folder)
    put(folder, {f"{Path(name).stem}.txt": "x" for name in [*reasons, "line.png"]})
    captions = {
        "none": None,
        "blank": ("txt", " \n"),
        "latin": ("txt", "caf\xe9".encode("latin-1")),
        "long": ("txt", b"x" * (2**20 + 1)),
        "list": ("json", "[1]"),
        "deep": ("json", "[" * 100_000),
        "number": ("json", '{"caption": 3}'),
        "without": ("json", '{"label": 3}'),
    }
    for name, caption in captions.items():
        put(folder, {f"{name}.jpg": picture()} | ({} if caption is None else {f"{name}.{caption[0]}": caption[1]}))
    captioned(tmp_path / "images").write(tmp_path / "d")
    reasons |= {
        "none.jpg": Reason.NO_CAPTION.value,
        "blank.jpg": Reason.NO_CAPTION.value,
        "latin.jpg": Reason.BAD_CAPTION.value,
        "long.jpg": Reason.OVERSIZE_ENTRY.value,
        "list.jpg": Reason.BAD_METADATA.value,
        "deep.jpg": Reason.BAD_METADATA.value,
        "number.jpg": Reason.BAD_CAPTION.value,
        "without.jpg": Reason.NO_CAPTION.value,
    }
    assert rejected(tmp_path / "d") == {f"train/{name}": reason for name, reason in reasons.items()}
    assert set(read(tmp_path / "d", "train")) == {"0", "1", "line"}


def test_images_without_captions_are_not_held_out(tmp_path):
    put(tmp_path / "images", {f"{i}.jpg": picture(i) for i in range(30)} | {f"{i}.txt": "x" for i in range(3)})
    captioned(tmp_path / "images").write(tmp_path / "d")
    assert len(read(tmp_path / "d", "val")) == 2
    assert len(rejected(tmp_path / "d")) == 27


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, r"^root=.* holds no files \*\.\{png,jpg,jpeg,webp\} or the like$"),
        ({"x.txt": "only text"}, r"^root=.* holds no files .*; it has \.txt 1$"),
        ({f"{i}.heic": b"" for i in range(3)}, r"^root=.* holds no files .*; it has \.heic 3$"),
        ({"train/a.jpg": b"", "val/a.txt": b""}, r"^root=.*/val holds no files"),
        ({f"{i}.jpg": b"" for i in range(2)}, r"source\.val=2 must be in 1 to 1: root has 2 files"),
        (
            {f"{i}.jpg": b"" for i in range(5)} | {"0.txt": "x"},
            r"no sample of the train split can be used \((no caption|image cannot be decoded): \d",
        ),
    ],
)
def test_folders_without_anything_to_use(tmp_path, files, said):
    put(tmp_path / "images", files).mkdir(exist_ok=True)
    with pytest.raises(UserError, match=said):
        captioned(tmp_path / "images").write(tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_clips_keep_their_bytes_and_bad_ones_are_rejected(tmp_path):
    good = video()
    files = {"a.mp4": good, "a.txt": "a clip", "deep/b.MP4": video(2), "c.mp4": good, "c.json": '{"caption": "c"}'}
    bad = {"text.mp4": "no clip", "empty.webm": b"", "cut.mov": good[: len(good) // 2], "latin.mp4": good}
    put(tmp_path / "clips" / "train", files | bad | {"latin.txt": b"caf\xe9"})
    put(tmp_path / "clips" / "val", {"a.mp4": good})
    clips(tmp_path / "clips").write(tmp_path / "d")
    samples = read(tmp_path / "d", "train")
    assert {key: sample["mp4"] for key, sample in samples.items()} == {
        "a": good,
        "deep/b": files["deep/b.MP4"],
        "c": good,
    }
    assert samples["a"]["txt"] == b"a clip"
    assert "txt" not in samples["deep/b"]
    reasons = rejected(tmp_path / "d")
    assert reasons.keys() == {f"train/{name}" for name in bad}
    assert reasons["train/text.mp4"] == Reason.UNDECODABLE_VIDEO.value
    assert reasons["train/latin.mp4"] == Reason.BAD_CAPTION.value


def test_keys_are_safe_and_tell_all_files_apart():
    paths = ["a/b.c.jpg", "a/b%2Ec.jpg", "a b.png", "a+b.png", "é.jpg", "x.jpg", "x.png", "x+jpg.jpg", "d.d/y.jpg"]
    paths.append(os.fsdecode(b"\xff.jpg"))
    keys = make_keys(paths)
    assert len(set(keys)) == len(paths)
    assert all(re.fullmatch(r"[A-Za-z0-9/%+_-]+", key) for key in keys)
    assert keys[0] == "a/b%2Ec"
    assert make_keys(["n01440764/n01440764_10026.JPEG"]) == ["n01440764/n01440764_10026"]


def test_listing_follows_links_but_no_loop(tmp_path):
    put(tmp_path / "a", {"x.jpg": b"", "sub/y.JPG": b"", "sub/z.txt": b"", ".hidden/h.jpg": b"", ".h.jpg": b""})
    put(tmp_path / "b", {"far.jpg": b""})
    (tmp_path / "a" / "sub" / "up").symlink_to("..")
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    assert list_files(tmp_path / "a", ("jpg",)) == ["other/far.jpg", "sub/y.JPG", "x.jpg"]


KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "avif": "AVIF",
         "jfif": "JPEG", "JPG": "JPEG", "jp2": "JPEG2000"}  # fmt: skip


def test_pictures_of_every_kind_are_read_and_other_files_are_told(tmp_path, caplog):
    kinds = {suffix: format for suffix, format in KINDS.items() if format in IMAGE_FORMATS}
    files = {}
    for suffix, format in kinds.items():
        files |= {f"{suffix}_{i}.{suffix}": picture(i, format=format) for i in range(3)}
        files |= {f"{suffix}_{i}.txt": "a picture" for i in range(3)}
    others = {f"a/x{i}.heic": b"x" for i in range(4)} | {"b.svg": b"<svg/>", "README": b"", "notes.txt": b"of nothing"}
    clutter = {".DS_Store": b"", "a/._y.jpg": b"x", "__MACOSX/z.jpg": b"x", "Thumbs.db": b"", "a/desktop.ini": b""}
    put(tmp_path / "images", files | others | clutter | {"a/x0.txt": b"of what is left out"})
    caplog.set_level("INFO")
    captioned(tmp_path / "images").write(tmp_path / "d")
    samples = read(tmp_path / "d", "train") | read(tmp_path / "d", "val")
    assert len(samples) == 3 * len(kinds)
    assert all(suffix.lower() in samples[f"{suffix}_0"] for suffix in kinds)
    assert rejected(tmp_path / "d") == {
        **{f"a/x{i}.heic": "other kind of file: .heic" for i in range(4)},
        "b.svg": "other kind of file: .svg",
        "README": "other kind of file: without a suffix",
        "notes.txt": "caption of no file",
    }
    last = caplog.records[-1].getMessage()
    assert last.startswith("left out 7 files: .heic 4, ")
    assert last.endswith(f"caption of no file 1, see {tmp_path / 'd' / 'rejected.jsonl'}")
    decoder = ImageDecoder(image_size=8, center_crop=True)
    stream = ShardStream(shard_paths(tmp_path / "d", read_manifest(tmp_path / "d"), "train"), decoder)
    assert len(list(stream)) == 3 * len(kinds) - 2
    assert (stream.skipped(), stream.noted()) == ({}, {})


def test_what_class_folders_hold_beside_images_is_told(classes, tmp_path, caplog):
    put(classes, {"train/n01/a.gif": picture(format="GIF"), "train/n01/b.mp4": b"x", "train/loose.jpg": picture()})
    put(classes, {"test/c.jpg": picture(), "LICENSE": b"", "val/n02/d.xml": b"", "val/n02/._e.jpg": b"x"})
    class_folders(classes).write(tmp_path / "d")
    assert "n01/a" in read(tmp_path / "d", "train")
    assert rejected(tmp_path / "d") == {
        "train/n01/b.mp4": "other kind of file: .mp4",
        "val/n02/d.xml": "other kind of file: .xml",
        "train/loose.jpg": "not in a folder that is read",
        "test/": "not in a folder that is read",
        "LICENSE": "not in a folder that is read",
    }
    assert "left out 5 files: not in a folder that is read 3, .mp4 1, .xml 1, see" in caplog.text


def test_what_is_used_all_the_same_is_told(classes, tmp_path, caplog):
    cut = [classes / "train" / "n02" / f"n02_{i}.JPEG" for i in range(3)]
    for path in cut:
        path.write_bytes(path.read_bytes()[:-2])
    class_folders(classes).write(tmp_path / "d")
    assert rejected(tmp_path / "d") == {}
    assert caplog.records[-1].getMessage() == "used 3 all the same (JPEG without its end marker: 3)"


def here(workspace, monkeypatch, arguments):
    """Runs the command in this process."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("GRN_DATA", str(workspace / "data"))
    monkeypatch.setenv("GRN_RUNS", str(workspace / "runs"))
    monkeypatch.setattr(sys, "argv", ["grn.prepare", *arguments.split()])
    prepare.main()


@pytest.mark.full
def test_the_command_goes_on_after_being_killed(tmp_path, monkeypatch):
    """SIGKILL of the first process alone: its worker ends with it, and what is finished stays."""
    folders = [f"{part}/{label}" for part in ("train", "val") for label in "ab"]
    put(tmp_path / "images", {f"{folder}/{i}.jpg": picture(i, (500, 400)) for folder in folders for i in range(20)})
    arguments = f"data=imagenet root={tmp_path / 'images'} data.num_labels=2 source.shard_size=2"
    root, partial = tmp_path / "data" / "imagenet256", tmp_path / "data" / ".imagenet256.partial"
    environment = {
        "GRN_DATA": tmp_path / "data",
        "GRN_RUNS": tmp_path / "runs",
        "PYTHONPATH": Path(__file__).parents[2],
    }
    environment = os.environ | {key: str(value) for key, value in environment.items()}
    process = commands.Command("grn.prepare", *arguments.split(), "num_workers=1", env=environment)
    deadline = time.monotonic() + 120
    while len(list(partial.glob("*-0*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not root.exists()
    time.sleep(1)  # whatever the worker was at
    before = {path.name: path.stat().st_mtime_ns for path in (partial / "shards").glob("*.tar")}
    finished = {f"{path.stem}.tar" for path in partial.glob("*-0*.json")}
    assert 3 <= len(finished) < 40

    here(tmp_path, monkeypatch, f"{arguments} num_workers=0")
    assert all((root / name).stat().st_mtime_ns == before[name] for name in finished)
    assert not partial.exists()
    class_folders(tmp_path / "images", image_size=256, num_labels=2, shard_size=2).write(tmp_path / "whole")
    assert contents(root) == contents(tmp_path / "whole")
    here(tmp_path, monkeypatch, arguments)
    assert "is up to date: nothing to do" in (tmp_path / "runs" / "prepare" / "prepare.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("data=imagenet", r"^error: root must be given: root=/path/to"),
        ("data=imagenet root=/no/where", r"^error: root=/no/where is not a folder"),
        ("data=imagenet root=images data.num_labels=5", r"^error: root=.* data\.num_labels=5: give data\.num_labels=2"),
        ("data=imagenet root=images data.root=null", r"^error: data\.root must be given"),
        (
            "data=captioned_image root=images/train source.val=1000",
            r"^error: source\.val=1000 must be in 1 to 1: root has 2 files",
        ),
        (
            "data=captioned_image root=images",
            r"^error: source: no sample of the train split can be used \(no caption: 2\)",
        ),
        (
            "data=video root=images",
            r"^error: root=.*images/train holds no files \*\.{mp4,webm,mkv,mov} or the like; it has \.jpg 2",
        ),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path, monkeypatch, arguments, said):
    put(tmp_path / "images", {f"{part}/{label}/1.jpg": picture() for part in ("train", "val") for label in "ab"})
    with pytest.raises(SystemExit) as exit:
        here(tmp_path, monkeypatch, f"{arguments} num_workers=0")
    assert re.search(said, exit.value.code)
    assert "\n" not in exit.value.code
