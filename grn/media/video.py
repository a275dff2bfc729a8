"""Decodes clips from untrusted video files: opening, seeking, resampling in time, cropping.

Only the clip is decoded, and what it needs from the keyframe before it. Times are exact fractions of seconds from the
beginning of the video stream.
"""

import io
import random
import re
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from math import floor
from mmap import mmap
from typing import Any

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps
from torch import Tensor

from grn.media.colour import HLG, PQ, from_hdr
from grn.media.images import center_crop, to_tensor
from grn.media.skips import Reason, Skip

MAX_FRAME_PIXELS = 16 * 2**20  # a frame of 4K has 8.3 million; decoders hold up to seventeen of them
MAX_DECODED_FRAMES = 4096
MAX_INDEXED_SAMPLES = 2**25  # ten minutes of uncompressed sound at 48 kHz are 28.8 million

# The demuxer is told, never guessed: guessing would find playlists, which name further files.
DEMUXERS = (
    dict.fromkeys(("mp4", "mov", "m4v", "3gp", "3g2"), "mov")
    | dict.fromkeys(("webm", "mkv"), "matroska")
    | dict.fromkeys(("ts", "mts", "m2ts"), "mpegts")
    | dict.fromkeys(("mpg", "mpeg", "vob"), "mpeg")
    | dict.fromkeys(("wmv", "asf"), "asf")
    | {"avi": "avi", "flv": "flv", "ogv": "ogg"}
)
# What people keep videos in; FFmpeg has hundreds of others, seldom tried on hostile bytes.
DECODERS = (
    "h264,hevc,vp8,vp9,libvpx,libvpx-vp9,av1,libdav1d,libaom-av1,mpeg4,mpeg2video,mpeg1video,h263,mjpeg,prores,dnxhd,"
    "ffv1,rawvideo,flv,vp6f,theora,msmpeg4,msmpeg4v2,wmv1,wmv2,wmv3,vc1"
)

FAR = 10**6  # seconds, after the end of any video
ROUNDING = Fraction(1, 1000)  # seconds; Matroska rounds times to this
STRANGEST_PIXEL = 4  # of a pixel's longer side to the shorter; what claims more is mistaken. Of DVDs it is 1.42
UNSPECIFIED = 2  # FFmpeg's number for a color matrix that the stream does not name
SAMPLE_COUNTS = {b"stsz": 8, b"trun": 4}  # boxes of an MP4's index, where in them the number of samples stands
# By the signs of the display matrix's (a, b, c, d): x' = ax + cy, y' = bx + dy, y downwards.
TRANSPOSITIONS: dict[tuple[int, ...], Image.Transpose] = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class VideoInfo:
    """Width and height in pixels as it is shown, mean frames a second, seconds, FFmpeg's name of the codec."""

    width: int
    height: int
    fps: float
    duration_s: float
    codec: str


def probe_video(data: bytes, suffix: str, *, max_pixels: int = MAX_FRAME_PIXELS) -> VideoInfo:
    """What a video is, after its first frame has been decoded.

    Args:
        data: the whole file.
        suffix: of its name, one of `VIDEO_SUFFIXES`.

    Raises:
        Skip: it cannot be read, with the reason.
    """
    with open_video(data, suffix, max_pixels=max_pixels) as video:
        seconds = duration(video)
        first = next(frames_from(video, Fraction(0), max_decoded_frames=MAX_DECODED_FRAMES))
        codec = video.stream.codec_context.codec.canonical_name
        return VideoInfo(*video.to_rgb(first).size, float(1 / video.interval), float(seconds), codec)


