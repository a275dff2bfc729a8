"""Which classes the config in a checkpoint may build: an explicit list for each group.

A checkpoint may come from anywhere, and Hydra calls whatever `_target_` names. So a network, a data module or a score
that checkpoints should be able to bring back is one more line in its group here; a class of another package needs
GRN_TRUST.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.utils import get_object

from grn.runtime.errors import UserError
from grn.weights.reading import check_plain, trusted


@dataclass(frozen=True)
class Group:
    """What may stand at one place of a config.

    Args:
        targets: dotted names, as configs write them.
        parts: keys that may hold a config of their own, and what may stand there; `*` is any key.
        given: arguments that GRN fills in, which a checkpoint must not.
        extra: keys that are no arguments, but that GRN reads.
        partial: whether the targets are only ever built with `_partial_: true`.
        files: keys that name files on the machine of whoever runs the command; `SPLITS` name none.
    """

    targets: tuple[str, ...] = ()
    parts: Mapping[str, "Group"] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    partial: bool = False
    files: tuple[str, ...] = ()


SPLITS = ("train", "val")
# What the config of a text refiner's training says of its samples (`TextRefinerBundle.settings`).
TEXT_SETTINGS = (
    *("prompts", "negative_prompt", "prompt_prefix", "prompt_suffix", "context_prefix"),
    *("size", "frames", "context_latents"),
)
# Where what checkpoints name was before it got its room.
EARLIER = (
    "grn.sampler.",
    "grn.metrics.digits_classifier.",
    "grn.metrics.judge.",
    "grn.metrics.pair_judge.",
    "grn.metrics.motion_judge.",
)
SPECIAL = {"_target_", "_partial_", "_args_", "_convert_", "_recursive_"}  # keys that Hydra's instantiate reads

TOKENIZER = Group(targets=("grn.networks.tokenizer.HBQTokenizer",), extra=("weights",))

DATA = Group(
    targets=(
        "grn.data.images.ImageShardsDataModule",
        "grn.data.text_images.TextImageDataModule",
        "grn.data.text_tokens.TextTokensDataModule",
        "grn.data.text_videos.TextVideoDataModule",
        "grn.data.tokens.TokenShardsDataModule",
        "grn.data.videos.VideoShardsDataModule",
    )
)

GROUPS: dict[str, Group] = {
    "model": Group(
        targets=(
            "grn.networks.class_refiner.ClassRefiner",
            "grn.networks.text_refiner.TextRefiner",
            *TOKENIZER.targets,
        ),
        extra=("weights",),
    ),
    "tokenizer.model": TOKENIZER,
    "text_encoder": Group(
        targets=("grn.networks.text_encoder.ByteT5", "grn.networks.text_encoder.PretrainedT5"),
        extra=("weights",),
    ),
    "training": Group(
        targets=(
            "grn.training.RefinerModule",
            "grn.training.TextRefinerModule",
            "grn.training.TokenizerModule",
        ),
        parts={
            "discriminator": Group(targets=("grn.networks.discriminator.PatchDiscriminator",)),
            "perceptual": Group(targets=("grn.networks.perceptual.LPIPS",), files=("weights",)),
        },
        given=("network", "bundle"),
        # Of text refiners' networks, and what `grn.sampling` reads.
        extra=("adapters", "labeling", *TEXT_SETTINGS),
    ),
    "sampler": Group(
        targets=("grn.method.sampler.Sampler",),
        parts={
            "schedule": Group(
                targets=(
                    "grn.method.schedules.Linear",
                    "grn.method.schedules.Cosine",
                    "grn.method.schedules.Shifted",
                    "grn.method.schedules.EntropyGuided",
                )
            )
        },
        extra=("file",),
    ),
    "data": Group(
        targets=(
            *DATA.targets,
            "grn.data.mixed.MixedDataModule",
            "grn.data.mixed_packs.MixedPacksDataModule",
        ),
        parts={"parts": Group(parts={"*": DATA})},
        extra=("batch_size", "max_tokens", "lookahead", "num_workers", "rank_streams", "worker_streams"),  # of mixtures
    ),
    "scores": Group(
        parts={
            "*": Group(
                targets=(
                    "grn.metrics.clip.CLIPScore",
                    "grn.metrics.fid.GenerationScores",
                    "grn.metrics.fvd.FrechetVideoDistance",
                    "grn.toys.judge.DigitsJudge",
                    "grn.toys.motion_judge.MovingDigitsJudge",
                    "grn.metrics.nearest.NearestTrainingDistance",
                    "grn.toys.critters_judge.CrittersJudge",
                    "grn.toys.moving_critters_judge.MovingCrittersJudge",
                    "grn.toys.pair_judge.DigitPairsJudge",
                    "grn.metrics.reconstruction.LPIPSScore",
                ),
                parts={
                    "weights": Group(
                        targets=("grn.toys.digits_classifier.digits_classifier_weights",),
                        given=("images", "labels", "cache_dir"),
                        partial=True,
                    ),
                    "network": Group(
                        targets=("grn.metrics.video_networks.video_network",), partial=True, files=("path",)
                    ),
                },
                given=("train", "val", "device", "cache_dir"),
                partial=True,
                files=("weights", "reference", "path"),
            )
        }
    ),
}
# What reading a checkpoint builds; the others are looked at by who asks for them.
BUILT = ("model", "text_encoder", "training", "sampler")


def check_group(name: str, config: Any, complaint: str) -> None:
    """Checks that instantiating the config of a group calls nothing but what is listed for that group here.

    Args:
        name: of the group, one of `GROUPS`.
        config: plain containers out of a file; None and {} build nothing.
        complaint: the error's words before the reason.

    Raises:
        UserError: too large or deep, or it refers to another place (`${...}`); a target that is not listed and whose
            package GRN_TRUST does not name; a key that nothing here reads.
    """
    check_plain(config, complaint)
    _check(config, GROUPS[name], name, complaint)


def named_files(name: str, config: Any) -> dict[str, str]:
    """Which files the config of a group names, by their keys (`scores.fvd.network.path`)."""
    return dict(_files(config, GROUPS[name], name))


def _files(node: Any, group: Group, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in group.files and isinstance(value, str) and value not in SPLITS:
                yield f"{place}.{key}", value
            elif (part := _part(group, key)) is not None:
                yield from _files(value, part, f"{place}.{key}")


def _part(group: Group, key: Any) -> Group | None:
    return group.parts.get(key, group.parts.get("*"))


def _check(node: Any, group: Group, place: str, complaint: str) -> None:
    if not isinstance(node, Mapping):
        _check_data(node, place, complaint)
        return
    target = node.get("_target_")
    if target is None:
        if group.targets:  # a mapping of other things where a class should be: {} of text_encoder=none, weights as data
            _check_data(node, place, complaint)
            return
        special, known = set(), None
    elif _package(target) in trusted():
        special, known = SPECIAL, None
    elif target in group.targets:
        special = {"_target_", "_partial_"} if group.partial else {"_target_"}
        if group.partial and node.get("_partial_") is not True:
            raise UserError(f"{complaint}: {place} wants to call {target} at once, where it is only to be named")
        known = {*arguments(get_object(target))[0], *group.extra} - {*group.given}
    else:
        raise UserError(_refusal(target, place, complaint))
    for key, value in node.items():
        if key in SPECIAL:
            if key not in special:
                raise UserError(f"{complaint}: {place} has the key {key!r}, which no checkpoint of GRN has there")
        elif known is not None and key not in known:
            raise UserError(
                f"{complaint}: {place}.{str(key)[:100]} is no key of {target}; was the file made by a later GRN?"
            )
        elif (part := _part(group, key)) is not None:
            _check(value, part, f"{place}.{key}", complaint)
        else:
            _check_data(value, f"{place}.{key}", complaint)


def _check_data(node: Any, place: str, complaint: str) -> None:
    """Of what nobody should build: Hydra would, wherever it finds a target."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_target_" and _package(value) not in trusted():
                raise UserError(_refusal(value, place, complaint))
            if key in SPECIAL and "_target_" not in node:
                raise UserError(f"{complaint}: {place} has the key {key!r}, which no checkpoint of GRN has there")
            _check_data(value, f"{place}.{key}", complaint)
    elif isinstance(node, (list, tuple)):  # OmegaConf makes lists of tuples
        for number, value in enumerate(node):
            _check_data(value, f"{place}[{number}]", complaint)


