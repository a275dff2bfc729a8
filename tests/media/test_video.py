"""Clips: which source frame each of their frames is, what they cost, and a reason for every broken file.

Every frame of the test videos carries its own number, in four bands of eight levels of grey.
"""

import contextlib
import io
import json
import struct
from bisect import bisect_right
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image

from grn.data.clips import ClipDecoder
from grn.data.stream.streaming import MAX_ENTRY_BYTES
from grn.media.colour import from_hdr
from grn.media.images import to_tensor
from grn.media.skips import Reason, Skip
from grn.media.video import choose_times, decoded, frames_from, open_video, probe_video, resample, timed

SIZE = 32
FORMATS = [
    ("mp4", "mp4", "libx264"),
    ("mp4", "mp4", "mpeg4"),
    ("mov", "mov", "libx264"),
    ("webm", "webm", "libvpx"),
    ("webm", "webm", "libvpx-vp9"),
    ("mkv", "matroska", "libx264"),
]


def numbered(number, width=SIZE, height=SIZE):
    """RGB [height, width, 3] that `read_numbers` reads."""
    digits = [number // 8**place % 8 for place in range(4)]
    return np.broadcast_to(np.repeat(digits, width // 4)[:, None] * 32 + 16, (height, width // 4 * 4, 3)).astype(
        np.uint8
    )


def read_numbers(pixels):
    """uint8 [3, T, size, size] -> the number that each frame carries."""
    bands = pixels.float().mean(dim=(0, 2)).unflatten(-1, (4, -1)).mean(dim=-1)
    digits = ((bands - 16) / 32).round().long()
    return (digits * torch.tensor([1, 8, 64, 512])).sum(dim=-1).tolist()


def video(
    pictures,
    format="mp4",
    codec="libx264",
    *,
    fps=24,
    pts=None,
    time_base=None,
    pix_fmt="yuv420p",
    codec_options=None,
    format_options=None,
    pixel_aspect=None,
    path=None,
):
    """The bytes of a video of `pictures` (RGB arrays), at `fps` or at the times `pts` x `time_base`."""
    file = io.BytesIO() if path is None else str(path)
    with av.open(file, "w", format=format, options=format_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=codec_options or {"g": "12"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if time_base is not None:
            stream.codec_context.time_base = time_base
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[number], time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue() if path is None else path.read_bytes()


def numbered_video(count=48, *arguments, **options):
    return video([numbered(number) for number in range(count)], *arguments, **options)


def patched(data, kind, offset, layout, *values):
    """`data` with `values` at `offset` bytes behind the name of the first box of that kind."""
    data = bytearray(data)
    struct.pack_into(layout, data, data.index(kind) + len(kind) + offset, *values)
    return bytes(data)


def raw(data, suffix="mp4", **more):
    return {"__key__": "k", "__url__": "u", suffix: data} | more


def decoder(**changes):
    return ClipDecoder(**({"image_size": SIZE, "frames": 5, "fps": (8,)} | changes))


def reason(data, suffix="mp4", **changes):
    with pytest.raises(Skip) as caught:
        decoder(**changes)(raw(data, suffix), 0)
    return caught.value.reason


def numbers_at(data, times, suffix="mp4", **changes):
    """Which frames are shown at `times`."""
    with open_video(data, suffix, max_pixels=2**20) as opened:
        frames = frames_from(opened, times[0], max_decoded_frames=changes.get("max_decoded_frames", 4096))
        pictures = resample(
            timed(frames, opened), times, lambda frame: to_tensor(Image.fromarray(frame.to_rgb().to_ndarray()))
        )
    return read_numbers(torch.cat(pictures, dim=1))


@pytest.fixture(scope="module")
def source():
    """Six seconds of 24 numbered frames."""
    return numbered_video(144)


@pytest.mark.parametrize(("suffix", "format", "codec"), FORMATS)
def test_evaluation_takes_the_highest_rate_that_fits_from_the_middle(suffix, format, codec):
    data = numbered_video(49, format, codec)
    sample = decoder(fps=(3, 12, 8))(raw(data, suffix, txt=b" a count "), 7)
    assert (sample["key"], sample["caption"], "label" in sample) == ("k", "a count", False)
    assert sample["pixels"].shape == (3, 5, SIZE, SIZE)
    assert sample["pixels"].dtype == torch.uint8
    # 49/24 s less 4/12 s leaves 20.5/24 s before the clip.
    assert read_numbers(sample["pixels"]) == [20, 22, 24, 26, 28]


def test_rates_that_do_not_fit_are_left_out():
    data = numbered_video(24)
    assert read_numbers(decoder(frames=9, fps=(8, 9))(raw(data), 0)["pixels"]) == [1, 4, 6, 9, 12, 14, 17, 20, 22]
    assert reason(data, frames=9, fps=(8,)) is Reason.CLIP_TOO_SHORT  # the last would be shown as the video ends
    eighths = [Fraction(1, 2) + Fraction(k, 8) for k in range(9)]
    assert choose_times(Fraction(0), Fraction(2), 9, (3, 6, 8), None) == eighths
    assert choose_times(Fraction(0), Fraction(2), 1, (3,), None) == [1]


def test_training_draws_rate_and_start_from_seed_pass_and_key_alone(source):
    decode = decoder(frames=9, fps=(3, 6, 8, 12), training=True)
    clips = [read_numbers(decode(raw(source), number)["pixels"]) for number in range(40)]
    steps = [clip[1] - clip[0] for clip in clips]
    for clip, step in zip(clips, steps):
        assert clip == list(range(clip[0], clip[0] + 9 * step, step))
    assert set(steps) == {8, 4, 3, 2}
    starts = [clip[0] for clip, step in zip(clips, steps) if step == 2]
    assert len(set(starts)) > 3
    assert max(clip[-1] for clip in clips) > 130
    assert min(clip[0] for clip in clips) < 12

    def clip(key="k", number=0, **changes):
        return read_numbers(decoder(training=True, **changes)(raw(source) | {"__key__": key}, number)["pixels"])

    assert clip() == clip()
    assert len({tuple(clip(*draw)) for draw in (("k", 0), ("l", 0), ("k", 1))} | {tuple(clip(seed=1))}) == 4


def section(begin=None, end=None, fps=24):
    return json.dumps({"begin_frame_id": begin, "end_frame_id": end, "fps": fps}).encode()


def test_json_tells_the_part_of_the_video(source):
    def clip(*own, number=0, **changes):
        return read_numbers(decoder(**changes)(raw(source, json=section(*own)), number)["pixels"])

    assert clip(40, 53) == [40, 43, 46, 49, 52]
    assert clip(20, 27, 12) == [41, 44, 47, 50, 53]
    assert clip(131) == clip(131, 9999) == [131, 134, 137, 140, 143]
    assert clip(None, 13) == [0, 3, 6, 9, 12]
    assert clip(None, None, None) == read_numbers(decoder()(raw(source), 0)["pixels"])
    assert clip(40, 53, fps=(3, 8)) == clip(40, 53)  # at three a second it would be longer
    clips = [clip(50, 80, number=number, fps=(8, 12), training=True) for number in range(30)]
    assert all(50 <= shown[0] < shown[-1] < 80 for shown in clips)
    assert min(shown[0] for shown in clips) < 55
    assert max(shown[-1] for shown in clips) > 75
    for own, expected in (
        ((40, 52), Reason.CLIP_TOO_SHORT),  # the last frame would be shown as it ends
        ((132,), Reason.CLIP_TOO_SHORT),
        ((200, 300), Reason.CLIP_TOO_SHORT),
        ((53, 40), Reason.BAD_SECTION),
        ((40, 53, None), Reason.BAD_SECTION),
    ):
        with pytest.raises(Skip) as caught:
            clip(*own)
        assert caught.value.reason is expected


def test_flip_is_for_training_and_leaves_the_times_alone(source):
    mirrored = []
    for number in range(8):
        straight = decoder(training=True)(raw(source), number)["pixels"]
        flipped = decoder(training=True, flip=True)(raw(source), number)["pixels"]
        mirrored.append(not torch.equal(flipped, straight))
        assert torch.equal(flipped, straight.flip(-1) if mirrored[-1] else straight)
    assert set(mirrored) == {False, True}
    assert torch.equal(decoder(flip=True)(raw(source), 0)["pixels"], decoder()(raw(source), 0)["pixels"])


@pytest.mark.parametrize(("suffix", "format", "codec"), FORMATS)
def test_frames_shown_at_any_time(suffix, format, codec):
    data = numbered_video(60, format, codec, fps=10)
    for start in (Fraction(0), Fraction(1, 100), Fraction(119, 100), Fraction(12, 10), Fraction(121, 100), Fraction(4)):
        for rate in (3, 10, 16, 30):
            times = [start + Fraction(k, rate) for k in range(7)]
            within = [time for time in times if time < 6]
            assert numbers_at(data, within, suffix) == [int(time * 10) for time in within]


@pytest.mark.parametrize(("suffix", "format"), [("mp4", "mp4"), ("mkv", "matroska")])
def test_variable_rate(suffix, format):
    gaps = np.random.default_rng(0).integers(5, 400, 60)
    pts = [0, *np.cumsum(gaps).tolist()]
    data = numbered_video(61, format, fps=1000, pts=pts, time_base=Fraction(1, 1000))
    for start in (0, 2500, 6321):
        milliseconds = list(range(start, pts[-1], 97))
        expected = [bisect_right(pts, time) - 1 for time in milliseconds]
        assert numbers_at(data, [Fraction(time, 1000) for time in milliseconds], suffix) == expected
    clip = decoder(frames=33, fps=(8,), training=True)(raw(data, suffix), 3)["pixels"]
    shown = read_numbers(clip)
    assert shown == sorted(shown)
    assert len(set(shown)) < 33


def test_a_slow_source_shows_its_frames_for_longer():
    assert numbers_at(numbered_video(6, fps=2), [Fraction(k, 8) for k in range(9)]) == [0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_times_rounded_to_milliseconds_are_not_missed():
    data = numbered_video(60, "matroska", fps=30)  # 0, 33, 67, 100, 133, 167 ...
    assert numbers_at(data, [Fraction(k, 15) for k in range(29)], "mkv") == [2 * k for k in range(29)]


def test_a_thousand_frames_a_second():
    data = numbered_video(1200, fps=1000, codec_options={"g": "250", "preset": "ultrafast"})
    assert read_numbers(decoder(frames=9, fps=(8, 16))(raw(data), 0)["pixels"])[1:3] == [412, 475]


def test_times_count_from_the_first_frame():
    pts = [10_000 + 100 * number for number in range(40)]
    for suffix, format in (("mp4", "mp4"), ("mkv", "matroska")):
        data = numbered_video(40, format, fps=10, pts=pts, time_base=Fraction(1, 1000))
        assert read_numbers(decoder(fps=(10,))(raw(data, suffix), 0)["pixels"]) == [18, 19, 20, 21, 22]


def test_frames_without_timestamps_follow_at_the_mean_rate(source):
    with open_video(source, "mp4", max_pixels=2**20) as opened:
        frames = list(decoded(opened, max_frames=4096))
        for number, frame in enumerate(frames):
            if number % 5 or number < 20:
                frame.pts = None
        ends = [until for _, until in timed(iter(frames), opened)]
    assert max(abs(end - Fraction(number + 1, 24)) for number, end in enumerate(ends)) < Fraction(1, 1000)
    assert len(ends) == 144


LONG = 3000  # frames, ten minutes


@pytest.fixture(scope="module")
def long_source():
    options = {"g": "50", "keyint_min": "50", "sc_threshold": "0", "preset": "ultrafast"}
    return numbered_video(LONG, fps=5, codec_options=options)


def test_a_clip_of_a_long_video_costs_the_clip_and_one_group_of_pictures(long_source):
    # 9 frames at 2 a second span 20 of the source's, after up to 49 of the group they begin in; decoders look ahead.
    decode = decoder(frames=9, fps=(2,), training=True, max_decoded_frames=80)
    starts = [read_numbers(decode(raw(long_source), number)["pixels"])[0] for number in range(30)]
    assert min(starts) < 500
    assert max(starts) > 2500
    assert reason(long_source, frames=9, fps=(2,), max_decoded_frames=20) is Reason.TOO_MANY_FRAMES


def test_one_group_of_pictures_all_along_is_bounded():
    data = numbered_video(300, codec_options={"g": "1000", "sc_threshold": "0", "preset": "ultrafast"})
    assert reason(data, max_decoded_frames=100) is Reason.TOO_MANY_FRAMES
    assert read_numbers(decoder(max_decoded_frames=200)(raw(data), 0)["pixels"]) == [144, 147, 150, 153, 156]


def test_b_frames_and_open_groups_of_pictures():
    options = {"g": "25", "bf": "3", "sc_threshold": "0", "x264-params": "open-gop=1:b-pyramid=normal"}
    for suffix, format in (("mp4", "mp4"), ("mkv", "matroska")):
        data = numbered_video(100, format, fps=10, codec_options=options)
        for number in range(95):
            assert numbers_at(data, [Fraction(number, 10), Fraction(number + 2, 10)], suffix) == [number, number + 2]


def test_claimed_durations_do_not_matter():
    honest = numbered_video(49, "matroska")
    for seconds in (0.1, 6000):
        lying = patched(honest, b"\x44\x89\x88", 0, ">d", 1000 * seconds)
        with av.open(io.BytesIO(lying), format="matroska") as container:
            assert container.duration == round(seconds * av.time_base)
        assert read_numbers(decoder()(raw(lying, "mkv"), 0)["pixels"]) == [18, 21, 24, 27, 30]
    live = numbered_video(49, "matroska", format_options={"live": "1"})
    with av.open(io.BytesIO(live), format="matroska") as container:
        assert container.duration is None
    assert read_numbers(decoder()(raw(live, "mkv"), 0)["pixels"]) == [18, 21, 24, 27, 30]


def test_sound_that_lasts_longer_does_not_count():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream, sound = container.add_stream("libx264", rate=24), container.add_stream("aac", rate=8000)
        stream.width = stream.height = SIZE
        for number in range(48):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(stream.encode())
        for number in range(40):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, number * 1024
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    data = file.getvalue()
    assert reason(data, "mkv", frames=9, fps=(4,)) is Reason.CLIP_TOO_SHORT
    assert read_numbers(decoder(frames=9, fps=(5,))(raw(data, "mkv"), 0)["pixels"])[0] == 4


CORNERS = np.zeros((48, 64, 3), dtype=np.uint8)
CORNERS[:24, :32], CORNERS[:24, 32:], CORNERS[24:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), lambda image: image),
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),  # clockwise, as a phone held upright writes it
        ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
        ((1, 0, 0, -1), lambda image: image[::-1]),
        ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda image: np.rot90(image, 2).swapaxes(0, 1)),
        ((0.7, 0.7, -0.7, 0.7), lambda image: image),
    ],
)
def test_display_matrix(matrix, turn):
    a, b, c, d = (round(65536 * value) for value in matrix)
    data = patched(video([CORNERS] * 6), b"tkhd", 40, ">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    pixels = decoder(frames=1)(raw(data), 0)["pixels"][:, 0].permute(1, 2, 0).numpy()
    expected = turn(CORNERS)
    height, width = expected.shape[:2]
    assert (probe_video(data, "mp4").width, probe_video(data, "mp4").height) == (width, height)
    for row, column in ((4, 4), (4, -5), (-5, 4), (-5, -5)):
        shown = expected[row, column]
        assert np.abs(pixels[row, column].astype(int) - shown).max() < 16, (row, column)


def shape_of(data, suffix="mp4", **options):
    found = probe_video(data, suffix, **options)
    return found.width, found.height


@pytest.mark.parametrize(
    ("suffix", "format", "codec"), [it for it in FORMATS if it[0] != "webm"]
)  # for want of a muxer
@pytest.mark.parametrize(("aspect", "width"), [((4, 3), 64), ((1, 2), 24), ((16, 15), 51), ((1, 1), 48), (None, 48)])
def test_pixels_become_square(suffix, format, codec, aspect, width):
    squeezed = CORNERS[:, np.arange(48) * 64 // 48]
    data = video([squeezed] * 6, format, codec, pixel_aspect=None if aspect is None else Fraction(*aspect))
    assert shape_of(data, suffix) == (width, 48)
    pixels = decoder(frames=1)(raw(data, suffix), 0)["pixels"][:, 0].permute(1, 2, 0).numpy()
    for row, column in ((4, 4), (4, -5), (-5, 4), (-5, -5)):
        assert np.abs(pixels[row, column].astype(int) - CORNERS[row, column]).max() < 20, (row, column)


def test_pixels_become_square_before_the_frame_is_turned():
    data = video([CORNERS] * 6, pixel_aspect=Fraction(3, 2))
    turned = patched(data, b"tkhd", 40, ">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 2**30)
    assert (shape_of(data), shape_of(turned)) == ((96, 48), (48, 96))


def test_nonsense_about_pixels_does_not_count():
    data = numbered_video(13, pixel_aspect=Fraction(3, 2))
    for aspect, width in (
        ((4, 1), 4 * SIZE),
        ((1, 4), SIZE // 4),
        ((5, 1), SIZE),
        ((1, 5), SIZE),
        ((2**31 - 1, 1), SIZE),
    ):
        claimed = patched(data, b"pasp", 0, ">II", *aspect)
        assert shape_of(claimed) == (width, SIZE)
    for aspect in ((0, 1), (1, 0), (0, 0)):  # the stream itself says 3:2
        assert shape_of(patched(data, b"pasp", 0, ">II", *aspect)) in {(SIZE, SIZE), (SIZE * 3 // 2, SIZE)}
    bound = SIZE * SIZE * 3 // 2
    assert decoder(max_pixels=bound)(raw(data), 0)["pixels"].shape == (3, 5, SIZE, SIZE)
    assert reason(data, max_pixels=bound - 1) is Reason.TOO_MANY_PIXELS
    with pytest.raises(Skip):
        shape_of(data, max_pixels=bound - 1)


@pytest.mark.parametrize(("width", "height"), [(33, 47), (51, 32), (97, 35), (1, 1), (5, 200)])
def test_odd_sizes(width, height):
    data = video([np.full((height, width, 3), 8 * number, dtype=np.uint8) for number in range(12)], pix_fmt="yuv444p")
    clip = decoder(fps=(24,))(raw(data), 0)["pixels"]
    assert clip.shape == (3, 5, SIZE, SIZE)
    assert (clip.float().mean(dim=(0, 2, 3)) - 8 * torch.arange(4, 9)).abs().max() < 3


RED = {  # in yuv, by matrix and range
    ("ITU601", 1): (81, 90, 240),
    ("ITU601", 2): (76, 85, 255),
    ("ITU709", 1): (63, 102, 240),
    ("ITU709", 2): (54, 99, 255),
}


@pytest.mark.parametrize(
    ("pix_fmt", "colour", "options", "size"),
    [
        ("yuv420p", ("ITU601", 1), {"colorspace": "smpte170m", "color_range": "tv"}, 64),
        ("yuv420p", ("ITU601", 2), {"colorspace": "smpte170m", "color_range": "pc"}, 64),
        ("yuv420p", ("ITU709", 1), {"colorspace": "bt709", "color_range": "tv"}, 64),
        ("yuvj420p", ("ITU709", 2), {"colorspace": "bt709", "color_range": "pc"}, 64),
        ("yuv420p10le", ("ITU709", 1), {"colorspace": "bt709", "color_range": "tv"}, 64),
        ("yuv444p", ("ITU601", 1), {}, 64),  # says nothing, and is small
        ("yuv420p", ("ITU709", 1), {}, 720),  # says nothing, and is not
    ],
)
def test_colours(pix_fmt, colour, options, size):
    frame = av.VideoFrame(size, size, pix_fmt)
    for plane, value in zip(frame.planes, RED[colour]):
        fill = (
            np.full(plane.buffer_size // 2, 4 * value, "<u2")
            if "10" in pix_fmt
            else np.full(plane.buffer_size, value, "u1")
        )
        plane.update(fill.tobytes())
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24, options={"qp": "1", "preset": "ultrafast", **options})
        stream.width = stream.height = size
        stream.pix_fmt = pix_fmt
        for number in range(3):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    pixels = decoder(frames=1)(raw(file.getvalue()), 0)["pixels"]
    assert (pixels.float().mean(dim=(1, 2, 3)) - torch.tensor([255.0, 0, 0])).abs().max() < 6


@pytest.mark.parametrize(
    ("suffix", "format", "codec", "pix_fmt"),
    [
        ("mkv", "matroska", "ffv1", "gray"),
        ("mkv", "matroska", "ffv1", "gray16le"),
        ("mkv", "matroska", "ffv1", "bgra"),
        ("mov", "mov", "mjpeg", "yuvj420p"),
        ("mp4", "mp4", "libx264rgb", "rgb24"),
    ],
)
def test_grey_and_rgb(suffix, format, codec, pix_fmt):
    data = numbered_video(13, format, codec, pix_fmt=pix_fmt, codec_options={})
    assert read_numbers(decoder(fps=(24,))(raw(data, suffix), 0)["pixels"]) == [4, 5, 6, 7, 8]


def test_frames_may_change_their_size():
    file = io.BytesIO()
    with av.open(file, "w", format="webm") as container:
        stream = container.add_stream("libvpx", rate=24)
        stream.width = stream.height = SIZE
        other = av.CodecContext.create("libvpx", "w")
        other.width, other.height, other.pix_fmt, other.framerate = 128, 64, "yuv420p", 24
        other.time_base = Fraction(1, 24)
        for encoder, numbers, size in ((stream, range(12), (SIZE, SIZE)), (other, range(12, 25), (128, 64))):
            for number in [*numbers, None]:
                frame = None
                if number is not None:
                    picture = np.array(Image.fromarray(numbered(number)).resize(size, Image.Resampling.NEAREST))
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    frame.pts, frame.time_base = number, Fraction(1, 24)
                for packet in encoder.encode(frame):
                    packet.stream = stream
                    container.mux(packet)
    data = file.getvalue()
    clip = decoder(frames=3, fps=(3,))(raw(data, "webm"), 0)["pixels"]
    assert read_numbers(clip)[:1] == [4]
    assert clip.shape == (3, 3, SIZE, SIZE)
    assert reason(data, "webm", frames=3, fps=(3,), max_pixels=SIZE * SIZE) in {
        Reason.TOO_MANY_PIXELS,
        Reason.UNDECODABLE_VIDEO,
    }
    assert reason(data, "webm", frames=3, fps=(3,), max_pixels=5000) is Reason.TOO_MANY_PIXELS


def test_size_is_checked_before_decoding():
    data = video([np.zeros((90, 160, 3), dtype=np.uint8)] * 6)  # in the stream 96 x 160
    assert reason(data, max_pixels=90 * 160 - 1) is Reason.TOO_MANY_PIXELS
    assert decoder(frames=1, max_pixels=90 * 160)(raw(data), 0)["pixels"].shape == (3, 1, SIZE, SIZE)


def test_cut_files(tmp_path):
    options = {"format_options": {"movflags": "faststart"}, "path": tmp_path / "v.mp4"}
    index_first = numbered_video(144, **options)
    media = index_first.index(b"mdat")
    assert read_numbers(decoder()(raw(index_first), 0)["pixels"]) == [66, 69, 72, 75, 78]
    for share in (0.0, 0.3, 0.7):
        cut = index_first[: media + 4 + int(share * (len(index_first) - media))]
        assert reason(cut) in {Reason.CUT_SHORT, Reason.UNDECODABLE_VIDEO}
    index_last = numbered_video(144)
    for end in (0, 1, 7, 8, 40, len(index_last) // 2, index_last.index(b"moov") + 60, index_last.index(b"stsz") + 60):
        assert reason(index_last[:end]) in {Reason.CUT_SHORT, Reason.UNDECODABLE_VIDEO, Reason.NO_VIDEO}
    matroska = numbered_video(144, "matroska")
    cut = decoder()(raw(matroska[: len(matroska) * 2 // 3], "mkv"), 0)["pixels"]
    start = read_numbers(cut)[0]
    assert read_numbers(cut) == list(range(start, start + 15, 3))
    assert start < 60  # the middle of what is left


def test_damage_is_noticed(source):
    media = source.index(b"mdat") + 4
    damaged = bytearray(source)
    for at in range(media + 200, source.index(b"moov") - 8, 40):
        damaged[at] ^= 0xFF
    assert reason(bytes(damaged)) is Reason.UNDECODABLE_VIDEO


def sound_only(cover=False):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = SIZE, SIZE, "yuvj420p"
            picture.disposition = Disposition.attached_pic.value
            container.mux(picture.encode(av.VideoFrame.from_ndarray(numbered(9), format="rgb24")))
            container.mux(picture.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return file.getvalue()


def no_frames(format, **options):
    file = io.BytesIO()
    with av.open(file, "w", format=format, options=options) as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width = stream.height = SIZE
        container.start_encoding()
    return file.getvalue()


def image(format, **options):
    data = io.BytesIO()
    Image.fromarray(numbered(9)).save(data, format=format, **options)
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "suffix", "expected"),
    [
        (b"", "mp4", Reason.UNDECODABLE_VIDEO),
        (b"", "webm", Reason.UNDECODABLE_VIDEO),
        (b"a text, not a video\n" * 1000, "mp4", Reason.UNDECODABLE_VIDEO),
        (image("PNG"), "mp4", Reason.UNDECODABLE_VIDEO),
        (image("JPEG"), "mkv", Reason.UNDECODABLE_VIDEO),
        (
            image("GIF", save_all=True, append_images=[Image.new("RGB", (SIZE, SIZE))] * 30),
            "mp4",
            Reason.UNDECODABLE_VIDEO,
        ),
        (numbered_video(12, "avi", "mpeg4"), "mp4", Reason.UNDECODABLE_VIDEO),
        (numbered_video(12, "webm", "libvpx"), "mp4", Reason.UNDECODABLE_VIDEO),
        (numbered_video(12), "mkv", Reason.UNDECODABLE_VIDEO),
        (numbered_video(24, "mov", "qtrle", pix_fmt="rgb24", codec_options={}), "mov", Reason.UNDECODABLE_VIDEO),
        (sound_only(), "mp4", Reason.NO_VIDEO),
        (sound_only(cover=True), "mp4", Reason.NO_VIDEO),
        (no_frames("mp4"), "mp4", Reason.NO_VIDEO),
        (no_frames("mp4", movflags="empty_moov+frag_keyframe"), "mp4", Reason.UNDECODABLE_VIDEO),
        (no_frames("matroska"), "mkv", Reason.UNDECODABLE_VIDEO),
        (numbered_video(5), "mp4", Reason.CLIP_TOO_SHORT),
        (Reason.OVERSIZE_ENTRY, "mp4", Reason.OVERSIZE_ENTRY),
    ],
    ids=lambda value: value.name if isinstance(value, Reason) else "",
)
def test_hostile_files(data, suffix, expected):
    assert reason(data, suffix) is expected


def test_metadata_and_labels(source):
    assert decoder(num_labels=10)(raw(source, cls=b"7"), 0)["label"] == 7
    sample = decoder(num_labels=10)(raw(source, json=b'{"label": 3, "caption": "numbers"}'), 0)
    assert (sample["label"], sample["caption"]) == (3, "numbers")
    for sample, expected in (
        (raw(source), Reason.NO_LABEL),
        (raw(source, cls=b"1", txt=b"\xff\xfe"), Reason.BAD_CAPTION),
        ({"__key__": "k", "cls": b"1", "png": b""}, Reason.NO_VIDEO),
    ):
        with pytest.raises(Skip) as caught:
            decoder(num_labels=10)(sample, 0)
        assert caught.value.reason is expected


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm"])
def test_a_playlist_is_not_followed(tmp_path, source, suffix):
    (tmp_path / "secret.mp4").write_bytes(source)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n".encode()
    for data in (playlist, concat):
        assert reason(data, suffix) is Reason.UNDECODABLE_VIDEO


def test_an_index_may_not_claim_more_samples_than_there_are_bytes():
    honest = numbered_video(24, codec="mpeg4")
    bomb = patched(patched(honest, b"stsz", 4, ">II", 1, 50_000_000), b"stsc", 12, ">I", 50_000_000)
    fragments = numbered_video(24, codec="mpeg4", format_options={"movflags": "frag_keyframe+empty_moov"})
    long_size = patched(fragments, b"trun", -8, ">I4sQII", 1, b"trun", 60, 0, 50_000_000)
    for data in (bomb, patched(fragments, b"trun", 0, ">II", 0, 50_000_000), long_size):
        assert reason(data) is Reason.UNDECODABLE_VIDEO
    assert read_numbers(decoder(frames=1)(raw(fragments), 0)["pixels"]) == [12]


def test_memory_errors_of_our_own_are_not_the_samples_fault(monkeypatch, source):
    monkeypatch.setattr(av, "open", lambda *_, **__: bytearray(2**62))
    with pytest.raises(MemoryError):
        decoder()(raw(source), 0)


def test_probe(source):
    assert probe_video(source, "mp4") == probe_video(source, "mov")
    found = probe_video(source, "mp4")
    assert (found.width, found.height, found.fps, found.duration_s, found.codec) == (SIZE, SIZE, 24, 6, "h264")
    assert probe_video(numbered_video(24, "webm", "libvpx-vp9"), "webm").codec == "vp9"
    for data, suffix in ((b"", "mp4"), (source, "mkv"), (source, "avi"), (sound_only(), "mp4")):
        with pytest.raises(Skip):
            probe_video(data, suffix)


def test_streams_read_videos():
    assert {MAX_ENTRY_BYTES[suffix] for suffix in ("mp4", "webm", "mkv", "mov")} == {512 * 2**20}


STREAMS = [
    ("avi", "avi", "mpeg4"),
    ("ts", "mpegts", "libx264"),
    ("mts", "mpegts", "mpeg2video"),
    ("mpg", "mpeg", "mpeg2video"),
    ("flv", "flv", "flv"),
    ("flv", "flv", "libx264"),
    ("m4v", "ipod", "libx264"),
    ("3gp", "3gp", "libx264"),
    ("wmv", "asf", "wmv2"),
]


@pytest.mark.parametrize(("suffix", "format", "codec"), STREAMS)
def test_other_containers(suffix, format, codec):
    data = numbered_video(144, format, codec)
    assert read_numbers(decoder()(raw(data, suffix), 0)["pixels"]) == [66, 69, 72, 75, 78]
    for number in (0, 1, 30, 71, 140):
        # MPEG's program streams begin a frame before what they show first.
        slack = 1 if format == "mpeg" else 0
        [found] = numbers_at(data, [Fraction(2 * number + 1, 48)], suffix)
        assert number - slack <= found <= number
    assert float(probe_video(data, suffix).duration_s) == pytest.approx(6, abs=0.05)


@pytest.mark.parametrize(("suffix", "format", "codec"), [STREAMS[i] for i in (0, 1, 3, 5, 8)])
def test_damage_to_other_containers_is_a_reason(suffix, format, codec):
    whole = numbered_video(48, format, codec)
    draws = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.9):
        with contextlib.suppress(Skip):
            decoder()(raw(whole[: int(share * len(whole))], suffix), 0)
    for _ in range(30):
        data = bytearray(whole)
        for place in draws.integers(0, len(data) if draws.random() < 0.5 else 400, 5):
            data[place] = draws.integers(256)
        with contextlib.suppress(Skip):
            decoder()(raw(bytes(data), suffix), 0)
    for text in (b"#EXTM3U\n/etc/passwd\n", b"ffconcat version 1.0\nfile /etc/passwd\n", image("PNG")):
        assert reason(text * 20, suffix) in {Reason.UNDECODABLE_VIDEO, Reason.NO_VIDEO, Reason.CUT_SHORT}


def hdr(code, transfer, primaries="bt2020", size=32):
    """Grey of a 10-bit code value (0 to 1 of the range) in a clip that says it is HDR."""
    frame = av.VideoFrame(size, size, "yuv420p10le")
    for plane, value in zip(frame.planes, (round(64 + 876 * code), 512, 512)):
        plane.update(np.full(plane.buffer_size // 2, value, "<u2").tobytes())
    file = io.BytesIO()
    colours = {"colorspace": "bt2020nc", "color_primaries": primaries, "color_trc": transfer, "color_range": "tv"}
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24, options={"qp": "0", "preset": "ultrafast", **colours})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p10le"
        for number in range(2):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


# Code values of ITU-R BT.2100, and what the scaler of FFmpeg 8.1 makes of them for BT.709 (203 nits are white).
@pytest.mark.parametrize(
    ("transfer", "code", "expected"),
    [
        ("smpte2084", 0.0, 0),
        ("smpte2084", 0.1497, 28),  # 1 nit
        ("smpte2084", 0.4400, 142),  # 50 nits
        ("smpte2084", 0.5081, 189),  # 100 nits
        ("smpte2084", 0.5807, 254),  # 203 nits
        ("smpte2084", 0.7518, 255),  # 1000 nits
        ("arib-std-b67", 0.1732, 50),
        ("arib-std-b67", 0.3873, 111),
        ("arib-std-b67", 0.5440, 157),
        ("arib-std-b67", 0.75, 254),
        ("arib-std-b67", 1.0, 255),
    ],
)
def test_hdr_is_shown_in_standard_range(transfer, code, expected):
    pixels = decoder(frames=1, fps=(24,))(raw(hdr(code, transfer)), 0)["pixels"].float()
    assert (pixels - expected).abs().max() <= 1.5


def test_the_primaries_of_hdr_become_those_of_sdr():
    """BT.709's red, written in the primaries of BT.2020 (its matrix is that of ITU-R BT.2087)."""
    light = np.array([0.6274, 0.0691, 0.0164]) * 100 / 10_000  # of 10 000 nits
    power = light ** (2610 / 16384)
    code = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    pixels = from_hdr((code * 65535).round().astype(np.uint16)[None, None], 16, 9)
    assert np.abs(pixels[0, 0] - [255 * (100 / 203) ** (1 / 2.4), 0, 0]).max() < 12
    assert pixels[0, 0, 0] == pytest.approx(255 * (100 / 203) ** (1 / 2.4), abs=2)