@dataclass(frozen=True)
class Video:
    """An open video; `max_pixels`: of a frame as it is shown."""

    container: InputContainer
    stream: VideoStream
    max_pixels: int
    reformatter: VideoReformatter = field(default_factory=VideoReformatter)

    @property
    def time_base(self) -> Fraction:
        """Seconds that one unit of the stream's timestamps lasts."""
        if self.stream.time_base is None:
            raise Skip(Reason.UNDECODABLE_VIDEO)
        return self.stream.time_base

    @property
    def first_pts(self) -> int:
        """The timestamp from which times count."""
        return self.stream.start_time or 0

    @property
    def interval(self) -> Fraction:
        """Seconds between frames on average, for frames that do not tell."""
        return 1 / (self.stream.average_rate or self.stream.guessed_rate or Fraction(25))

    @property
    def pixel_aspect(self) -> Fraction:
        """Width over height of a pixel as it is shown; 1 where the stream does not tell, or nonsense."""
        aspect = self.stream.sample_aspect_ratio or Fraction(1)
        return aspect if Fraction(1, STRANGEST_PIXEL) <= aspect <= STRANGEST_PIXEL else Fraction(1)

    def time(self, pts: int) -> Fraction:
        return (pts - self.first_pts) * self.time_base

    def to_rgb(self, frame: av.VideoFrame) -> Image.Image:
        """Any pixel format -> upright RGB of 8 bits a channel, by the frame's own color matrix and range.

        HDR (PQ, HLG) becomes what video of standard range would show. Pixels become square: the width alone is made to
        fit, as players do.

        Raises:
            Skip: larger than `max_pixels` (videos may change their size), or damaged.
        """
        if frame.width * frame.height * max(1, self.pixel_aspect) > self.max_pixels:
            raise Skip(Reason.TOO_MANY_PIXELS)
        if frame.is_corrupt:
            raise Skip(Reason.UNDECODABLE_VIDEO)
        is_hdr = frame.color_trc in (PQ, HLG)
        format = "rgb48le" if is_hdr else "rgb24"
        matrix: Any = colour_matrix(frame)  # names do, which the stubs do not say
        rgb = self.reformatter.reformat(frame, format=format, src_colorspace=matrix, threads=1)
        pixels = rgb.to_ndarray()
        image = Image.fromarray(from_hdr(pixels, frame.color_trc, frame.color_primaries) if is_hdr else pixels)
        if (width := max(1, round(frame.width * self.pixel_aspect))) != frame.width:
            image = image.resize((width, frame.height), Image.Resampling.BICUBIC)
        transposition = display_transposition(frame)
        return image if transposition is None else image.transpose(transposition)


@contextmanager
def open_video(data: bytes | mmap, suffix: str, *, max_pixels: int) -> Iterator[Video]:
    """Opens the first video stream, for one thread; inside the block too, whatever FFmpeg raises becomes a `Skip`."""
    options = {
        "threads": "1",  # there are many DataLoader workers
        "max_pixels": str(2 * max_pixels),  # in the decoder itself, which counts whole macroblocks
        "codec_whitelist": DECODERS,
        "protocol_whitelist": "",
    }
    try:
        if DEMUXERS[suffix] == "mov":
            refuse_index_bomb(data)
        with av.open(
            as_file(data),
            "r",
            format=DEMUXERS[suffix],
            options=options,
            metadata_errors="replace",
            io_open=refuse_to_open,
        ) as container:
            stream = video_stream(container)
            video, codec = Video(container, stream, max_pixels), stream.codec_context
            if codec.width * codec.height * max(1, video.pixel_aspect) > max_pixels:
                raise Skip(Reason.TOO_MANY_PIXELS)
            codec.options = options
            yield video
    except Skip:
        raise
    except av.FFmpegError:  # its MemoryError too, which tells of a size that the file claims
        raise Skip(Reason.UNDECODABLE_VIDEO) from None
    except MemoryError:
        raise
    except Exception:  # PyAV raises nearly anything on values that it did not expect
        raise Skip(Reason.UNDECODABLE_VIDEO) from None


def as_file(data: bytes | mmap) -> io.BytesIO | mmap:
    """To read from its beginning; of a file that is mapped, no more is read than what is asked for."""
    if isinstance(data, bytes):
        return io.BytesIO(data)
    data.seek(0)
    return data


