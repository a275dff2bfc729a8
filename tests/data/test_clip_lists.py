"""JSON-lines files of clips as sources: what is read of the shards is what the lines say of the videos."""

import json
import os
from fractions import Fraction

import pytest
import torch
from test_folders import contents, here, put, read, rejected
from test_text_videos import clip, make, png, write
from test_video import numbered_video, patched, read_numbers

from grn.data.clips import ClipDecoder
from grn.data.manifest import read_manifest
from grn.data.prepare.clip_lists import (
    CLOCK,
    MAX_LINE_BYTES,
    ClipList,
    draw_files,
    frame_ids,
    image_source,
    list_lines,
    path_of,
    video_source,
)
from grn.data.prepare.folders import CaptionedClips, Clips
from grn.data.prepare.shards import shard_paths
from grn.media.skips import Reason, Skip
from grn.runtime.errors import UserError


def line(path, begin=None, end=None, fps=16, **more):
    section = {"begin_frame_id": begin, "end_frame_id": end, "fps": fps}
    section = {name: value for name, value in section.items() if value is not None}
    return {"video_path": path, "caption": f"{path} from {begin}"} | section | more


def jsonl(path, lines):
    """Of objects, or of lines as they are (bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(it if isinstance(it, bytes) else json.dumps(it).encode() for it in lines) + b"\n")
    return str(path)


def source(root, **changes):
    return ClipList(**({"root": root, "name": "clips", "val": 1, "shard_size": 3, "num_workers": 0} | changes))


def all_of(root):
    return read(root, "train") | read(root, "val")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Of 90 frames, 16 a second, with a keyframe every 12 at least; and two others."""
    folder = tmp_path_factory.mktemp("videos")
    put(folder, {"long.mp4": numbered_video(90, fps=16), "deep/short.mp4": clip(20)})
    for name in ("second.mp4", "third.mp4"):
        (folder / name).hardlink_to(folder / "long.mp4")
    put(folder, {"other.webm": numbered_video(48, "webm", "libvpx", fps=24)})
    return folder


SECTIONS = [(0, 90), (0, 17), (11, 30), (12, 29), (13, 60), (40, 57), (73, 90), (60, 9999), (80, None)]


def test_parts_of_a_video_are_those_of_the_whole_file(videos, tmp_path):
    """Decoded as training does, from what was cut out and from the whole with the lines' own numbers: the same bits."""
    lines = [line("long.mp4", *section) for section in SECTIONS[:-1]] + [line("second.mp4", *SECTIONS[-1])]
    source(jsonl(videos / "list.jsonl", lines)).write(tmp_path / "d")
    samples = all_of(tmp_path / "d")
    assert sorted(samples) == [f"{number:09d}" for number in range(1, 10)]
    assert rejected(tmp_path / "d") == {}

    data, entries, originals = (videos / "long.mp4").read_bytes(), {}, {}
    for number, own in enumerate(lines, 1):
        key = f"{number:09d}"
        entries |= {f"{key}.{suffix}": samples[key][suffix] for suffix in ("mp4", "txt", "json")}
        originals |= {f"{key}.mp4": data, f"{key}.json": json.dumps(own).encode(), f"{key}.txt": b"x"}
    whole = make(write(tmp_path / "whole.tar", originals), resolutions=[[32, 32]])
    cut = make(write(tmp_path / "cut.tar", entries), resolutions=[[32, 32]])
    for number, (begin, end) in enumerate(SECTIONS, 1):
        key = f"{number:09d}"
        for draw in range(3):
            found, expected = (
                next(
                    module.decoder(training=True)(raw, draw)
                    for raw in module._stream("val").shard(module.urls("train")[0])
                    if raw["__key__"] == key
                )
                for module in (cut, whole)
            )
            assert torch.equal(found["pixels"], expected["pixels"])
            shown = read_numbers(found["pixels"])
            assert shown == list(range(shown[0], shown[0] + len(shown)))
            assert begin <= shown[0] <= shown[-1] < (end or 90)
    sizes = [len(samples[f"{number:09d}"]["mp4"]) for number in range(1, 10)]
    assert sizes[5] < sizes[0] / 2


