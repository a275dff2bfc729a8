"""Sizes by aspect ratio, budget and seconds: in Python and on the command line, and what they became."""

import json
import logging
from types import SimpleNamespace

import pytest
from test_pipeline import TEXTS, composed, write_run

from grn.method.resolutions import BUDGETS, RESOLUTIONS, nearest_budget
from grn.runtime.errors import UserError
from grn.runtime.overrides import literal
from grn.sampling.pipeline import GRNPipeline
from grn.sampling.sample import sample
from grn.sampling.sizes import resolve_size

MODULE = SimpleNamespace(size=(480, 848), tokenizer=SimpleNamespace(temporal_stride=4))  # 0.41M of clips


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("videos"), f"{TEXTS} training.frames=5", temporal=True)


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({}, (None, None, None)),
        ({"height": 32, "frames": 9}, (32, None, 9)),
        ({"aspect": "16:9", "pixels": "1M"}, (768, 1360, None)),
        ({"aspect": "9:16", "pixels": "1M"}, (1360, 768, None)),
        ({"aspect": "1:1"}, (640, 640, None)),
        ({"aspect": 1.5, "pixels": "0.25M"}, (416, 624, None)),
        ({"aspect": "1.5"}, (528, 784, None)),
        ({"aspect": "21/9"}, (400, 1008, None)),
        ({"pixels": "0.06M"}, (192, 336, None)),
        ({"duration": 5}, (None, None, 81)),
        ({"duration": 2.0}, (None, None, 33)),
        ({"duration": 0.25}, (None, None, 5)),
        ({"duration": 2.2}, (None, None, 33)),
        ({"duration": 1, "fps": 24}, (None, None, 25)),
        ({"duration": 0.8, "fps": 5}, (None, None, 5)),
        ({"duration": 1.2, "fps": 10}, (None, None, 13)),
    ],
)
def test_sizes(asked, size):
    assert resolve_size(MODULE, **asked) == size


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"height": 32, "aspect": "1:1"}, "height=32 and aspect=1:1: give height and width, or aspect and pixels"),
        ({"width": 32, "pixels": "1M"}, "width=32 and pixels=1M"),
        ({"pixels": "3M"}, "pixels=3M is not one of 0.06M"),
        ({"aspect": "wide"}, "aspect=wide: width to height"),
        ({"aspect": "0:9"}, "aspect=0:9: width to height"),
        ({"aspect": "9:0"}, "aspect=9:0: width to height"),
        ({"aspect": [1, 2]}, r"aspect=\[1, 2\]: width to height"),
        ({"frames": 5, "duration": 2}, "frames=5 and duration=2: give one of them"),
        ({"duration": 0.2}, "duration=0.2 is too short for a clip at fps=16: at least 0.25"),
        ({"duration": -1}, "duration=-1: seconds"),
        ({"duration": float("inf")}, "duration=inf: seconds"),
        ({"duration": "long"}, "duration=long: seconds"),
    ],
)
def test_mistakes(asked, expected):
    with pytest.raises(UserError, match=f"^{expected}"):
        resolve_size(MODULE, **asked)


def test_every_size_has_its_own_budget():
    assert all(
        nearest_budget(*size) == budget for sizes in RESOLUTIONS.values() for budget, size in zip(BUDGETS, sizes)
    )


def test_what_it_became(videos, tmp_path, caplog):
    """The same in Python and by the command, told by the output, samples.json and the log."""
    caplog.set_level(logging.INFO)
    pipe = GRNPipeline.from_pretrained(videos)
    request = pipe.request("a seven", aspect="3:4", pixels="0.06M", duration=0.3)
    assert (request.height, request.width) == (288, 224)
    assert request.frames == 5  # of two frames a latent, at 16 a second
    assert "aspect=3:4 pixels=0.06M: 288 high and 224 wide" in caplog.text
    assert "duration=0.3 at fps=16: 5 frames" in caplog.text
    result = pipe("a seven", duration=0.2, num_inference_steps=1)
    assert (result.height, result.width, result.num_frames) == (16, 32, 3)
    assert len(result.frames[0]) == 3
    given = ["prompts=[a seven]", "num=1", "duration=0.2", "film=false", "device=cpu", f"out={tmp_path}"]
    steps = ["sampler=linear", "sampler.schedule.steps=1"]
    sample(composed("sample", f"ckpt={videos}", *given, *steps))
    report = json.loads((tmp_path / "samples.json").read_text())
    assert (report["height"], report["width"], report["frames"]) == (16, 32, 3)
    assert composed("sample", "ckpt=x", *literal(["aspect=16:9"])).aspect == "16:9"
