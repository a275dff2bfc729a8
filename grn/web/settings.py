"""What is chosen on the page, and the request that it stands for."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from PIL import Image

from grn.method.resolutions import BUDGETS, resolutions_at
from grn.method.sampler import Sampler
from grn.method.schedules import FIXED, EntropyGuided, Schedule, grid_of
from grn.runtime.errors import UserError
from grn.sampling.request import CompleteRequest
from grn.sampling.text_bundle import TextRefinerBundle
from grn.web.models import Model

Kind = Literal["trained", "linear", "cosine", "shifted", "entropy", "calibrated"]
KINDS: dict[Kind, str] = {
    "trained": "as trained",
    "linear": "linear",
    "cosine": "cosine",
    "shifted": "shifted (of text)",
    "entropy": "entropy-guided",
    "calibrated": "calibrated",
}
MAX_SAMPLES = 64  # of a drawing on the page
MAX_PROMPT = 4000  # characters


@dataclass
class Settings:
    """Of a class refiner `labels`, of a text refiner `prompts`, a prompt a line; `each`: samples of each of them.

    kind, steps: the schedule; `steps` is of linear, cosine and shifted ones. guidance, interval, temperature, update,
    kappa: as of `Sampler`. image, strength, mask: what samples start from (`GRNPipeline.request`).
    """

    labels: list[int] = field(default_factory=list)
    prompts: str = ""
    negative_prompt: str = ""
    size: tuple[int, int] | None = None  # height, width in pixels
    frames: int | None = None
    each: int = 1
    kind: Kind = "trained"
    steps: int = 50
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    temperature: float = 1.0
    update: Literal["redraw", "psi"] = "redraw"
    kappa: float = 1.0
    seed: int = 0
    image: Image.Image | None = None
    strength: float = 0.6
    mask: Image.Image | None = None

    @classmethod
    def of(cls, model: Model) -> "Settings":
        """As a refiner was trained to be sampled."""
        bundle, text = model.pipeline.bundle, model.text
        found = cls().sampled_as(bundle.sampler)
        found.steps = bundle.sampler.schedule.max_steps
        if text is None:
            return replace(found, labels=[min(3, bundle.num_conditions - 1)])
        return replace(
            found,
            prompts=text.prompts[0],
            negative_prompt=text.negative_prompt,
            size=text.size,
            frames=text.frames,
        )

    def sampled_as(self, sampler: Sampler) -> "Settings":
        """With all of a sampler but its schedule."""
        own = {name: getattr(sampler, name) for name in ("guidance", "temperature", "update", "kappa")}
        return replace(self, interval=tuple(sampler.guidance_interval), **own)

    def request(self, model: Model) -> CompleteRequest:
        """The request; its start is encoded by the tokenizer.

        Raises:
            UserError: something that the refiner does not draw.
        """
        what: dict[str, Any] = {"labels": list(self.labels)}
        if model.text is not None:
            prompts = [line.strip() for line in self.prompts.splitlines() if line.strip()]
            if not prompts:
                raise UserError("prompts: write at least one, a line each")
            if long := [prompt for prompt in prompts if len(prompt) > MAX_PROMPT]:
                raise UserError(f"prompts: one has {len(long[0])} characters; at most {MAX_PROMPT}")
            height, width = self.size or model.text.size
            what = {"prompt": prompts, "negative_prompt": self.negative_prompt.strip() or None}
            what |= {"height": height, "width": width, "num_frames": self.frames}
        elif not self.labels:
            raise UserError("classes: choose at least one")
        number = self.each * len(what.get("prompt", self.labels))
        if not 1 <= number <= MAX_SAMPLES:
            raise UserError(f"{number} samples: 1 to {MAX_SAMPLES} are shown at a time; grn sample draws any number")
        return model.pipeline.request(
            **what,
            num_images_per_prompt=self.each,
            num_inference_steps=self._schedule(model),
            guidance_scale=self.guidance,
            guidance_interval=self.interval,
            temperature=self.temperature,
            update=self.update,
            kappa=self.kappa,
            seed=self.seed,
            image=self.image,
            mask_image=None if self.image is None else self.mask,
            strength=None if self.image is None or self._is_clip(model) else self.strength,
        )

    def _is_clip(self, model: Model) -> bool:
        return model.text is not None and (self.frames or 1) > 1

    def _schedule(self, model: Model) -> Schedule:
        own = model.pipeline.bundle.sampler.schedule
        if self.kind == "trained":
            return own
        if self.kind == "calibrated":
            if model.calibrated is None:
                raise UserError(f"calibrated: {model.name} has no calibration; grn calibrate ckpt=... makes one")
            return model.calibrated.schedule
        if self.kind == "entropy":
            return own if isinstance(own, EntropyGuided) else EntropyGuided(**grid_of(own))
        grid = grid_of(own)
        return FIXED[self.kind](self.steps, **{k: v for k, v in grid.items() if k != "grid" and self.kind == "shifted"})


def sizes(bundle: TextRefinerBundle) -> list[tuple[int, int]]:
    """The (height, width) that a text refiner was trained in, the one it is sampled in first."""
    own = bundle.size
    budget = next((budget for budget in BUDGETS if own in resolutions_at(budget).values()), None)
    return [own, *(size for size in (resolutions_at(budget).values() if budget else ()) if size != own)]


def kinds(model: Model) -> dict[Kind, str]:
    """The schedules to choose among."""
    return {kind: name for kind, name in KINDS.items() if kind != "calibrated" or model.calibrated is not None}