def test_tokenizers_see_the_parts_alone(videos, tmp_path):
    """Of what was cut out, which begins at the keyframe before."""
    lines = [line("long.mp4", begin, end) for begin, end in SECTIONS[:-1]]
    lines = [*lines, line("second.mp4", *SECTIONS[-1]), line("second.mp4", 5, 13)]
    source(jsonl(videos / "list.jsonl", lines)).write(tmp_path / "d")
    samples, decode = all_of(tmp_path / "d"), ClipDecoder(image_size=32, frames=9, fps=(16,), training=True)
    assert any(json.loads(sample["json"])["begin_frame_id"] > 0 for sample in samples.values())
    for number, (begin, end) in enumerate(SECTIONS, 1):
        sample = samples[f"{number:09d}"] | {"__key__": "x"}
        clips = [read_numbers(decode(sample, draw)["pixels"]) for draw in range(3)]
        for shown in clips:
            assert shown == list(range(shown[0], shown[0] + 9))
            assert begin <= shown[0] <= shown[-1] < (end or 90)
    with pytest.raises(Skip) as caught:
        decode(samples["000000010"] | {"__key__": "x"}, 0)
    assert caught.value.reason is Reason.CLIP_TOO_SHORT


@pytest.mark.parametrize("val", [1, 2, 3, 4])
def test_the_parts_of_a_video_stay_in_one_split(videos, tmp_path, val):
    names = ["long.mp4", "second.mp4", "deep/../long.mp4", "third.mp4", str(videos / "second.mp4"), "third.mp4"]
    path = jsonl(videos / "list.jsonl", [line(name, 9 * i, 9 * i + 9) for i, name in enumerate(names)])
    splits = {}
    for seed in range(4):
        source(path, val=val, seed=seed).write(tmp_path / str(seed))
        keys = {split: {int(key) for key in read(tmp_path / str(seed), split)} for split in ("train", "val")}
        assert len(keys["val"]) == (2 if val <= 2 else 4)
        for parts in ({1, 3}, {2, 5}, {4, 6}):
            assert parts <= keys["train"] or parts <= keys["val"]
        splits[seed] = frozenset(keys["val"])
    assert len(set(splits.values())) > 1


def test_an_unusable_line_is_a_video_of_its_own(videos, tmp_path):
    lines = [b"x", b'{"video_path": ""}', b"{}", b"[" * 10_000, line("\ud800"), line("long.mp4"), line("second.mp4")]
    path = jsonl(videos / "list.jsonl", lines)
    found = list_lines("root", path)[0]
    assert [path_of(it, "video_path") for it in found] == [None, None, None, None, "\ud800", "long.mp4", "second.mp4"]
    assert [len(draw_files(found, videos, count, 0, "video_path")) for count in range(8)] == list(range(8))


def test_what_a_sample_has(videos, tmp_path):
    lines = [
        line("long.mp4", 40, 57, shots=["café"]),
        line("deep/short.mp4", fps=None),
        line(str(videos / "long.mp4"), 3, 20, fps=16.0),
        line("./deep/../long.mp4", 3, 20, caption=" spaced\n"),
        line("long.mp4", 25, 50, fps=10),  # counted at another rate than the video's
        line("other.webm", 30, 48, fps=24),
    ]
    source(jsonl(videos / "list.jsonl", lines)).write(tmp_path / "d")
    samples = all_of(tmp_path / "d")
    first = json.loads(samples["000000001"]["json"])
    assert (first["fps"], first["end_frame_id"] - first["begin_frame_id"], first["shots"]) == (16, 17, ["café"])
    assert 0 <= first["begin_frame_id"] < 40
    assert samples["000000001"]["txt"] == b"long.mp4 from 40"
    assert samples["000000002"]["mp4"] == (videos / "deep/short.mp4").read_bytes()
    assert samples["000000003"]["mp4"] == samples["000000004"]["mp4"]
    assert samples["000000004"]["txt"] == b"spaced"
    fifth = json.loads(samples["000000005"]["json"])
    assert (fifth["end_frame_id"] - fifth["begin_frame_id"]) / fifth["fps"] == 2.5
    assert samples["000000006"]["webm"]


