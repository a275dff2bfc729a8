"""GenEval (Ghosh et al., arXiv 2310.11513): are the objects that a prompt asks for there, in number, color and place?

The rules are functions of detections; which detector they are from does not matter. Their prompts come as lines of
JSON: `tag`, `prompt`, `include` and, for counting, `exclude`, each a list of {class, count[, color][, position]}.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from grn.metrics.clip import CLIPEncoder
from grn.metrics.intervals import of_mean
from grn.metrics.ranks import Totals
from grn.metrics.splits import Split
from grn.runtime.errors import UserError
from grn.weights.from_transformers import load_network, load_pretrained

CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9  # that a detection must exceed; of prompts that count
MOST = 16  # detections of a class that are looked at, the surest first
MARGIN = 0.1  # of the sum of both boxes' sides, by which centers must be apart
DIRECTION = 0.5  # share of the offset that lies along an axis, from which on it counts as that direction
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GROUND = 0x99  # gray around an object whose color is read
EXAMPLE = "facebook/mask2former-swin-small-coco-instance"
# COCO's classes as detectors name them -> as the prompts do.
NAMES = {"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant"}
NAMES |= {"diningtable": "dining table", "tvmonitor": "tv", "mouse": "computer mouse", "remote": "tv remote"}
NAMES |= {"keyboard": "computer keyboard"}


@dataclass(frozen=True)
class Detection:
    """One object: box (left, top, right, bottom) in pixels, score in [0, 1]; mask bool [H, W], or None."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None


class Detector(Protocol):
    """What finds objects: `names` are all that it knows."""

    names: frozenset[str]

    def __call__(self, image: Tensor) -> list[Detection]:
        """Image uint8 [3, H, W] -> the objects on it, in any order."""
        ...


