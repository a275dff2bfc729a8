import io

import av
import pytest
import torch

from grn.data.clips import probe_video
from grn.errors import UserError
from grn.mp4 import save_mp4, write_mp4


def flat(level, height=16, width=32):
    return torch.full((3, height, width), level, dtype=torch.uint8)


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


@pytest.mark.parametrize(("frames", "complaint"), [([], "a frame or more"), ([flat(0, 15)], "15x32: give another")])
def test_what_h264_cannot_hold_is_said(tmp_path, frames, complaint):
    with pytest.raises(UserError, match=complaint):
        save_mp4(frames, tmp_path / "x.mp4", fps=16)
    assert list(tmp_path.iterdir()) == []
