"""CLIP score: how near samples are to their prompts, or to given images, in CLIP's features.

Hessel et al., arXiv 2104.08718; as papers report it (and torchmetrics computes it): 100 times the cosine, at least 0.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from grn.metrics.intervals import of_mean
from grn.metrics.ranks import Rows
from grn.metrics.splits import Split, image_batches
from grn.runtime.errors import UserError
from grn.weights.from_transformers import load_network, load_pretrained

Against = Literal["prompts", "val", "train"]
EXAMPLE = "openai/clip-vit-large-patch14"
BATCH = 64  # images or texts of a call


class CLIPEncoder:
    """Normalized CLIP features of images and of texts, of a folder or repository as transformers writes it.

    Args:
        path: a folder, or a repository on the Hub.
        device: where the network runs.
        bf16: its precision; None: bfloat16 on accelerators, float32 on the CPU.
        key: the config key that `path` is from.

    Raises:
        UserError: nothing of that kind is there.
    """

    def __init__(
        self, path: str, *, device: torch.device | str = "cpu", bf16: bool | None = None, key: str = "scores.clip.path"
    ):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.network = load_network(key, path, CLIPModel, example=EXAMPLE, device=device, bf16=bf16)
        self.tokenizer = load_pretrained(key, path, AutoTokenizer.from_pretrained, example=EXAMPLE)
        self.processor = load_pretrained(key, path, AutoImageProcessor.from_pretrained, example=EXAMPLE)

    @property
    def width(self) -> int:
        """Of the features."""
        return self.network.config.projection_dim

    @torch.no_grad()
    def images(self, images: Iterable[Tensor]) -> Tensor:
        """Images uint8 [3, H, W] of any sizes -> float32 [N, width], of norm 1."""
        images, found = list(images), []
        for begin in range(0, len(images), BATCH):
            pixels = [image.cpu() for image in images[begin : begin + BATCH]]
            inputs = self.processor(images=pixels, return_tensors="pt", input_data_format="channels_first")
            values = inputs["pixel_values"].to(self.network.device, self.network.dtype)
            found.append(self._normalised(self.network.get_image_features, pixel_values=values))
        return torch.cat(found)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut to CLIP's length -> float32 [N, width], of norm 1."""
        found, most = [], self.network.config.text_config.max_position_embeddings
        for begin in range(0, len(texts), BATCH):
            part = [text.encode("utf-8", "replace").decode() for text in texts[begin : begin + BATCH]]
            inputs = self.tokenizer(part, padding=True, truncation=True, max_length=most, return_tensors="pt")
            given = {name: inputs[name].to(self.network.device) for name in ("input_ids", "attention_mask")}
            found.append(self._normalised(self.network.get_text_features, **given))
        return torch.cat(found)

    def _normalised(self, features: Any, **inputs: Tensor) -> Tensor:
        with torch.autocast(self.network.device.type, enabled=False):
            found = features(**inputs)
        found = found if isinstance(found, Tensor) else found.pooler_output  # which of them depends on the version
        return F.normalize(found.float(), dim=-1)


class CLIPScore:
    """The mean over samples of 100 max(0, cos) of their CLIP features and those of what they are compared with.

    `compute` gives `clip` of samples and their prompts; or `clip_image`: of samples and the mean direction of the
    images of a split. Of clips, every frame counts as an image.

    Args:
        train, val: the splits, read where `against` asks for them.
        device: where CLIP runs.
        cache_dir: not used.
        path: as `CLIPEncoder`'s.
        prompts: of samples, by the numbers that `update` gets; of a tokenizer's reconstructions there are none.
        against: `prompts`, or the split `val` or `train`.
        bf16: as `CLIPEncoder`'s.

    Raises:
        UserError: naming the key: no such network, or no prompts.
    """

    def __init__(
        self,
        *,
        path: str,
        train: Split,
        val: Split,
        device: torch.device | str = "cpu",
        cache_dir: str | Path | None = None,
        prompts: Sequence[str] | None = None,
        against: Against = "prompts",
        bf16: bool | None = None,
    ):
        self.check(None, path=path, prompts=prompts, against=against, bf16=bf16)
        self.encoder = CLIPEncoder(path, device=device, bf16=bf16)
        self.name = "clip" if against == "prompts" else "clip_image"
        if against == "prompts":
            self.targets = self.encoder.texts(list(prompts or ()))
        else:
            split, name = {"train": (train, "training"), "val": (val, "held-out")}[against]
            total: Any = sum(self.encoder.images(batch).sum(dim=0) for batch in image_batches(split, name=name))
            self.targets = F.normalize(total, dim=0)[None]
        self.values = Rows().to(device)

    @classmethod
    def check(
        cls,
        num: int | None,
        *,
        path: str,
        prompts: Sequence[str] | None = None,
        against: Against = "prompts",
        bf16: bool | None = None,
    ) -> None:
        """As `GenerationScores.check`."""
        if not isinstance(path, str) or not path:
            raise UserError(
                f"scores.clip.path={path}: give CLIP's folder, or a repository such as openai/clip-vit-large-patch14"
            )
        if against not in get_args(Against):
            raise UserError(f"scores.clip.against={against}: choose among {', '.join(get_args(Against))}")
        if bf16 not in (None, True, False):
            raise UserError(f"scores.clip.bf16={bf16} must be true, false or null")
        if against == "prompts" and not prompts:
            raise UserError(
                "scores.clip.against=prompts: these samples have no prompts; give scores.clip.against=val, or "
                "leave the score out"
            )

    def update(self, images: Tensor, labels: Any = None, ids: Tensor | None = None) -> None:
        """Adds images uint8 [B, 3, H, W] and the numbers of their prompts, int64 [B]; ids: `Rows.update`."""
        features = self.encoder.images(images)
        targets = self.targets if self.name == "clip_image" else self.targets[labels.to(self.targets.device)]
        self.values.update(100 * (features * targets).sum(dim=-1).clamp_min(0), ids)

    def compute(self) -> dict[str, float]:
        """The score of all images given since the last `reset`, over all ranks; every rank must call it.

        Raises:
            UserError: there were none.
        """
        values = self.values.gathered()
        if not len(values):
            raise UserError("scores.clip: no images to score: generate at least one")
        return {self.name: values.double().mean().item()}

    def uncertainty(self) -> dict[str, float]:
        """As in `grn.evaluation.scoring.uncertainties`."""
        half = of_mean(self.values.gathered().tolist())
        return {} if half is None else {self.name: half}

    def reset(self) -> None:
        """Forgets the images."""
        self.values.reset()
