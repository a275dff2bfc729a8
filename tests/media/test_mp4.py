import io

import av
import numpy as np
import pytest
import torch

from grn.data.clips import ClipDecoder
from grn.media.mp4 import frame_rate, save_mp4, write_mp4
from grn.media.video import probe_video
from grn.runtime.errors import UserError


def flat(level, height=16, width=32):
    return torch.full((3, height, width), level, dtype=torch.uint8)


def written(frames, fps):
    file = io.BytesIO()
    write_mp4(frames, file, fps=fps)
    return file.getvalue()


def test_frames_come_back_in_order_at_their_rate(tmp_path):
    levels = [20, 200, 90, 160, 40]
    path = save_mp4((flat(level) for level in levels), tmp_path / "x" / "film.mp4", fps=12.5, quality=4)
    with av.open(str(path)) as container:
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [round(float(frame.mean())) for frame in read] == pytest.approx(levels, abs=3)
    info = probe_video(path.read_bytes(), "mp4")
    assert (info.width, info.height, info.codec, info.fps) == (32, 16, "h264", 12.5)
    assert sorted(path.parent.iterdir()) == [path]


def test_the_bytes_are_a_function_of_the_frames():
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        write_mp4((flat(level) for level in range(0, 200, 10)), file, fps=16)
    assert files[0].getvalue() == files[1].getvalue()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (720, 1280)])  # on either side of what readers guess by
@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 40)])
def test_colours_come_back_and_are_named(colour, height, width):
    frame = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(-1, height, width)
    data = written([frame] * 2, 8)
    read = ClipDecoder(image_size=64, frames=1, fps=(8,))({"__key__": "a", "mp4": data}, 0)["pixels"]
    assert read[:, 0].flatten(1).amin(1).tolist() == pytest.approx(colour, abs=3)
    assert read[:, 0].flatten(1).amax(1).tolist() == pytest.approx(colour, abs=3)
    with av.open(io.BytesIO(data)) as container:
        shown = next(container.decode(video=0))
    # FFmpeg's numbers for BT.709, and for the range of 16 to 235.
    assert (shown.colorspace, shown.color_primaries, shown.color_trc, shown.color_range) == (1, 1, 1, 1)


@pytest.mark.parametrize("fps", [0.1, 1, 24000 / 1001, 29.97, np.float32(12.5), 1000])
def test_rates_come_back(fps):
    assert probe_video(written([flat(9)] * 3, fps), "mp4").fps == pytest.approx(float(fps), rel=1e-5)


@pytest.mark.parametrize(
    "fps",
    [0, -1, 1e-4, 0.099, 1001, pytest.param(10**400, id="huge"), float("nan"), float("inf"), "a", "8", None, True, [8]],
)
def test_rates_that_no_stream_has_are_refused(fps, tmp_path):
    for write in (frame_rate, lambda fps: save_mp4([flat(9)], tmp_path / "x.mp4", fps=fps)):
        with pytest.raises(UserError, match=r"^fps=.*: frames a second, a number from 0\.1 to 1000"):
            write(fps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("frames", "complaint"), [([], "at least one frame"), ([flat(0, 15)], "15x32: give another")])
def test_what_h264_cannot_hold_is_said(tmp_path, frames, complaint):
    with pytest.raises(UserError, match=complaint):
        save_mp4(frames, tmp_path / "x.mp4", fps=16)
    assert list(tmp_path.iterdir()) == []
