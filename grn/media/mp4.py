"""Videos out of frames: H.264 in MP4 by PyAV, frame by frame, so that memory does not grow with their length.

Colors are converted by BT.709, whatever the size, and the stream says so: where it did not, readers would guess by the
size.
"""

from collections.abc import Iterable
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import BinaryIO

import av
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from grn.runtime.errors import UserError
from grn.runtime.files import write_atomically

FPS = (0.1, 1000)


def frame_rate(fps: object) -> Fraction:
    """Frames a second as a stream counts them: the nearest fraction whose denominator is 1001 at most.

    Raises:
        UserError: no number, or one outside of `FPS`.
    """
    # The stubs of Real know no order.
    if (
        not isinstance(fps, Real) or isinstance(fps, bool) or not FPS[0] <= fps <= FPS[1]  # pyright: ignore[reportOperatorIssue]
    ):
        raise UserError(f"fps={fps}: frames a second, a number from {FPS[0]} to {FPS[1]}")
    return Fraction(float(fps)).limit_denominator(1001)


def write_mp4(frames: Iterable[Tensor], target: BinaryIO, *, fps: float, quality: int = 16) -> None:
    """Encodes frames as they come. The bytes depend on the arguments alone.

    Args:
        frames: uint8 [3, H, W] each, RGB, one or more, all of one size; H and W even, as H.264 halves the colors.
        target: a writable, seekable file.
        fps: frames a second, as `frame_rate` has it.
        quality: x264's constant rate factor, 0 (largest) to 51.

    Raises:
        UserError: no frame, or one of an odd height or width; no such `fps`.
    """
    rate, reformatter = frame_rate(fps), VideoReformatter()
    with av.open(target, "w", format="mp4") as container:
        stream = None
        for frame in frames:
            height, width = frame.shape[1:]
            if height % 2 or width % 2:
                raise UserError(f"an mp4 needs even sides, frames are {height}x{width}: give another height or width")
            if stream is None:
                stream = container.add_stream("libx264", rate=rate)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.options = {"crf": str(quality), "threads": "1"}
                _name_colours(stream)
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().cpu().numpy(), format="rgb24")
            picture = reformatter.reformat(
                picture,
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                threads=1,
            )
            container.mux(stream.encode(picture))
        if stream is None:
            raise UserError("an mp4 needs at least one frame")
        container.mux(stream.encode())


def _name_colours(stream: VideoStream) -> None:
    codec = stream.codec_context
    codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
    codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709


def save_mp4(frames: Iterable[Tensor], path: Path, *, fps: float, quality: int = 16) -> Path:
    """`write_mp4` to a path, atomically."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            write_mp4(frames, file, fps=fps, quality=quality)

    return write_atomically(path, write)
