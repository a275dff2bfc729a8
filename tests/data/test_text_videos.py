"""Captioned clips in packs: lengths in buckets, parts of videos, images among them, and what cannot be used."""

import io
import json
import tarfile
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from test_video import video

from grn.data.text_images import PackedTokens
from grn.data.text_videos import TextVideoDataModule
from grn.media.mp4 import write_mp4
from grn.media.skips import Reason
from grn.runtime.errors import UserError


def clip(frames, fps=16, height=32, width=48):
    """Eight bars of frame k are the bits of k."""
    file = io.BytesIO()
    bits = (torch.arange(frames)[:, None] >> torch.arange(8)) % 2
    bars = (220 * bits).to(torch.uint8).repeat_interleave(width // 8, dim=1)
    write_mp4((bar.expand(3, height, -1) for bar in bars), file, fps=fps, quality=4)
    return file.getvalue()


def png(size):
    file = io.BytesIO()
    Image.new("RGB", size, (9, 9, 9)).save(file, "PNG")
    return file.getvalue()


def write(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def make(shard, **arguments):
    defaults = {"name": "clips", "resolutions": [[32, 32], [32, 48]], "max_frames": 17, "max_tokens": 256}
    defaults |= {"batch_size": 1, "lookahead": 4, "caption_dropout": 0.0, "train": shard, "val": shard}
    module = TextVideoDataModule(**(defaults | arguments))
    module.packed_by(PackedTokens(8, 4, lambda captions: [list(c.encode()) for c in captions]))
    return module


def held_out(module):
    return {key: pixels for batch in module.val_dataloader() for key, pixels in zip(batch["key"], batch["pixels"])}


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    samples = {}
    for name, frames, fps in (("short", 9, 16), ("whole", 17, 16), ("long", 90, 16), ("fast", 60, 60), ("slow", 9, 4)):
        samples |= {f"{name}.mp4": clip(frames, fps), f"{name}.txt": name.encode()}
    samples |= {"image.png": png((40, 40)), "image.txt": b"an image"}
    return write(tmp_path_factory.mktemp("clips") / "0.tar", samples)


def numbers(pixels):
    """The numbers of the frames that a clip has."""
    bits = pixels.float().mean(dim=(0, 2)).unflatten(1, (8, -1)).mean(dim=2) > 110
    return (bits.long() * 2 ** torch.arange(8)).sum(dim=1).tolist()


def test_clips_last_whole_buckets_at_the_rate_asked_for(shard):
    found = held_out(make(shard))
    shapes = {key: tuple(pixels.shape) for key, pixels in found.items()}
    assert shapes == {
        "short": (3, 9, 32, 48),  # 9/16 s: two buckets, and a frame
        "whole": (3, 17, 32, 48),
        "long": (3, 17, 32, 48),
        "fast": (3, 13, 32, 48),  # a second: not four buckets and a frame
        "slow": (3, 17, 32, 48),
        "image": (3, 1, 32, 32),
    }
    assert numbers(found["whole"]) == list(range(17))
    middle = numbers(found["long"])
    assert middle == list(range(middle[0], middle[0] + 17))
    assert middle[0] == 37
    steps = [b - a for a, b in zip(numbers(found["fast"]), numbers(found["fast"])[1:])]
    assert set(steps) == {3, 4}  # 60 frames a second taken at 16
    assert set(numbers(found["slow"])) == {2, 3, 4, 5, 6}
    assert numbers(found["slow"]) == sorted(numbers(found["slow"]))


def test_training_takes_clips_from_anywhere(shard):
    module = make(shard)
    decode, (raw,) = (
        module.decoder(training=True),
        [r for r in module._stream("val").shard(shard) if "long" in r["__key__"]],
    )
    starts = [numbers(decode(raw, number)["pixels"])[0] for number in range(30)]
    assert min(starts) < 15
    assert max(starts) > 55
    assert starts == [numbers(decode(raw, number)["pixels"])[0] for number in range(30)]


def test_json_tells_the_part_of_the_video(tmp_path):
    whole, sections = clip(90), {
        "part": {"begin_frame_id": 32, "end_frame_id": 49, "fps": 16.0},
        "rest": {"begin_frame_id": 73, "fps": 16},
        "beyond": {"begin_frame_id": 80, "end_frame_id": 9999, "fps": 16},
        "none": {"caption": "all of it"},
        "after": {"begin_frame_id": 500, "end_frame_id": 600, "fps": 16},
        "flat": {"begin_frame_id": 20, "end_frame_id": 21, "fps": 16},
        "backwards": {"begin_frame_id": 30, "end_frame_id": 20, "fps": 16},
        "rateless": {"begin_frame_id": 0, "end_frame_id": 20},
        "text": {"begin_frame_id": "0", "end_frame_id": 20, "fps": 16},
        "zero": {"begin_frame_id": 0, "end_frame_id": 20, "fps": 0},
        "infinite": {"begin_frame_id": 0, "end_frame_id": 20, "fps": float("inf")},
    }  # fmt: skip
    samples = {}
    for name, section in sections.items():
        samples |= {f"{name}.mp4": whole, f"{name}.json": json.dumps({"caption": name} | section).encode()}
    module = make(write(tmp_path / "0.tar", samples), captions={"caption": 1})
    found = {key: numbers(pixels) for key, pixels in held_out(module).items()}
    assert found.keys() == {"part", "rest", "beyond", "none"}
    assert found["part"] == list(range(32, 49))
    assert found["rest"] == list(range(73, 90))
    assert found["beyond"] == list(range(81, 90))
    assert module.skipped() == {Reason.CLIP_TOO_SHORT.value: 2, Reason.BAD_SECTION.value: 5}


def test_shapes_are_those_that_are_shown(tmp_path):
    samples = {}
    for name, width, aspect in (("wide", 32, Fraction(3, 2)), ("square", 48, Fraction(2, 3)), ("narrow", 48, 4)):
        pictures = [np.full((32, width, 3), 90, np.uint8)] * 9
        samples |= {f"{name}.mp4": video(pictures, fps=16, pixel_aspect=Fraction(aspect)), f"{name}.txt": b"x"}
    module = make(write(tmp_path / "0.tar", samples), max_aspect=2)
    shapes = {key: tuple(pixels.shape[2:]) for key, pixels in held_out(module).items()}
    assert shapes == {"wide": (32, 48), "square": (32, 32)}
    assert module.skipped() == {Reason.TOO_NARROW.value: 1}


def test_what_is_no_clip_is_counted(tmp_path):
    good = clip(20)
    samples = {"torn.mp4": good[: len(good) // 2], "torn.txt": b"x", "silent.mp4": good}
    samples |= {
        "one.mp4": clip(1),
        "one.txt": b"x",
        "text.txt": b"x",
        "narrow.mp4": clip(9, width=320),
        "narrow.txt": b"x",
    }
    samples |= {"empty.mp4": b"", "empty.txt": b"x", "good.mp4": good, "good.txt": b"good"}
    module = make(write(tmp_path / "0.tar", samples), max_aspect=4)
    assert held_out(module).keys() == {"good"}
    skipped = module.skipped()
    assert sum(skipped.values()) == 6
    assert skipped[Reason.NO_CAPTION.value] == skipped[Reason.CLIP_TOO_SHORT.value] == 1
    assert skipped[Reason.NO_IMAGE.value] == skipped[Reason.TOO_NARROW.value] == 1


def test_packs_hold_clips_and_images_and_go_on_exactly(shard):
    whole = make(shard).train_dataloader()
    batches = [batch for _, batch in zip(range(6), whole)]
    for batch in batches:
        own = [(1 + (p.shape[1] - 1) // 4) * (p.shape[2] // 8) * (p.shape[3] // 8) + 1 for p in batch["pixels"]]
        assert batch["tokens"] == sum(own) + sum(map(len, batch["caption"])) <= 256
    assert len({pixels.shape[1] for batch in batches for pixels in batch["pixels"]}) > 2
    first = make(shard).train_dataloader()
    _ = [batch for _, batch in zip(range(2), first)]
    second = make(shard).train_dataloader()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for expected, found in zip(batches[2:], second):
        assert found["key"] == expected["key"]
        assert all(map(torch.equal, found["pixels"], expected["pixels"]))


def test_clips_of_a_large_share_of_a_pack_are_left_out(shard):
    """Of 256 tokens, a clip of 17 frames and 4x6 has 5 * 24 + 1 + its text, one of 13 has 4 * 24."""
    module = make(shard, max_share=0.4)
    loader = module.train_dataloader().dataset
    raws = module._stream("val").shard(shard)
    kept = [raw["__key__"] for raw in raws if loader.decoded(raw | {"__url__": shard}, 0) is not None]
    assert kept == ["short", "fast", "image"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"fps": 15}, r"data\.bucket=0\.25 seconds are not whole frames at data\.fps=15"),
        ({"fps": 0}, r"data\.fps=0 and data\.bucket=0\.25 must be positive"),
        ({"max_frames": 16}, r"data\.max_frames=16 must be 1 \+ a multiple of the 4 frames"),
        ({"max_frames": 1}, r"data\.max_frames=1 must"),
        ({"fps": 8, "max_frames": 9}, r"its 2 frames are not a multiple of the tokenizer's 4 frames a latent"),
        ({"max_frames": 209}, r"holds no clip of data\.max_frames=209 at 32x48 pixels: .* max_frames=37"),
    ],
)
def test_mistakes_name_the_key(shard, arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        make(shard, **arguments)


def test_times_lie_within_the_part():
    decoder = make("x").decoder(training=False)
    times = decoder.times(Fraction(3), Fraction(4), None)
    assert len(times) == 13
    assert times[0] > 3
    assert times[-1] < 4
