"""Requests drawn step by step: a single thread works with the networks, and drawings take turns, a step each.

Nothing here knows of a page.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from grn.runtime.errors import UserError
from grn.runtime.failures import explain
from grn.sampling.generation import check_memory
from grn.sampling.pipeline import GRNPipeline
from grn.sampling.recording import Recording
from grn.sampling.refinement import Erasure, Refined, Refinement, Start, given_latents
from grn.sampling.request import AnyRequest, CompleteRequest

T = TypeVar("T")

MAX_DRAWINGS = 32  # that are being drawn or paused, of all browser tabs


class Drawing:
    """A request being drawn: all its steps so far, to look at, go back to, and change.

    Only the engine's thread changes it (`Engine.change` and the like); what it has shown may be read from any thread.

    Attributes:
        pipeline, request: what draws what.
        recording: what its steps were; of clips with all latents.
        state: `waiting` for its first step, `drawing`, `paused`, `done`, `cancelled` or `failed`.
        error: of a failed one, in one line.
        erasures: what was put back to noise on the way to where it is.
        refined: the samples of one that is done, in the request's order, on the CPU.
        version: rises with every change.
    """

    def __init__(self, pipeline: GRNPipeline, request: CompleteRequest):
        self.pipeline, self.request = pipeline, request
        self.given = given_latents(request.start) if pipeline.bundle.shape_of(request)[1] > 1 else 0
        self.recording = Recording(given=self.given, whole=pipeline.bundle.shape_of(request)[1] > 1)
        self.state, self.version = "waiting", 0
        self.error: str | None = None
        self.erasures: list[Erasure] = []
        self.refined: Refined | None = None
        self._refinement: Refinement | None = None
        self._before: list[Refinement] = []  # each step; what goes back to one forks it again

    @property
    def steps(self) -> int:
        """That were taken."""
        return len(self.recording.moments)

    @property
    def is_over(self) -> bool:
        """Whether no step is taken any more unless it is changed."""
        return self.state in ("done", "cancelled", "failed")

    @property
    def repeatable(self) -> CompleteRequest:
        """What draws the same again: the request with its erasures."""
        return replace(self.request, erasures=tuple(self.erasures))

    def can_erase(self, sample: int, steps: int) -> bool:
        """Whether a sample is still being refined after so many steps."""
        return steps == 0 or bool(self.recording.moments[steps - 1].t[sample] < 1)

    def tokens_after(self, steps: int) -> Tensor:
        """What all samples would be if they ended there, int64 [N, D, T, h, w] on the CPU: the predictions."""
        return self.recording.with_prefix(self.recording.moments[steps - 1].predicted)

    def _advance(self) -> None:
        if self._refinement is None:
            self._refinement = self.pipeline.stream(self.request)
        before = self._refinement.fork()
        step = next(self._refinement)
        self._before.append(before)
        self.recording(step)
        if self._refinement.done == self.request.num:
            _, refined = self._refinement.take(self.request.num)
            self.refined = Refined(**{name: value.cpu() for name, value in vars(refined).items()})
            self.state = "done"
        elif self.state == "waiting":
            self.state = "drawing"
        self.version += 1

    def _change(self, steps: int, erased: Mapping[int, Tensor]) -> None:
        if self._refinement is None or not 0 < steps <= self.steps:
            raise UserError(f"there is no step {steps} to go back to")
        if late := [sample for sample in erased if not self.can_erase(sample, steps)]:
            raise UserError(f"sample {late[0] + 1} is done at step {steps}: go back to one before it")
        if steps < self.steps:
            self._refinement = self._before[steps].fork()
            del self._before[steps:]
            self.recording.rewind(steps)
            self.erasures = [erasure for erasure in self.erasures if erasure.after < steps]
        for sample, positions in erased.items():
            self.erasures.append(self._refinement.erase(sample, positions))
            self.recording.erase(sample, positions)
        self.refined = None
        self.version += 1


class Engine:
    """Draws: of the drawings that are not paused each takes a step, in turns; calls of others come between two steps.

    A drawing that fails says so (`Drawing.error`) and leaves the others alone.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: deque[tuple[Callable[[], object], Future]] = deque()
        self._drawings: deque[Drawing] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], T]) -> "Future[T]":
        """What `work` returns or raises; it is called between two steps, by the thread that works with networks."""
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._calls.append((work, future))
            self._changed.notify()
        return future

    def draw(self, pipeline: GRNPipeline, request: AnyRequest) -> Drawing:
        """Begins to draw all samples of a request.

        Raises:
            UserError: the pipeline does not draw that, this machine has not the memory for it, or too much else is
                being drawn.
        """
        complete = pipeline.bundle.complete(request)
        check_memory(pipeline.bundle, complete, batch_size=complete.num, recorded=complete.num)
        drawing = Drawing(pipeline, complete)
        with self._changed:
            if len(self._drawings) >= MAX_DRAWINGS:
                raise UserError(f"{MAX_DRAWINGS} drawings are under way: end one, or close other tabs of the studio")
            self._drawings.append(drawing)
            self._changed.notify()
        return drawing

    def pause(self, drawing: Drawing) -> None:
        """No step is taken after the one that is being taken."""
        self._set(drawing, "paused", among=("waiting", "drawing"))

    def resume(self, drawing: Drawing) -> None:
        self._set(drawing, "drawing", among=("paused",))

    def cancel(self, drawing: Drawing) -> None:
        """Ends it where it is; its steps can still be looked at, and changed."""
        self._set(drawing, "cancelled", among=("waiting", "drawing", "paused"))

    def change(
        self, drawing: Drawing, steps: int, erased: Mapping[int, Tensor] | None = None, *, paused: bool = False
    ) -> "Future[None]":
        """Goes back to where `steps` were taken, puts tokens back to noise there, and goes on.

        The same drawing with the `erasures` that it then has, from the start, gives the same samples.

        Args:
            erased: sample -> bool [T, h, w]; it must still be refined then (`Drawing.can_erase`).
            paused: stay there.

        Raises (the future):
            UserError: there is no such step, or a sample is done by then.
        """

        def work() -> None:
            drawing._change(steps, erased or {})
            with self._changed:
                drawing.state = "paused" if paused else "drawing"
                drawing.version += 1
                if drawing not in self._drawings:
                    self._drawings.append(drawing)

        return self.call(work)

    def close(self) -> None:
        """Ends all drawings and calls, and the thread after the step that it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _set(self, drawing: Drawing, state: str, *, among: Sequence[str]) -> None:
        with self._changed:
            if drawing.state in among:
                drawing.state = state
                drawing.version += 1
            if drawing.is_over and drawing in self._drawings:
                self._drawings.remove(drawing)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._calls or self._next()):
                    self._changed.wait()
                if self._closed:
                    for _, future in self._calls:
                        future.cancel()
                    return
                call = self._calls.popleft() if self._calls else None
                drawing = self._next()
                if drawing is not None:  # to the end of the row
                    self._drawings.remove(drawing)
                    self._drawings.append(drawing)
            if call is not None:
                _settle(*call)
            if drawing is not None and drawing.state in ("waiting", "drawing"):
                self._step(drawing)

    def _next(self) -> Drawing | None:
        return next((drawing for drawing in self._drawings if drawing.state in ("waiting", "drawing")), None)

    def _step(self, drawing: Drawing) -> None:
        try:
            drawing._advance()
        except Exception as error:  # whatever is wrong with one, others go on
            drawing.error, drawing.state = said(error), "failed"
            drawing.version += 1
        if drawing.is_over:
            with self._changed:
                if drawing in self._drawings:
                    self._drawings.remove(drawing)


def inpainting(drawing: Drawing, erased: Mapping[int, Tensor], *, strength: float = 1.0) -> CompleteRequest:
    """What draws a part of finished samples anew, with the next seed: as with this one it would come out alike.

    Args:
        erased: sample -> bool [T, h, w].
        strength: of `grn.sampling.refinement.Start`.

    Raises:
        UserError: the drawing is not done.
    """
    if drawing.refined is None:
        raise UserError("the drawing is not done: refine it to its end, or erase at a step before that")
    tokens = drawing.refined.tokens
    redraw = torch.zeros(len(tokens), 1, *tokens.shape[2:], dtype=torch.bool)
    for sample, positions in erased.items():
        redraw[sample, 0] = positions
    device, seed = drawing.pipeline.device, drawing.request.seed
    start = Start(tokens.to(device), strength, redraw.to(device))
    return replace(drawing.request, start=start, erasures=(), seed=(seed + 1) % 2**63)


def said(error: BaseException) -> str:
    """One line of an error, for a page."""
    return explain(error) if isinstance(error, UserError) else f"{type(error).__name__}: {explain(error)}"


def _settle(work: Callable[[], object], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
