"""The judge of critters: a network that reads every attribute, trained on real pictures alone."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grn.metrics.features import FeatureStatistics
from grn.metrics.fid import as_numpy, frechet_distance
from grn.metrics.intervals import of_mean
from grn.metrics.ranks import Totals
from grn.metrics.splits import Split, as_images, image_digest
from grn.runtime.errors import UserError
from grn.runtime.locks import write_cached
from grn.toys.critters import ATTRIBUTES, HELDOUT_PAIRS, LABEL_NAMES, read_caption
from grn.toys.fitting import fitted
from grn.weights.mapping import load_strict

WIDTH = 64  # of its features
BATCH, LEARNING_RATE, SEED = 50, 2e-3, 0
RECIPE = f"four convolutions 16 32 64 64, {WIDTH}, GELU, {{epochs}} epochs of {BATCH}, {LEARNING_RATE}, {SEED}"
UNTOLD = -1  # of an attribute that a caption does not tell


class CrittersJudge:
    """Reads the attributes of samples, and holds them against those that their prompts tell.

    `compute` gives `attribute_accuracy`, the mean over attributes of the share that is right among those told, of each
    `<attribute>_accuracy`, and `pair_accuracy`, the share with color and hat right together. Prompts are of two kinds,
    by whether training shows that color with that hat: `attribute_accuracy_seen`, `attribute_accuracy_new`,
    `pair_accuracy_seen`, `pair_accuracy_new`. `critters_fid` is the Fréchet distance to the training pictures in the
    judge's features, and `critters_fid_val` that of held-out ones, for scale. `judge_val_accuracy` is the
    judge's own, on real held-out pictures: of the attribute that it reads worst.

    Args:
        prompts: what samples are asked for, by the numbers that `update` gets; those that tell no attribute are not
            judged. None: the classes of data=critters, which tell color and shape.
        asked: in their place, the lines of a suite, each with its `prompt`.
        train, val: the splits of data=critters_t2i, with captions; those of data=critters have classes alone.
        device: where the network runs.
        cache_dir: where the trained network is kept; None: it is trained each time, in a minute.

    Raises:
        UserError: no prompt tells an attribute, or one that no training picture tells; a split with neither captions
            nor classes, or with pictures of another size.
    """

    reads_lines: ClassVar = True  # of the suite
    attributes: ClassVar[Mapping[str, Sequence[str]]] = ATTRIBUTES
    shape: ClassVar[tuple[int, ...]] = (3, 64, 64)  # of what it reads
    data: ClassVar = "critters_t2i"
    epochs: ClassVar = 6

    def __init__(
        self,
        *,
        train: Split,
        val: Split,
        prompts: Sequence[str] | None = None,
        asked: Sequence[Mapping[str, Any]] | None = None,
        device: torch.device | str = "cpu",
        cache_dir: str | Path | None = None,
    ):
        self.asked = self._asked_for(prompts, asked)
        images, attributes = self._whole(train, "training")
        unknown = (self.asked != UNTOLD).any(dim=0) & (attributes == UNTOLD).all(dim=0)
        if unknown.any():
            name = list(self.attributes)[int(unknown.nonzero()[0])]
            raise UserError(f"scores.critters: prompts tell of {name}, and no training picture does: data={self.data}")
        self.network = self._load(images, attributes, cache_dir).to(device)
        self.statistics, own, real = (
            FeatureStatistics(WIDTH, over_ranks=over).to(device) for over in (True, False, False)
        )
        for batch in images.split(250):
            real.update(self._read(batch)[1])
        images, attributes = self._whole(val, "held-out")
        read = []
        for batch in images.split(250):
            found, features = self._read(batch)
            own.update(features)
            read.append(found)
        right, told = torch.cat(read) == attributes, attributes != UNTOLD
        known = told.any(dim=0)
        self.val_accuracy = ((right & told).sum(dim=0)[known] / told.sum(dim=0)[known]).min().item()
        self.real = as_numpy(real.compute())
        self.val_fid = frechet_distance(as_numpy(own.compute()), self.real)
        # Of each prompt: pictures, right ones of each attribute, right pairs of color and hat.
        self.counts = Totals(2 + len(self.attributes), len(self.asked), dtype=torch.int64).to(device)

    @classmethod
    def check(
        cls, num: int | None, *, prompts: Sequence[str] | None = None, asked: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """As `GenerationScores.check`."""
        cls._asked_for(prompts, asked)

    @classmethod
    def read(cls, caption: str) -> list[int]:
        """The attributes that a caption tells, by their places in `attributes`; -1 of others."""
        return read_caption(caption)

    @classmethod
    def _asked_for(cls, prompts: Sequence[str] | None, asked: Sequence[Mapping[str, Any]] | None) -> Tensor:
        """int64 [prompts, attributes]."""
        if asked is not None:
            prompts = [line["prompt"] for line in asked]
        elif prompts is None:
            prompts = LABEL_NAMES
        told = torch.tensor([cls.read(prompt) for prompt in prompts]).reshape(-1, len(cls.attributes))
        if (told == UNTOLD).all():
            raise UserError('scores.critters: no prompt tells of a critter, such as "a blue bell critter with a fin"')
        return told

    def update(self, images: Tensor, labels: Tensor, ids: Tensor | None = None) -> None:
        """Adds generated samples uint8 [B, *shape] and the numbers of their prompts, int64 [B]; ids are not read."""
        found, features = self._read(images)
        self.statistics.update(features)
        labels = labels.cpu()
        right = found == self.asked[labels]
        pair = right[:, _PAIR].all(dim=1, keepdim=True)
        row = torch.cat([torch.ones_like(pair), right, pair], dim=1).long()
        self.counts.update(torch.zeros_like(self.counts.total.cpu()).index_add_(1, labels, row.T))

    def compute(self) -> dict[str, float]:
        """The scores of all images given since the last `reset`, over all ranks; every rank must call it.

        Raises:
            UserError: no image of a critter was given.
        """
        shares = self._shares()
        sums = self.statistics.compute()
        if not shares or int(sums["n"]) < 2:
            raise UserError("scores.critters: no pictures to judge: generate at least two")
        scores = {name: sum(values) / len(values) for name, values in shares.items()}
        scores["critters_fid"] = frechet_distance(as_numpy(sums), self.real)
        return scores | {
            "critters_fid_val": self.val_fid,
            "judge_val_accuracy": self.val_accuracy,
        }

    def uncertainty(self) -> dict[str, float]:
        """As in `grn.evaluation.scoring.uncertainties`, by prompt: images of one prompt are not independent."""
        halves = {name: of_mean(values) for name, values in self._shares().items()}
        return {name: half for name, half in halves.items() if half is not None}

    def _shares(self) -> dict[str, list[float]]:
        """Of each score the share that is right, prompt by prompt."""
        pictures, *right, pairs = self.counts.compute().tolist()
        shares: dict[str, list[float]] = {}
        for number, asked in enumerate(self.asked.tolist()):
            if not pictures[number]:
                continue
            told = [place for place, value in enumerate(asked) if value != UNTOLD]
            own = {name: right[place][number] / pictures[number] for place, name in enumerate(self.attributes)}
            own = {name: own[name] for place, name in enumerate(self.attributes) if place in told}
            both = [asked[place] for place in _PAIR]
            kind = "new" if tuple(both) in _NEW else "seen"
            if own:
                for ending in ("", f"_{kind}"):
                    shares.setdefault(f"attribute_accuracy{ending}", []).append(sum(own.values()) / len(own))
            for name, share in own.items():
                shares.setdefault(f"{name}_accuracy", []).append(share)
            if UNTOLD not in both:
                for ending in ("", f"_{kind}"):
                    shares.setdefault(f"pair_accuracy{ending}", []).append(pairs[number] / pictures[number])
        return shares

    def reset(self) -> None:
        """Forgets the generated images."""
        self.counts.reset()
        self.statistics.reset()

    @torch.no_grad()
    def _read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, *shape] -> (attributes int64 [B, attributes] on the CPU, features float32 [B, 64])."""
        device = next(self.network.parameters()).device
        with torch.autocast(device.type, enabled=False):
            features = self.network.features(self._inputs(images.to(device)))
            return torch.stack([head(features).argmax(dim=1) for head in self.network.heads], dim=1).cpu(), features

    @classmethod
    def _load(cls, images: Tensor, attributes: Tensor, cache_dir: str | Path | None) -> "_Network":
        """The judge that these pictures train, or that an earlier call has trained of them."""
        digest = hashlib.sha256(
            RECIPE.format(epochs=cls.epochs).encode() + image_digest([images]).encode() + attributes.numpy().tobytes()
        )
        path = None if cache_dir is None else Path(cache_dir) / f"critters-judge-{digest.hexdigest()[:8]}.safetensors"
        network = _Network(cls.shape, cls.attributes)
        if path is None or not path.is_file():
            state = cls._train(images, attributes)
            if path is not None:
                write_cached(path, lambda temporary: save_file(state, temporary))
        else:
            try:
                state = load_file(path)
            except (SafetensorError, OSError) as error:
                raise UserError(f"scores.critters: {path} is not a readable safetensors file: delete it") from error
        load_strict(network, state, source=f"scores.critters: {path}")
        return network.requires_grad_(False).eval()

    @classmethod
    def _train(cls, images: Tensor, attributes: Tensor) -> dict[str, Tensor]:
        def begin() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
            network, known = _Network(cls.shape, cls.attributes), attributes.clone()

            def loss(index: Tensor) -> Tensor:
                shift = torch.randint(-1, 2, (2,)).tolist()
                features = network.features(cls._inputs(images[index].clone()).roll(shift, dims=(2, 3)))
                losses = [
                    F.cross_entropy(head(features), known[index, place], ignore_index=UNTOLD, reduction="sum")
                    for place, head in enumerate(network.heads)
                ]
                return sum(losses[1:], losses[0]) / len(index)

            return network, loss

        return fitted(begin, len(images), epochs=cls.epochs, batch_size=BATCH, learning_rate=LEARNING_RATE, seed=SEED)

    @classmethod
    def _inputs(cls, images: Tensor) -> Tensor:
        if images.shape[1:] != cls.shape or images.dtype != torch.uint8:
            sizes = ", ".join(map(str, cls.shape))
            raise UserError(
                f"scores.critters: the judge reads uint8 [B, {sizes}], got {images.dtype} {list(images.shape)}"
            )
        return images.flatten(1, -3).float() / 127.5 - 1

    @classmethod
    def _whole(cls, split: Split, name: str) -> tuple[Tensor, Tensor]:
        """A split in memory: samples uint8 [N, *shape] and attributes int64 [N, attributes], as far as captions or else
        classes tell them.

        Raises:
            UserError: it is empty, or tells nothing of any attribute.
        """

        def batches() -> Iterator[tuple[Tensor, list[str]]]:
            for batch in split():
                pixels = batch["pixels"]
                pixels = pixels if isinstance(pixels, Tensor) else torch.stack(list(pixels))
                labels = batch["label"].tolist() if "label" in batch else []
                told = batch.get("caption") or [LABEL_NAMES[label] for label in labels if label < len(LABEL_NAMES)]
                yield (as_images(pixels) if len(cls.shape) == 3 else pixels).cpu(), list(told)

        parts = [(images, captions) for images, captions in batches() if len(images) == len(captions)]
        images = torch.cat([images for images, _ in parts]) if parts else torch.empty(0)
        attributes = torch.tensor([cls.read(caption) for _, captions in parts for caption in captions])
        if not len(images) or (attributes == UNTOLD).all():
            raise UserError(
                f"scores.critters: the {name} split has no captions or classes of critters: give data={cls.data}"
            )
        return images, attributes


_PAIR = [list(ATTRIBUTES).index(name) for name in ("color", "hat")]
_NEW = {tuple(ATTRIBUTES[name].index(value) for name, value in zip(("color", "hat"), pair)) for pair in HELDOUT_PAIRS}


class _Network(nn.Module):
    """float32 [B, channels, H, W] in [-1, 1] -> `features` [B, 64], of which each of `heads` reads an attribute."""

    def __init__(self, shape: Sequence[int], attributes: Mapping[str, Sequence[str]]):
        super().__init__()
        channels, (height, width) = math.prod(shape[:-2]), shape[-2:]
        self.features = nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(height * width, WIDTH), nn.GELU()),
        )
        self.heads = nn.ModuleList(nn.Linear(WIDTH, len(values)) for values in attributes.values())
