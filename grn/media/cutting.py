"""Cuts a part out of a video by copying packets, without re-encoding."""

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import dropwhile
from math import floor
from mmap import mmap

import av
from av.packet import Packet
from av.video.stream import VideoStream

from grn.media.skips import Reason, Skip
from grn.media.video import MAX_DECODED_FRAMES, MAX_FRAME_PIXELS, Video, duration, open_video, rewind

# What a container holds, it holds again.
MUXERS = {"mp4": "mp4", "mov": "mov", "webm": "webm", "mkv": "matroska", "wmv": "asf"}
SUFFIXES = {"m4v": "mp4", "3gp": "mp4", "3g2": "mp4", "asf": "wmv"} | {suffix: suffix for suffix in MUXERS}


def cut_suffix(suffix: str) -> str:
    """The suffix of what is cut out of a video of `suffix`: Matroska holds what MPEG's streams, AVI and others do."""
    return SUFFIXES.get(suffix, "mkv")


def cut_video(
    data: bytes | mmap, suffix: str, begin: Fraction, end: Fraction | None, *, max_bytes: int
) -> tuple[bytes, Fraction]:
    """The pictures of a video that are shown from `begin` to `end`, with all that decoding them needs; no sound.

    Args:
        data: the whole file.
        suffix: of its name, one of `VIDEO_SUFFIXES`; what is cut out has `cut_suffix` of it.
        begin, end: seconds from the beginning of the video stream; None: to its end.
        max_bytes: what is cut out may have.

    Returns:
        (file, moment of the video, in seconds, from which the file's times count: at or before `begin`).

    Raises:
        Skip: with the reason: it cannot be read, begins after its end, is too large, or needs more than
            `MAX_DECODED_FRAMES` before `begin`.
    """
    with open_video(data, suffix, max_pixels=MAX_FRAME_PIXELS) as video:
        if begin >= duration(video):
            raise Skip(Reason.BAD_SECTION)
        packets = list(_packets(video, begin, end, max_bytes))
        first, pixel_aspect = video.time(_pts(packets[0])), video.pixel_aspect
        cut = _mux(packets, video.stream, MUXERS[cut_suffix(suffix)])
    if len(cut) > max_bytes:
        raise Skip(Reason.OVERSIZE_ENTRY)
    with open_video(cut, cut_suffix(suffix), max_pixels=MAX_FRAME_PIXELS) as video:  # muxers begin where they see fit
        if video.pixel_aspect != pixel_aspect:  # PyAV has no way to tell Matroska what its codec does not
            raise Skip(Reason.UNCUTTABLE_VIDEO)
        return cut, first - video.time(_pts(next(video.container.demux(video.stream))))


def _pts(packet: Packet) -> int:
    if packet.pts is None:
        raise Skip(Reason.UNCUTTABLE_VIDEO)
    return packet.pts


def _packets(video: Video, begin: Fraction, end: Fraction | None, max_bytes: int) -> Iterator[Packet]:
    """Those from the keyframe before `begin` to the last one that may be shown before `end`, in order of decoding."""
    size = 0
    for number, packet in enumerate(_packets_from(video, begin)):
        if packet.dts is not None and end is not None and video.time(packet.dts) >= end:
            return  # nor is what follows shown before it is decoded
        size += packet.size
        if size > max_bytes:
            raise Skip(Reason.OVERSIZE_ENTRY)
        if number >= MAX_DECODED_FRAMES and packet.dts is not None and video.time(packet.dts) < begin:
            raise Skip(Reason.TOO_MANY_FRAMES)
        yield packet


def _packets_from(video: Video, begin: Fraction) -> Iterator[Packet]:
    """All packets from a keyframe on that is shown at `begin` or before."""
    target, back = begin, Fraction(1)
    while True:
        if target > 0:
            video.container.seek(video.first_pts + floor(target / video.time_base), stream=video.stream)
        else:
            rewind(video)
        packets = (packet for packet in video.container.demux(video.stream) if packet.size)
        if target > 0:  # MPEG's streams are sought in without regard to keyframes
            packets = dropwhile(lambda packet: not packet.is_keyframe, packets)
        first = next(packets, None)
        if first is None and target > 0:
            target, back = max(target - back, Fraction(0)), 2 * back
            continue
        if first is None or first.pts is None:
            raise Skip(Reason.UNCUTTABLE_VIDEO)
        if target == 0 or video.time(first.pts) <= begin:
            yield first
            yield from packets
            return
        # Containers seek by the order of decoding, so that the keyframe may be shown only after `begin`.
        target, back = max(target - back, Fraction(0)), 2 * back


def _mux(packets: Sequence[Packet], stream: VideoStream, format: str) -> bytes:
    """A file of these packets, whose bytes depend on them alone (bitexact: Matroska would draw ids)."""
    file = io.BytesIO()
    start = _pts(packets[0]) if packets[0].dts is None else packets[0].dts
    try:
        with av.open(file, "w", format=format, container_options={"fflags": "+bitexact"}) as container:
            copy = container.add_stream_from_template(stream)
            if aspect := stream.sample_aspect_ratio:
                copy.codec_context.sample_aspect_ratio = aspect
            for packet in packets:
                packet.stream = copy
                packet.pts = _pts(packet) - start
                packet.dts = None if packet.dts is None else packet.dts - start
                container.mux(packet)
    except (av.FFmpegError, ValueError, TypeError):
        raise Skip(Reason.UNCUTTABLE_VIDEO) from None
    return file.getvalue()
