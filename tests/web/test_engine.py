"""The studio's engine: drawings that take turns, are paused, gone back in and changed, exactly and repeatably."""

import threading

import pytest
import torch
from test_pipeline import CLASSES, write_run

from grn.runtime.errors import UserError
from grn.sampling.pipeline import GRNPipeline
from grn.web.engine import Engine, inpainting

WAIT = 60  # seconds, after which something hangs


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return GRNPipeline.from_pretrained(write_run(tmp_path_factory.mktemp("classes"), CLASSES))


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.close()


def until(drawing, holds):
    """Waits for what the engine does."""
    ticks = threading.Event()
    for _ in range(WAIT * 100):
        if holds(drawing):
            return
        ticks.wait(0.01)
    raise AssertionError(f"{drawing.state} after {drawing.steps} steps: {drawing.error}")


def is_over(drawing):
    return drawing.is_over


def request(pipe, **more):
    return pipe.request(labels=[3, 1], num_inference_steps=6, seed=5, **more)


def painted(pipe, drawing):
    positions = torch.zeros(pipe.bundle.shape_of(drawing.request)[1:], dtype=torch.bool)
    positions[:, 1:3, :2] = True
    return positions


def samples(pipe, request):
    (batch,) = pipe.sample(request)
    return batch.refined.tokens


def test_drawings_are_those_of_the_pipeline_and_take_turns(pipe, engine, monkeypatch):
    order, begun = [], threading.Event()
    step = Engine._step
    monkeypatch.setattr(Engine, "_step", lambda self, drawing: (order.append(drawing), step(self, drawing)))
    engine.call(begun.wait)
    one, other = engine.draw(pipe, request(pipe)), engine.draw(pipe, request(pipe, temperature=1.5))
    begun.set()
    until(one, is_over)
    until(other, is_over)
    assert order == [one, other] * 6
    for drawing in (one, other):
        assert (drawing.state, drawing.steps) == ("done", 6)
        assert torch.equal(drawing.refined.tokens, samples(pipe, drawing.request))
        assert torch.equal(drawing.tokens_after(6), drawing.refined.tokens)


def test_going_back_erases_exactly_and_repeatably(pipe, engine):
    drawing = engine.draw(pipe, request(pipe))
    until(drawing, is_over)
    plain, maps = drawing.refined.tokens, [moment.seen for moment in drawing.recording.moments]
    engine.change(drawing, 2, paused=True).result(WAIT)
    assert (drawing.state, drawing.steps, drawing.refined) == ("paused", 2, None)
    engine.resume(drawing)
    until(drawing, is_over)
    assert torch.equal(drawing.refined.tokens, plain)

    positions = painted(pipe, drawing)
    for after in (4, 3):  # what was erased later is undone by going back before it
        engine.change(drawing, after, {1: positions}).result(WAIT)
        until(drawing, is_over)
        assert [erasure.after for erasure in drawing.erasures] == [after]
        assert torch.equal(drawing.refined.tokens, samples(pipe, drawing.repeatable))
        seen = drawing.recording.moments[after].seen
        assert torch.equal(seen[1][:, ~positions], maps[after][1][:, ~positions])
        assert torch.equal(seen[1][:, positions], maps[0][1][:, positions])
        assert not torch.equal(seen[1], maps[after][1])
        assert torch.equal(drawing.refined.tokens[0], plain[0])


def test_what_is_erased_is_not_told_to_be_kept(pipe, engine):
    drawing = engine.draw(pipe, request(pipe))
    until(drawing, is_over)
    positions = painted(pipe, drawing)
    engine.change(drawing, 4, {1: positions}).result(WAIT)
    until(drawing, is_over)
    filled, blank = 0, 3
    states = drawing.recording.moments[4].states[1][:, positions]
    assert set(states.unique().tolist()) <= {filled, blank}
    assert drawing.recording.moments[3].states[1][:, positions].ne(blank).any()


def test_a_paused_drawing_stays_and_a_cancelled_one_ends(pipe, engine):
    drawing = engine.draw(pipe, request(pipe))
    engine.pause(drawing)
    steps = engine.call(lambda: drawing.steps).result(WAIT)
    other = engine.draw(pipe, request(pipe))
    until(other, is_over)
    assert (drawing.steps, drawing.state) in ((steps, "paused"), (6, "done"))
    engine.resume(drawing)
    until(drawing, is_over)
    ended = engine.draw(pipe, request(pipe))
    engine.cancel(ended)
    engine.call(lambda: None).result(WAIT)
    assert ended.is_over


def test_finished_samples_are_inpainted(pipe, engine):
    drawing = engine.draw(pipe, request(pipe))
    until(drawing, is_over)
    positions = painted(pipe, drawing)
    with pytest.raises(UserError, match=r"^sample 2 is done at step 6: go back to one before it$"):
        engine.change(drawing, 6, {1: positions}).result(WAIT)
    with pytest.raises(UserError, match=r"^there is no step 7"):
        engine.change(drawing, 7).result(WAIT)
    other = engine.draw(pipe, inpainting(drawing, {1: positions}))
    until(other, is_over)
    before, after = drawing.refined.tokens, other.refined.tokens
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1][:, ~positions], after[1][:, ~positions])
    assert not torch.equal(before[1], after[1])
    assert torch.equal(after, samples(pipe, other.repeatable))


def test_a_failure_is_of_one_drawing_and_of_one_call(pipe, engine, monkeypatch):
    broken = engine.draw(pipe, request(pipe))
    monkeypatch.setattr(broken, "_advance", lambda: 1 / 0)
    until(broken, lambda it: it.is_over)
    assert broken.state in ("failed", "done")
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result(WAIT)
    drawing = engine.draw(pipe, request(pipe))
    until(drawing, is_over)
    assert drawing.state == "done"


def test_nothing_is_called_after_closing(pipe):
    engine = Engine()
    drawing = engine.draw(pipe, request(pipe))
    engine.close()
    assert drawing.steps <= 6
    with pytest.raises(RuntimeError, match="closed"):
        engine.call(lambda: None)