def refuse_to_open(url: str, *_) -> None:
    """In place of opening another file or address that the video names."""
    raise PermissionError(url)


def video_stream(container: InputContainer) -> VideoStream:
    """The first stream of moving pictures."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of a song
            if stream.codec_context is None:
                raise Skip(Reason.UNDECODABLE_VIDEO)
            return stream
    raise Skip(Reason.NO_VIDEO)


def refuse_index_bomb(data: bytes | mmap) -> None:
    """Skips an MP4 whose index claims more samples than it has bytes: FFmpeg takes a few bytes' word for gigabytes.

    (cmov, a compressed index, is refused altogether: QuickTime's, of old.)
    """
    claimed = 0
    for start, end in boxes_but_media(data):
        for match in re.finditer(rb"stsz|trun|cmov", memoryview(data)[start:end]):
            claimed += claimed_samples(data, start + match.start(), match[0])
            if claimed > min(len(data), MAX_INDEXED_SAMPLES):
                raise Skip(Reason.UNDECODABLE_VIDEO)


def claimed_samples(data: bytes | mmap, position: int, kind: bytes) -> int:
    """How many samples the box claims to index whose name stands at `position`."""
    if kind == b"cmov":
        return len(data) + 1
    has_long_size = data[position - 4 : position] == b"\0\0\0\1"
    count = position + len(kind) + 8 * has_long_size + SAMPLE_COUNTS[kind]
    return int.from_bytes(data[count : count + 4], "big")


def boxes_but_media(data: bytes | mmap) -> Iterator[tuple[int, int]]:
    """(start, end) of the outermost boxes of an MP4, without those of the media data."""
    start = 0
    while start + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        if size == 1 and start + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, start + 8)
        end = min(start + size, len(data)) if size >= 8 else len(data)
        if kind != b"mdat":
            yield start, end
        start = end


def duration(video: Video) -> Fraction:
    """Seconds, by the packets after the last keyframe: what the container claims is not asked."""
    video.container.seek(floor(FAR / video.time_base), stream=video.stream)
    ends = packet_ends(video)
    if not ends and video.container.format.name == "flv":  # has no index, and nothing is so far out
        rewind(video)
        ends = packet_ends(video)
    if not ends:
        raise Skip(Reason.CUT_SHORT)
    return max(ends)


def packet_ends(video: Video) -> list[Fraction]:
    """When each packet from where the container stands ends to be shown, in seconds."""
    return [
        video.time(packet.pts) + ((packet.duration or 0) * video.time_base or video.interval)
        for packet in video.container.demux(video.stream)
        if packet.pts is not None and not packet.is_corrupt
    ]


def rewind(video: Video) -> None:
    """To the beginning."""
    # MPEG's streams are sought in by the order of decoding, without regard to keyframes: the first one would be missed.
    early = FAR if video.container.format.name in ("mpegts", "mpeg") else 0
    video.container.seek(video.first_pts - floor(early / video.time_base), stream=video.stream)


def choose_times(
    begin: Fraction, end: Fraction, frames: int, fps: Sequence[float], draws: random.Random | None
) -> list[Fraction]:
    """The moments whose pictures make a clip out of what lies between `begin` and `end`, in seconds.

    Args:
        draws: of the frame rate among those that fit, and of the start; None: the highest rate, the middle.

    Raises:
        Skip: that is too short for all of `fps`.
    """
    rates = [rate for rate in map(Fraction, fps) if (frames - 1) / rate < end - begin]
    if not rates:
        raise Skip(Reason.CLIP_TOO_SHORT)
    rate = draws.choice(rates) if draws else max(rates)
    place = Fraction(draws.random()) if draws else Fraction(1, 2)
    start = begin + place * (end - begin - (frames - 1) / rate)
    return [start + k / rate for k in range(frames)]


def frames_from(video: Video, start: Fraction, *, max_decoded_frames: int) -> Iterator[av.VideoFrame]:
    """The frames from the one shown at `start`, or some before it, to the end of the video.

    Decodes from the keyframe before; from the first one where frames have no timestamps.

    Raises:
        Skip: there is no frame; later, from iterating: `max_decoded_frames` are over.
    """
    target, back = start, Fraction(1)
    while True:
        if target > 0:
            video.container.seek(video.first_pts + floor(target / video.time_base), stream=video.stream)
        else:
            rewind(video)
        frames = decoded(video, max_frames=max_decoded_frames)
        first = next(frames, None)
        if first is None and target == 0:
            raise Skip(Reason.CUT_SHORT)
        if first is not None and (target == 0 or is_before(first, start, video)):
            return chain([first], frames)
        # Containers seek by the order of decoding, so that the keyframe may be shown only after `start`.
        known = first is None or first.pts is not None
        target, back = (max(start - back, Fraction(0)), 2 * back) if known else (Fraction(0), back)


def is_before(frame: av.VideoFrame, moment: Fraction, video: Video) -> bool:
    """Whether a frame is whole, and known to be shown at `moment` or before."""
    return frame.pts is not None and video.time(frame.pts) <= moment and not frame.is_corrupt


def decoded(video: Video, *, max_frames: int) -> Iterator[av.VideoFrame]:
    """All frames from where the container stands."""
    for number, packet in enumerate(video.container.demux(video.stream)):
        if number >= max_frames and packet.size:
            raise Skip(Reason.TOO_MANY_FRAMES)
        yield from packet.decode()


def timed(frames: Iterator[av.VideoFrame], video: Video) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Each frame with the time at which the next one takes its place; the last one with the end of its own duration.

    A frame without a timestamp comes one interval after the one before. As timestamps are rounded, frames already take
    their place half a unit before.
    """
    slack = min(video.time_base, ROUNDING) / 2
    shown, time = None, -video.interval
    for frame in frames:
        time = video.time(frame.pts) if frame.pts is not None else time + video.interval
        if shown is not None:
            yield shown, time - slack
        shown = frame
    if shown is not None:
        yield shown, time + ((shown.duration or 0) * video.time_base or video.interval)


def resample(
    frames: Iterator[tuple[av.VideoFrame, Fraction]],
    times: Sequence[Fraction],
    picture: Callable[[av.VideoFrame], Tensor],
) -> list[Tensor]:
    """The picture shown at each of `times`, which ascend.

    Args:
        frames: with the time until which each is shown.

    Raises:
        Skip: the frames end before.
    """
    clip = []
    for frame, until in frames:
        due = bisect_left(times, until) - len(clip)
        if due > 0:
            clip += [picture(frame)] * due
        if len(clip) == len(times):
            return clip
    raise Skip(Reason.CUT_SHORT)


def to_picture(frame: av.VideoFrame, *, video: Video, size: int, mirrored: bool) -> Tensor:
    """-> uint8 [3, 1, size, size]."""
    image = center_crop(video.to_rgb(frame), size, max_pixels=video.max_pixels)
    return to_tensor(ImageOps.mirror(image) if mirrored else image)


def colour_matrix(frame: av.VideoFrame) -> str | None:
    """The matrix of a frame that does not name its own, as players guess it: BT.709 from HD on, else BT.601.

    Of HDR, it is BT.2020.
    """
    if frame.colorspace != UNSPECIFIED or frame.format.is_rgb:
        return None
    if frame.color_trc in (PQ, HLG):
        return "BT2020"
    return "ITU709" if frame.width >= 1280 or frame.height > 576 else "ITU601"


def display_transposition(frame: av.VideoFrame) -> Image.Transpose | None:
    """How the frame must be turned or mirrored to be shown upright; None for not at all, or by odd angles."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    return TRANSPOSITIONS.get(tuple((value > 0) - (value < 0) for value in (a, b, c, d)))