def found(detections: Sequence[Detection], *, counting: bool) -> dict[str, list[Detection]]:
    """The detections that count, by class, the surest first."""
    least = COUNTING_CONFIDENCE if counting else CONFIDENCE
    by_name: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda it: -it.score):
        own = by_name.setdefault(detection.name, [])
        if detection.score > least and len(own) < MOST:
            own.append(detection)
    return by_name


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` lies, seen from `b`: "left of", "right of", "above", "below"; two of them on a diagonal."""
    centres = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in (a.box, b.box)]
    offset = [one - other for one, other in zip(*centres)]
    sides = [abs(a.box[2 + axis] - a.box[axis]) + abs(b.box[2 + axis] - b.box[axis]) for axis in (0, 1)]
    apart = [math.copysign(max(abs(o) - MARGIN * side, 0), o) for o, side in zip(offset, sides)]
    if max(map(abs, apart)) < 1e-3:
        return set()
    length = math.hypot(*offset)
    across, down = (distance / length for distance in apart)
    told = {"left of": -across, "right of": across, "above": -down, "below": down}
    return {name for name, share in told.items() if share > DIRECTION}


def is_right(
    asked: Mapping[str, Any],
    detections: Sequence[Detection],
    colors: Callable[[Sequence[Detection]], Sequence[str]],
) -> bool:
    """Whether an image shows what its prompt asks for.

    Args:
        asked: a line of the prompts.
        detections: on the image.
        colors: tells the color of each of some detections of one class.
    """
    objects = found(detections, counting=asked["tag"] == "counting")
    groups: list[list[Detection] | None] = []
    right = True
    for wanted in asked.get("include", []):
        own = objects.get(wanted["class"], [])[: wanted["count"]]
        matched = len(own) >= wanted["count"]
        if matched and "color" in wanted:
            matched = list(colors(own)).count(wanted["color"]) >= wanted["count"]
        if matched and "position" in wanted:
            relation, number = wanted["position"]
            others = groups[number]
            matched = others is not None and all(relation in relations(a, b) for a in own for b in others)
        groups.append(own if matched else None)
        right = right and matched
    excluded = (len(objects.get(odd["class"], [])) >= odd["count"] for odd in asked.get("exclude", []))
    return right and not any(excluded)


def check_prompts(asked: Sequence[Mapping[str, Any]], names: frozenset[str] | None = None) -> None:
    """Raises:
    UserError: a line that is none of GenEval's, or asks for a class that is not among the detector's `names`.
    """
    for number, line in enumerate(asked, 1):
        place = f"suite.prompts: line {number}"
        groups = [*line.get("include", ()), *line.get("exclude", ())] if isinstance(line, Mapping) else []
        if not groups or not isinstance(line.get("tag"), str):
            raise UserError(f"{place} has no tag and include, as GenEval's evaluation_metadata.jsonl does")
        for group in groups:
            if not isinstance(group, Mapping) or not isinstance(group.get("class"), str):
                raise UserError(f"{place}: an object of include or exclude has no class")
            if type(group.get("count")) is not int or group["count"] < 1:
                raise UserError(f"{place}: count={group.get('count')} is no positive whole number")
            if group.get("color", "red") not in COLOURS:
                raise UserError(f"{place}: color={group['color']} is none of {', '.join(COLOURS)}")
            if names is not None and group["class"] not in names:
                raise UserError(f"{place}: the detector knows no {group['class']!r}")
        for own, group in enumerate(line.get("include", ())):
            position = group.get("position", ("above", 0))
            known = isinstance(position, Sequence) and len(position) == 2 and type(position[1]) is int
            if "position" in group and not (known and 0 <= position[1] < own):
                raise UserError(f"{place}: position={position} names no earlier object of include")


class Mask2Former:
    """A detector: Mask2Former for instances, as transformers has it (COCO's classes).

    Args:
        path: a folder as transformers writes it, or a repository on the Hub.
        device, bf16: as `CLIPEncoder`'s.

    Raises:
        UserError: nothing of that kind is there.
    """

    def __init__(self, path: str, *, device: torch.device | str = "cpu", bf16: bool | None = None):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        key = "scores.geneval.detector"
        self.network = load_network(
            key, path, Mask2FormerForUniversalSegmentation, example=EXAMPLE, device=device, bf16=bf16
        )
        self.processor = load_pretrained(key, path, AutoImageProcessor.from_pretrained, example=EXAMPLE)
        labels: dict[Any, str] = self.network.config.id2label
        self._names = {int(number): NAMES.get(name, name) for number, name in labels.items()}
        self.names = frozenset(self._names.values())

    @torch.no_grad()
    def __call__(self, image: Tensor) -> list[Detection]:
        inputs = self.processor(images=[image.cpu()], return_tensors="pt", input_data_format="channels_first")
        with torch.autocast(self.network.device.type, enabled=False):
            said = self.network(inputs["pixel_values"].to(self.network.device, self.network.dtype))
        said.class_queries_logits = said.class_queries_logits.float()
        said.masks_queries_logits = said.masks_queries_logits.float()
        (result,) = self.processor.post_process_instance_segmentation(
            said, threshold=CONFIDENCE, target_sizes=[tuple(image.shape[-2:])], return_binary_maps=True
        )
        maps, detections = result["segmentation"], []
        for mask, segment in zip([] if maps is None else maps, result["segments_info"]):
            mask = mask.bool().cpu()
            if mask.any():
                rows, columns = mask.any(dim=1).nonzero().squeeze(1), mask.any(dim=0).nonzero().squeeze(1)
                box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
                name = self._names[segment["label_id"]]
                detections.append(Detection(name, float(segment["score"]), box, mask))
        return detections


class ColourReader:
    """Tells colors of objects, zero-shot by CLIP: the object alone on gray, cut out by its box."""

    def __init__(self, encoder: CLIPEncoder):
        self.encoder = encoder
        self._directions: dict[str, Tensor] = {}

    def __call__(self, image: Tensor, objects: Sequence[Detection]) -> list[str]:
        """Of objects of one class on an image uint8 [3, H, W]."""
        if not objects:
            return []
        features = self.encoder.images([cut_out(image, it) for it in objects])
        return [COLOURS[best] for best in (features @ self._of(objects[0].name).T).argmax(dim=1).tolist()]

    def _of(self, name: str) -> Tensor:
        """The direction of each color, [colors, width]."""
        if name not in self._directions:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            features = self.encoder.texts(texts).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self._directions[name] = F.normalize(features.mean(dim=1), dim=-1)
        return self._directions[name]


def cut_out(image: Tensor, detection: Detection) -> Tensor:
    """The object, uint8 [3, h, w]: what lies around its mask is gray."""
    image = image.cpu()
    if detection.mask is not None:
        image = torch.where(detection.mask, image, torch.full_like(image, GROUND))
    left, top, right, bottom = detection.box
    height, width = image.shape[-2:]
    left, top = min(max(int(left), 0), width - 1), min(max(int(top), 0), height - 1)
    return image[:, top : max(math.ceil(bottom), top + 1), left : max(math.ceil(right), left + 1)]


class GenEval:
    """GenEval's score of samples of its prompts.

    `compute` gives `geneval`, the mean over tags of the share of right images, `geneval_<tag>` of each tag, and
    `geneval_images`: the share of right images among all.

    Args:
        asked: the lines of the prompts, by the numbers that `update` gets.
        detector: a folder or repository of Mask2Former; or any `Detector`.
        clip: a folder or repository of CLIP, which tells colors.
        colors: instead, what tells them: (image, objects of one class) -> their colors.
        train, val, cache_dir: not used.
        device: where the networks run.
        bf16: as `CLIPEncoder`'s.

    Raises:
        UserError: naming the key: prompts that are none of GenEval's, or no such network.
    """

    reads_lines = True  # of the suite

    def __init__(
        self,
        *,
        asked: Sequence[Mapping[str, Any]],
        detector: str | Detector,
        clip: str | None = None,
        colors: Callable[[Tensor, Sequence[Detection]], Sequence[str]] | None = None,
        train: Split | None = None,
        val: Split | None = None,
        device: torch.device | str = "cpu",
        cache_dir: str | Path | None = None,
        bf16: bool | None = None,
    ):
        check_prompts(asked)
        self.detector = Mask2Former(detector, device=device, bf16=bf16) if isinstance(detector, str) else detector
        check_prompts(asked, self.detector.names)
        if colors is None:
            if clip is None:
                raise UserError("scores.geneval.clip must be given: CLIP, which tells colors")
            colors = ColourReader(CLIPEncoder(clip, device=device, bf16=bf16, key="scores.geneval.clip"))
        self.asked, self.colors = list(asked), colors
        self.counts = Totals(2, len(asked), dtype=torch.int64).to(device)  # images, right ones

    def update(self, images: Tensor, labels: Tensor, ids: Tensor | None = None) -> None:
        """Adds images uint8 [B, 3, H, W] and the numbers of their prompts, int64 [B]; ids are not read."""
        added = torch.zeros(2, len(self.asked), dtype=torch.int64)
        for image, number in zip(images, labels.tolist()):
            right = is_right(
                self.asked[number], self.detector(image), lambda objects, image=image: self.colors(image, objects)
            )
            added[:, number] += torch.tensor([1, int(right)])
        self.counts.update(added)

    def compute(self) -> dict[str, float]:
        """The scores of all images given since the last `reset`, over all ranks; every rank must call it.

        Raises:
            UserError: no image was given.
        """
        images, right = self.counts.compute().tolist()
        if not sum(images):
            raise UserError("scores.geneval: no images to judge: generate at least one")
        tags = {
            tag: sum(right[n] for n in numbers) / sum(images[n] for n in numbers)
            for tag, numbers in self._tags(images).items()
        }
        scores = {"geneval": sum(tags.values()) / len(tags)} | {f"geneval_{tag}": share for tag, share in tags.items()}
        return scores | {"geneval_images": sum(right) / sum(images)}

    def uncertainty(self) -> dict[str, float]:
        """As in `grn.evaluation.scoring.uncertainties`, by prompt: images of one prompt are not independent."""
        images, right = self.counts.compute().tolist()
        halves = {tag: of_mean([right[n] / images[n] for n in numbers]) for tag, numbers in self._tags(images).items()}
        found = {f"geneval_{tag}": half for tag, half in halves.items() if half is not None}
        if len(found) < len(halves):  # a single prompt of a tag tells nothing of others
            return found
        return {"geneval": math.hypot(*found.values()) / len(found)} | found

    def _tags(self, images: Sequence[int]) -> dict[str, list[int]]:
        """The numbers of the prompts of each tag, of which there are images."""
        tags: dict[str, list[int]] = {}
        for number, line in enumerate(self.asked):
            if images[number]:
                tags.setdefault(line["tag"], []).append(number)
        return tags

    def reset(self) -> None:
        """Forgets the images."""
        self.counts.reset()
