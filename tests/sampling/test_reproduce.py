"""What is shown as the command and the Python of a request draws the same samples again."""

import json
import shlex
from dataclasses import replace

import commands
import pytest
import torch
from safetensors.torch import save
from test_pipeline import TEXTS, write_run

from grn.method.schedules import Cosine, EntropyGuided, Linear, Shifted
from grn.runtime.errors import UserError
from grn.sampling.pipeline import GRNPipeline
from grn.sampling.refinement import Erasure, Start
from grn.sampling.reproduce import as_command, as_python, read_erasures, read_start, write_erasures, write_start

PROMPTS = ['a "seven", or so', "it's [a] {five}, 50 % = ${x}", "\u4e03 \\\\ \\ \u00e9t\u00e9"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("texts"), TEXTS)


@pytest.mark.parametrize(
    "schedule", [Linear(4), Cosine(3), Shifted(4, alpha=2.0, cap=0.95), EntropyGuided(1, 300.0, -283.0, 2, 8)]
)
def test_both_draw_the_same_again(run, tmp_path, schedule):
    pipe = GRNPipeline.from_pretrained(run)
    psi = {"update": "psi", "kappa": 0.75, "kappa_form": "rescaled", "kappa_window": (0.25, 1)}
    asked = {} if schedule == Cosine(3) else psi
    asked |= {"guidance_scale": 2.5, "guidance_interval": (0, 0.75), "temperature": 1.25, "height": 24, "width": 16}
    request = pipe.request(PROMPTS[:2], negative_prompt=PROMPTS[2], num_inference_steps=schedule, seed=5, **asked)
    positions = torch.zeros(pipe.bundle.shape_of(request)[1:], dtype=torch.bool)
    positions[..., 1] = True
    stream = pipe.stream(request)
    next(stream)
    erasures = [stream.erase(1, positions)]
    list(stream)
    _, expected = stream.take(2)

    plain = {}
    exec(as_python(str(run), request), plain)
    again = plain["result"].tokens
    assert torch.equal(again[0], expected.tokens[0])

    file = write_erasures(tmp_path / "erasures.json", erasures)
    command, *words = shlex.split(as_command(str(run), request, {"erasures": file}))
    assert (command, words.pop(0)) == ("grn", "sample")
    done = commands.run("grn.sample", *words, "device=cpu", "film=false", f"out={tmp_path / 'out'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert report["prompts"] == PROMPTS[:2]
    assert report["negative_prompt"] == PROMPTS[2]
    assert report["sampler"].replace("[", "(").replace("]", ")") == repr(request.sampler)
    assert report["entropy"] == [round(e, 5) for e in expected.entropy.tolist()]
    for row, taken in zip(range(2), expected.steps.tolist()):
        assert report["entropy_trace"][row] == [round(e, 5) for e in expected.trace[row, :taken].tolist()]


def test_erasures_there_and_back(tmp_path):
    positions = torch.zeros(2, 3, 4, dtype=torch.bool)
    positions[1, 2, 0] = positions[0, 0, 3] = True
    (again,) = read_erasures(write_erasures(tmp_path / "e.json", [Erasure(3, 7, positions)]))
    assert (again.sample, again.after) == (3, 7)
    assert torch.equal(again.positions, positions)
    for content in (
        "{", "[1]", "3", '[{"sample": 0}]', "[" * 100_000,
        '[{"sample": 0, "after": 0, "shape": [1, 99999, 99999], "positions": []}]',
        '[{"sample": 0, "after": 0, "shape": [1, 2, 2], "positions": [[0, 5, 0]]}]',
        '[{"sample": 0, "after": 0, "shape": [1, 2, 2], "positions": [[0, -1, 0]]}]',
        '[{"sample": true, "after": 0, "shape": [1, 2, 2], "positions": []}]',
    ):  # fmt: skip
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=r"^erasures=.*bad\.json is not a file of erasures"):
            read_erasures(tmp_path / "bad.json")
    with pytest.raises(UserError, match=r"^erasures=.*none\.json: there is no such file"):
        read_erasures(tmp_path / "none.json")


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_a_start_is_drawn_again_from_its_file(run, tmp_path, strength):
    """By the command and by Python; each sample has a map of its own, and keeps a part of it."""
    pipe = GRNPipeline.from_pretrained(run)
    request = pipe.request(PROMPTS[:2], height=24, width=16, num_inference_steps=Linear(4), seed=5)
    tokens = pipe.sample(request).__next__().refined.tokens
    redraw = torch.zeros(2, 1, *tokens.shape[2:], dtype=torch.bool)
    redraw[1, :, :, 2:] = True
    request = replace(request, start=Start(tokens, strength, redraw), seed=6)
    stream = pipe.stream(request)
    list(stream)
    _, expected = stream.take(2)
    assert torch.equal(expected.tokens[0], tokens[0])
    assert not torch.equal(expected.tokens[1], tokens[1])

    file = write_start(tmp_path / "start.safetensors", request.start)
    plain = {}
    exec(as_python(str(run), request, start=str(file)), plain)
    assert torch.equal(plain["batch"].refined.tokens, expected.tokens)
    _, *words = shlex.split(as_command(str(run), request, {"start": file}))
    done = commands.run("grn.sample", *words[1:], "device=cpu", "film=false", f"out={tmp_path / 'out'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert report["entropy"] == [round(e, 5) for e in expected.entropy.tolist()]
    assert report["strength"] == strength


def test_a_file_that_is_no_start(tmp_path):
    with pytest.raises(UserError, match=r"^start=.*: there is no such file"):
        read_start(tmp_path / "no")
    for content in (
        b"",
        b"{}",
        save({"tokens": torch.zeros(1, 2)}),
        save({"other": torch.zeros(1, dtype=torch.uint8)}),
    ):
        (tmp_path / "odd").write_bytes(content)
        with pytest.raises(UserError, match=r"^start=.*odd is not a file of tokens"):
            read_start(tmp_path / "odd")


def test_a_start_of_another_refiner(run, tmp_path):
    pipe = GRNPipeline.from_pretrained(run)
    request = pipe.request(PROMPTS[:2], seed=5)
    tokens = torch.zeros(2, *pipe.bundle.shape_of(request), dtype=torch.long)
    for start, wrong in (
        (Start(tokens[:, :1]), "tokens are int64"),
        (Start(tokens.float()), "tokens are int64"),
        (Start(tokens + 99), "tokens are 0 to 3"),
        (Start(tokens, 1.0, torch.ones(2, 1, 1, 1, 1, dtype=torch.bool)), "redraw is bool"),
    ):
        with pytest.raises(UserError, match=f"^start: {wrong}"):
            pipe.stream(replace(request, start=start))
