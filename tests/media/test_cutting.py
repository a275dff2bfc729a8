"""Parts of videos, cut out by copying packets: every frame of them is there, at its time."""

import io
from bisect import bisect_right
from fractions import Fraction
from mmap import ACCESS_READ, mmap

import av
import numpy as np
import pytest
from test_video import CORNERS, FORMATS, numbered, numbered_video, numbers_at, patched, video

from grn.media.cutting import cut_suffix, cut_video
from grn.media.skips import Reason, Skip
from grn.media.video import open_video, probe_video

OPEN_GROUPS = {"g": "25", "bf": "3", "sc_threshold": "0", "x264-params": "open-gop=1:b-pyramid=normal"}


def cut(data, begin, end, suffix="mp4", max_bytes=2**20):
    return cut_video(data, suffix, Fraction(begin), None if end is None else Fraction(end), max_bytes=max_bytes)


def reason(*arguments, **options):
    with pytest.raises(Skip) as caught:
        cut(*arguments, **options)
    return caught.value.reason


@pytest.mark.parametrize(
    ("suffix", "format", "codec", "options"),
    [
        *((*format, None) for format in FORMATS),
        ("mp4", "mp4", "libx264", OPEN_GROUPS),
        ("mkv", "matroska", "libx264", OPEN_GROUPS),
        ("mkv", "matroska", "ffv1", {}),
    ],
)
def test_the_frames_of_a_part(suffix, format, codec, options):
    data = numbered_video(100, format, codec, fps=10, codec_options=options)
    for begin, end in ((0, 100), (3, 20), (24, 26), (25, 50), (49, 75), (88, 97), (98, 100)):
        part, start = cut(data, Fraction(begin, 10), Fraction(end, 10), suffix)
        times = [Fraction(number, 10) - start for number in range(begin, end)]
        assert numbers_at(part, times, suffix) == list(range(begin, end))
        assert len(part) < len(data) * 0.7 or begin == 0
        assert (part, start) == cut(data, Fraction(begin, 10), Fraction(end, 10), suffix)


@pytest.mark.parametrize(
    ("suffix", "format", "codec", "pix_fmt"),
    [
        ("mp4", "mp4", "libx264", "yuv420p"),
        ("mp4", "mp4", "libvpx-vp9", "yuv420p"),  # which has the shape of pixels in the container alone
        ("mov", "mov", "prores_ks", "yuv422p10le"),
        ("mkv", "matroska", "libx264", "yuv420p"),
    ],
)
def test_the_shape_of_pixels_is_kept(suffix, format, codec, pix_fmt):
    options = {} if codec == "prores_ks" else None
    data = numbered_video(30, format, codec, pix_fmt=pix_fmt, codec_options=options, pixel_aspect=Fraction(3, 2))
    part, _ = cut(data, 1, None, suffix)
    assert {probe_video(it, suffix).width for it in (data, part)} == {48}


def test_what_would_lose_the_shape_of_its_pixels_is_not_cut():
    plain = numbered_video(30, "matroska", "ffv1", codec_options={})
    told = plain.replace(
        b"\x54\xb2\x81\x04", b"\x54\xb0\x81\x60"
    )  # DisplayWidth=96 for a DisplayUnit that tells nothing
    assert (probe_video(plain, "mkv").width, probe_video(told, "mkv").width) == (32, 96)
    assert cut(plain, 1, None, "mkv")
    assert reason(told, 1, None, "mkv") is Reason.UNCUTTABLE_VIDEO


@pytest.mark.parametrize(("suffix", "format"), [("mp4", "mp4"), ("mkv", "matroska")])
def test_variable_rate_and_times_that_do_not_begin_at_zero(suffix, format):
    gaps = np.random.default_rng(0).integers(5, 400, 60)
    pts = [0, *np.cumsum(gaps).tolist()]
    moments = [7777 + time for time in pts]
    data = numbered_video(61, format, fps=1000, pts=moments, time_base=Fraction(1, 1000))
    for begin in (0, 2500, 6321):
        times = list(range(begin, begin + 2000, 97))
        part, start = cut(data, Fraction(begin, 1000), Fraction(begin + 2000, 1000), suffix)
        expected = [bisect_right(pts, time) - 1 for time in times]
        assert numbers_at(part, [Fraction(time, 1000) - start for time in times], suffix) == expected