def test_numbers_of_frames_keep_the_times():
    assert frame_ids(Fraction(5, 24), Fraction(2), 24) == {"begin_frame_id": 5, "end_frame_id": 48, "fps": 24}
    assert frame_ids(Fraction(5, 24), None, 24.0) == {"begin_frame_id": 5, "fps": 24.0}
    ntsc = frame_ids(Fraction(1001, 30000) * 7, Fraction(1001, 3000), 30000 / 1001)
    assert (ntsc["begin_frame_id"], ntsc["end_frame_id"]) == (7, 10)
    odd = frame_ids(Fraction(333, 1000), Fraction(4, 3), 30)
    assert odd == {"begin_frame_id": 29970, "end_frame_id": 120000, "fps": CLOCK}
    assert frame_ids(Fraction(333, 1000), Fraction(10**12), 30)["end_frame_id"] == 2**40


def hostile(videos, tmp_path):
    """Lines that must be rejected, and why."""
    put(tmp_path, {"secret.mp4": clip(20)})
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "text.mp4").write_bytes(b"no video")
    (videos / "torn.mp4").write_bytes((videos / "long.mp4").read_bytes()[:2000])
    (videos / "index.mp4").write_bytes(patched((videos / "long.mp4").read_bytes(), b"stsz", 8, ">I", 2**31))
    (videos / "note.txt").write_bytes(b"a note")
    if not (videos / "pipe.mp4").exists():
        os.mkfifo(videos / "pipe.mp4")
    away = os.path.relpath(tmp_path / "secret.mp4", videos)
    return [
        (b"not JSON", Reason.BAD_METADATA),
        (b'{"video_path": "long.mp4", "caption": "cut', Reason.BAD_METADATA),
        (b"[1, 2]", Reason.BAD_METADATA),
        (b"[" * 100_000, Reason.BAD_METADATA),
        (b'{"caption": "\xff"}', Reason.BAD_METADATA),
        (b'{"fps": ' + b"9" * 10_000 + b"}", Reason.BAD_METADATA),
        (b"x" * (3 * MAX_LINE_BYTES), Reason.OVERSIZE_ENTRY),
        (line("long.mp4", 0, 20, more="é" * (MAX_LINE_BYTES // 5)), Reason.OVERSIZE_ENTRY),
        ({"caption": "x"}, Reason.NO_PATH),
        (line(None), Reason.NO_PATH),
        (line(["long.mp4"]), Reason.NO_PATH),
        (line(""), Reason.NO_PATH),
        (line("long.mp4\0"), Reason.NO_PATH),
        (line("\ud800.mp4", caption="x"), Reason.NO_PATH),
        (line(str(tmp_path / "secret.mp4"), 0, 9), Reason.OUTSIDE_FOLDER),
        (line(away), Reason.OUTSIDE_FOLDER),
        (line("deep/../" + away, 0, 9), Reason.OUTSIDE_FOLDER),
        (line("/dev/zero"), Reason.OUTSIDE_FOLDER),
        (line("."), "no video (no suffix)"),
        (line("note.txt"), "no video (*.txt)"),
        (line("gone.mp4"), Reason.UNREADABLE_FILE),
        (line("gone.mp4", 0, 9), Reason.UNREADABLE_FILE),
        (line("x" * 5000 + ".mp4", 0, 9), Reason.UNREADABLE_FILE),
        (line("x" * 5000 + ".mp4"), Reason.UNREADABLE_FILE),
        (line("pipe.mp4", 0, 9), Reason.UNREADABLE_FILE),
        (line("empty.mp4", 0, 9), Reason.UNREADABLE_FILE),
        (line("text.mp4", 0, 9), Reason.UNDECODABLE_VIDEO),
        (line("text.mp4"), Reason.UNDECODABLE_VIDEO),
        (line("torn.mp4", 0, 9), Reason.UNDECODABLE_VIDEO),
        (line("index.mp4", 0, 9), Reason.UNDECODABLE_VIDEO),
        (line("long.mp4", 20, 20), Reason.BAD_SECTION),
        (line("long.mp4", 30, 20), Reason.BAD_SECTION),
        (line("long.mp4", -1, 20), Reason.BAD_SECTION),
        (line("long.mp4", 90, 99), Reason.BAD_SECTION),
        (line("long.mp4", 2**50, 2**51), Reason.BAD_SECTION),
        (line("long.mp4", 0, 10**300), Reason.BAD_SECTION),
        (line("long.mp4", 0.5, 20), Reason.BAD_SECTION),
        (line("long.mp4", True, 20), Reason.BAD_SECTION),
        (line("long.mp4", 0, 20, fps=None), Reason.BAD_SECTION),
        (line("long.mp4", 0, 20, fps=0), Reason.BAD_SECTION),
        (line("long.mp4", 0, 20, fps=float("nan")), Reason.BAD_SECTION),
        (line("long.mp4", 0, 20, fps=float("inf")), Reason.BAD_SECTION),
        (line("long.mp4", 0, 20, fps=1e-300), None),  # the whole, by a silly rate
        (line("long.mp4", 0, 20, caption=3), Reason.BAD_CAPTION),
        (line("long.mp4", 0, 20, caption=["x"]), Reason.BAD_CAPTION),
        (line("long.mp4", 0, 20, caption="\udc00"), Reason.BAD_CAPTION),
        (line("long.mp4", 0, 20, caption=" "), Reason.NO_CAPTION),
        (line("long.mp4", 0, 20, caption=None), Reason.NO_CAPTION),
    ]


def test_bad_lines_are_rejected_with_their_reason(videos, tmp_path):
    bad = hostile(videos, tmp_path)
    path = jsonl(videos / "list.jsonl", [line("long.mp4", 0, 20), b"", b"  \r", *(it for it, _ in bad)])
    jsonl(videos / "val.jsonl", [line("long.mp4", 20, 40)])
    source(path, val=str(videos / "val.jsonl")).write(tmp_path / "d")
    expected = {f"list.jsonl:{number}": getattr(it, "value", it) for number, (_, it) in enumerate(bad, 4) if it}
    assert rejected(tmp_path / "d") == expected
    good = {number for number, (_, it) in enumerate(bad, 4) if not it} | {1}
    assert set(read(tmp_path / "d", "train")) == {f"{number:09d}" for number in good}
    assert len(read(tmp_path / "d", "val")) == 1


def test_links_of_the_folder_are_followed_and_videos_may_lie_elsewhere(videos, tmp_path):
    (tmp_path / "farm").mkdir()
    for name in ("linked.mp4", "other.mp4"):
        (tmp_path / "farm" / name).symlink_to(videos / "long.mp4")
    lines = [line("linked.mp4", 0, 20), line("other.mp4", 20, 40), line(str(videos / "long.mp4"), 0, 9)]
    path = jsonl(tmp_path / "lists" / "list.jsonl", lines)
    source(path, folder=str(tmp_path / "farm")).write(tmp_path / "d")
    assert len(all_of(tmp_path / "d")) == 2
    assert rejected(tmp_path / "d") == {"list.jsonl:3": Reason.OUTSIDE_FOLDER.value}


def test_captions_may_be_optional(videos, tmp_path):
    path = jsonl(videos / "list.jsonl", [{"video_path": "long.mp4"}, {"video_path": "second.mp4"}])
    with pytest.raises(UserError, match=r"no sample of the (train|val) split can be used \(no caption: 1\)"):
        source(path).write(tmp_path / "d")
    source(path, captioned=False).write(tmp_path / "e")
    assert [sample.keys() & {"mp4", "txt"} for sample in all_of(tmp_path / "e").values()] == [{"mp4"}, {"mp4"}]


def test_the_shards_depend_on_the_lines_and_the_seed_alone(videos, tmp_path):
    names = ["long.mp4", "second.mp4", "third.mp4"]
    lines = [line(names[begin % 3], begin, begin + 9) for begin in range(0, 80, 8)]
    path = jsonl(videos / "list.jsonl", lines)
    source(path).write(tmp_path / "one")
    for rank in range(2):
        source(path).write(tmp_path / "two", rank=rank, world_size=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    source(path, seed=1).write(tmp_path / "other")
    assert list(read(tmp_path / "other", "train")) != list(read(tmp_path / "one", "train"))
    assert not source(path).write(tmp_path / "one")
    jsonl(videos / "list.jsonl", [*lines[:-1], line("long.mp4", 0, 20)])
    with pytest.raises(UserError, match=r"data\.root=.* holds data made with lines="):
        source(path).write(tmp_path / "one")
    assert source(path).write(tmp_path / "one", overwrite=True)


@pytest.mark.parametrize(
    ("lines", "changes", "said"),
    [
        ([], {}, r"^root: .*list\.jsonl has no lines; one a file is needed"),
        ([b" ", b""], {}, r"^root: .*list\.jsonl has no lines"),
        ([line("long.mp4")], {}, r"^source\.val=1 must be in 1 to 0, as root=.* has 1 lines, or be the path of"),
        (
            [line("long.mp4")] * 3,
            {"val": 2},
            r"^source\.val=2 of the 3 lines of root=.* leaves no file for training, as the parts of a file stay",
        ),
        ([b"x"] * 3, {}, r"^source: no sample of the train split can be used \(metadata is not a JSON object: 2\)"),
        ([line("long.mp4")] * 3, {"val": "/no/where"}, r"^source\.val: no file /no/where"),
        ([line("long.mp4")] * 3, {"val": "/dev/zero"}, r"^source\.val: no file /dev/zero"),
        ([line("long.mp4")] * 3, {"folder": "/no/where"}, r"^source\.folder=/no/where is not a folder"),
        ([line("long.mp4"), line("second.mp4")], {"shard_size": 0}, r"^source\.shard_size=0"),
    ],
)
def test_lists_without_anything_to_use(videos, tmp_path, lines, changes, said):
    path = jsonl(videos / "list.jsonl", lines)
    with pytest.raises(UserError, match=said) as error:
        source(path, **changes).write(tmp_path / "d")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "d").exists()


def test_the_root_tells_a_folder_from_a_list(videos, tmp_path):
    path = jsonl(videos / "list.jsonl", [line("long.mp4")])
    keys = {"name": "clips", "val": 1}
    assert video_source(root=path, captioned=True, **keys) == ClipList(root=path, **keys)
    assert type(video_source(root=str(videos), captioned=True, **keys)) is CaptionedClips
    assert type(video_source(root=str(videos), captioned=False, **keys)) is Clips
    for changes in ({"val": path}, {"folder": str(videos)}):
        with pytest.raises(UserError, match=rf"source\.{next(iter(changes))} names a file or folder .*root=.* is none"):
            video_source(**({"root": str(videos), "captioned": True} | keys | changes))


def test_a_folder_with_captions_beside_the_videos(moving_digits, tmp_path):
    """A caption of x.json alone is read, too, and a video without one is rejected."""
    folder = moving_digits(tmp_path / "videos", 4)
    (folder / "000.txt").unlink()
    (folder / "001.txt").unlink()
    (folder / "001.json").write_text('{"caption": "in JSON", "begin_frame_id": 24, "end_frame_id": 40, "fps": 24}')
    keys = {"root": str(folder), "name": "clips", "captioned": True, "val": 1, "num_workers": 0}
    video_source(**keys).write(tmp_path / "d")
    assert rejected(tmp_path / "d") == {"000.mp4": Reason.NO_CAPTION.value}
    found = {}
    for split in ("train", "val"):
        for shard in shard_paths(tmp_path / "d", read_manifest(tmp_path / "d"), split):
            for batch in make(shard, resolutions=[[32, 48]], max_frames=33).val_dataloader():
                found |= dict(zip(batch["caption"], batch["pixels"]))
    assert found.keys() == {"in JSON", "digit 2 moving right", "digit 3 moving right"}
    assert {caption: pixels.shape[1] for caption, pixels in found.items()}["in JSON"] == 9


KINDS = [{"type": "short", "content": "a dog"}, {"type": "long", "content": "A dog runs. It is brown. "}]


def test_captions_by_kind(videos, tmp_path):
    """Of the authors' toy data: several captions by kind, and what goes with them, stay as keys of key.json."""
    lines = [
        line("long.mp4", 0, 20, caption=KINDS, quality_prompt="sharp."),
        line("second.mp4", caption=[{"type": "title", "content": "Dogs"}]),
        line("third.mp4", caption=KINDS[:1] * 2),
        line("third.mp4", caption=[{"content": "no type"}]),
        line("third.mp4", caption=[{"type": "A kind!", "content": "x"}]),
        line("third.mp4", caption=[{"type": "short", "content": " "}]),
    ]
    source(jsonl(videos / "list.jsonl", lines), val=1).write(tmp_path / "d")
    samples = all_of(tmp_path / "d")
    assert sorted(samples) == ["000000001", "000000002"]
    assert {*rejected(tmp_path / "d").values()} == {Reason.BAD_CAPTION.value, Reason.NO_CAPTION.value}
    metadata = json.loads(samples["000000001"]["json"])
    assert metadata["short_caption"] == "a dog"
    assert metadata["long_caption"] == "A dog runs. It is brown."
    assert metadata["quality_prompt"] == "sharp."
    assert samples["000000001"]["txt"] == b"A dog runs. It is brown."
    assert samples["000000002"]["txt"] == b"Dogs"


def test_images(tmp_path):
    put(tmp_path, {"a/one.png": png((40, 30)), "two.png": png((30, 40)), "note.txt": b"x", "torn.png": b"no image"})
    lines = [
        {"image_path": "a/one.png", "long_caption": "One. Long.", "text": "one", "width": 40, "height": 30},
        {"image_path": str(tmp_path / "two.png"), "text": "two"},
        {"image_path": "two.png"},
        {"video_path": "two.png", "text": "no image_path"},
        {"image_path": "note.txt", "text": "x"},
        {"image_path": "torn.png", "text": "x"},
        {"image_path": "/etc/passwd", "text": "x"},
        {"image_path": "two.png", "text": ["x"]},
    ]
    keys = {"root": jsonl(tmp_path / "list.jsonl", lines), "name": "images", "num_workers": 0}
    val = jsonl(tmp_path / "val.jsonl", lines[:1])
    image_source(**keys, val=val).write(tmp_path / "d")
    samples = read(tmp_path / "d", "train")
    assert {key: it["txt"] for key, it in samples.items()} == {"000000001": b"One. Long.", "000000002": b"two"}
    assert samples["000000001"]["png"] == png((40, 30))
    assert json.loads(samples["000000001"]["json"])["short_caption"] == "one"
    assert rejected(tmp_path / "d") == {
        f"list.jsonl:{number}": reason.value
        for number, reason in enumerate(
            [
                Reason.NO_CAPTION,
                Reason.NO_PATH,
                Reason.NO_IMAGE,
                Reason.UNDECODABLE_IMAGE,
                Reason.OUTSIDE_FOLDER,
                Reason.BAD_CAPTION,
            ],
            3,
        )
    }
    image_source(**keys, val=val, image_size=16, format="jpg").write(tmp_path / "e")
    assert read_manifest(tmp_path / "e")["image_size"] == 16
    with pytest.raises(UserError, match=r"^source\.folder names"):
        image_source(**(keys | {"root": str(tmp_path)}), val=1, folder=str(tmp_path))


def test_the_command(videos, tmp_path, monkeypatch):
    path = jsonl(videos / "list.jsonl", [line("long.mp4", 0, 20), line("second.mp4", 20, 60), line("gone.mp4")])
    val = jsonl(videos / "val.jsonl", [line("long.mp4", 60, 80)])
    here(tmp_path, monkeypatch, f"data=captioned_video root={path} source.val={val} num_workers=0")
    root = tmp_path / "data" / "captioned_video"
    assert read_manifest(root)["name"] == "captioned_video"
    assert rejected(root) == {"list.jsonl:3": Reason.UNREADABLE_FILE.value}
    assert [len(read(root, split)) for split in ("train", "val")] == [2, 1]
    here(tmp_path, monkeypatch, f"data=video root={path} source.val=1 num_workers=0")
    assert read_manifest(tmp_path / "data" / "video")["splits"]["val"]["samples"] == 1
    with pytest.raises(SystemExit, match=r"^error: source\.val: no file /no/where; give a JSON-lines file"):
        here(tmp_path, monkeypatch, f"data=captioned_video root={path} source.val=/no/where overwrite=true")
