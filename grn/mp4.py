"""Videos out of frames: H.264 in MP4 by PyAV, frame by frame, so that memory does not grow with their length."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
from torch import Tensor

from grn.errors import UserError
from grn.files import write_atomically


def write_mp4(frames: Iterable[Tensor], target: BinaryIO, *, fps: float, quality: int = 16) -> None:
    """Encodes frames as they come. The bytes depend on the arguments alone.

    Args:
        frames: uint8 [3, H, W] each, RGB, one or more, all of one size; H and W even, as H.264 halves the colours.
        target: a writable, seekable file.
        fps: frames a second.
        quality: x264's constant rate factor, 0 (largest) to 51.

    Raises:
        UserError: no frame, or one of an odd height or width.
    """
    with av.open(target, "w", format="mp4") as container:
        stream = None
        for frame in frames:
            height, width = frame.shape[1:]
            if height % 2 or width % 2:
                raise UserError(f"an mp4 needs even sides, frames are {height}x{width}: give another height or width")
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.options = {"crf": str(quality), "threads": "1"}
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().cpu().numpy(), format="rgb24")
            container.mux(stream.encode(picture))
        if stream is None:
            raise UserError("an mp4 needs a frame or more")
        container.mux(stream.encode())


def save_mp4(frames: Iterable[Tensor], path: Path, *, fps: float, quality: int = 16) -> Path:
    """`write_mp4` to a path, atomically."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            write_mp4(frames, file, fps=fps, quality=quality)

    return write_atomically(path, write)