def test_what_an_edit_list_hides():
    """A file whose first seven frames are there for decoding alone, as players' own cutting leaves it."""
    data, file = numbered_video(100, fps=10, codec_options=OPEN_GROUPS), io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format="mp4") as target:
        stream = source.streams.video[0]
        copy, hidden = target.add_stream_from_template(stream), int(Fraction(7, 10) / stream.time_base)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - hidden, packet.dts - hidden, copy
                target.mux(packet)
    data = file.getvalue()
    for begin, end in ((0, 5), (3, 30), (70, 93)):
        part, start = cut(data, Fraction(begin, 10), Fraction(end, 10))
        times = [Fraction(number, 10) - start for number in range(begin, end)]
        assert numbers_at(part, times) == list(range(begin + 7, end + 7))


def test_to_the_end_and_beyond_it():
    data = numbered_video(40, fps=10)
    for end in (None, 100):
        part, start = cut(data, 3, end)
        assert numbers_at(part, [Fraction(number, 10) - start for number in range(30, 40)]) == list(range(30, 40))
    assert reason(data, 4, None) is Reason.BAD_SECTION
    assert reason(data, 50, 60) is Reason.BAD_SECTION


def test_sound_is_left_out_and_the_way_up_is_kept():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream, sound = container.add_stream("libx264", rate=24), container.add_stream("aac", rate=8000)
        stream.width = stream.height = 32
        for number in range(48):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(stream.encode())
        for number in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, number * 1024
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    part, start = cut(file.getvalue(), 1, 2)
    assert numbers_at(part, [Fraction(number, 24) - start for number in range(24, 48)]) == list(range(24, 48))
    with av.open(io.BytesIO(part)) as container:
        assert [stream.type for stream in container.streams] == ["video"]

    turned = patched(video([CORNERS] * 30), b"tkhd", 40, ">9i", 0, 2**16, 0, -(2**16), 0, 0, 0, 0, 2**30)
    part, _ = cut(turned, Fraction(1, 2), 1)
    assert (probe_video(part, "mp4").width, probe_video(part, "mp4").height) == (48, 64)


def test_bounds():
    data = numbered_video(100, fps=10)
    assert reason(data, 0, 10, max_bytes=len(data) // 2) is Reason.OVERSIZE_ENTRY
    assert len(cut(data, 0, 1, max_bytes=len(data) // 2)[0]) < len(data) // 2
    assert reason(data[: len(data) // 2], 0, 10) is Reason.UNDECODABLE_VIDEO
    assert reason(b"no video", 0, 10) is Reason.UNDECODABLE_VIDEO
    many = patched(data, b"stsz", 8, ">I", 2**31)  # samples that the index claims
    assert reason(many, 0, 10) is Reason.UNDECODABLE_VIDEO


def test_one_group_of_pictures_all_along_is_bounded(monkeypatch):
    monkeypatch.setattr("grn.media.cutting.MAX_DECODED_FRAMES", 100)
    options = {"g": "1000", "sc_threshold": "0", "preset": "ultrafast"}
    data = numbered_video(300, fps=10, codec_options=options)
    assert reason(data, 20, 21) is Reason.TOO_MANY_FRAMES
    part, start = cut(data, 9, 25)
    assert numbers_at(part, [9 - start, 24 - start]) == [90, 240]


def test_a_mapped_file_is_read_from_its_beginning_each_time(tmp_path):
    (tmp_path / "a.webm").write_bytes(data := numbered_video(100, "webm", "libvpx-vp9", fps=10))
    with open(tmp_path / "a.webm", "rb") as file:
        mapped = mmap(file.fileno(), 0, access=ACCESS_READ)
    assert cut(mapped, 3, 4, "webm") == cut(mapped, 3, 4, "webm") == cut(data, 3, 4, "webm")
    with open_video(mapped, "webm", max_pixels=2**20) as opened:
        assert next(opened.container.decode(opened.stream)).pts == 0


@pytest.mark.parametrize(
    ("suffix", "format", "codec"),
    [("ts", "mpegts", "libx264"), ("mpg", "mpeg", "mpeg2video"), ("flv", "flv", "libx264"), ("wmv", "asf", "wmv2"),
     ("m4v", "ipod", "libx264")],
)  # fmt: skip
def test_parts_of_other_containers(suffix, format, codec):
    data = numbered_video(100, format, codec, fps=25)
    other = cut_suffix(suffix)
    assert other == {"m4v": "mp4", "wmv": "wmv"}.get(suffix, "mkv")
    for begin, end in ((0, 100), (30, 45), (88, 97)):
        part, start = cut(data, Fraction(begin, 25), Fraction(end, 25), suffix)
        found = numbers_at(part, [Fraction(2 * n + 1, 50) - start for n in range(begin, end)], other)
        # MPEG's program streams begin a frame before what they show first.
        assert found in [list(range(begin, end)), [max(0, n - 1) for n in range(begin, end)]][: 1 + (format == "mpeg")]