def _refusal(target: Any, place: str, complaint: str) -> str:
    name, package = str(target)[:100], _package(target)
    if name.startswith(EARLIER):
        return (
            f"{complaint}: {place[:100]} is {name}, of an earlier layout of GRN, which this one does not read: "
            "train again, or use the version that made it"
        )
    own = "" if package in ("grn", None) else f"; if you trust the file, set GRN_TRUST={package[:100]}"
    return f"{complaint}: {place[:100]} wants to call {name!r}, which is no part of GRN that it may name{own}"


def _package(target: Any) -> str | None:
    """None of what is no dotted name, and no package: `a.b`."""
    return target.split(".")[0] if isinstance(target, str) and target.isprintable() and "." in target else None


def arguments(found: Any) -> tuple[dict[str, Any], bool]:
    """What a class or function takes, arguments that it passes on included: (by name the function that has each;
    whether it takes others beside)."""
    known: dict[str, Any] = {}
    others, makers = False, [found]
    if inspect.isclass(found):
        makers = [vars(kind)["__init__"] for kind in found.__mro__ if "__init__" in vars(kind)]
    for maker in makers:
        parameters = inspect.signature(maker).parameters.values()
        own = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        known = dict.fromkeys(own, maker) | known
        if not (others := any(p.kind is p.VAR_KEYWORD for p in parameters)):
            break
    known.pop("self", None)
    return known, others
