"""The authors' weights, from their repository or a copy of it, as a refiner that is ready to sample."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from grn.checkpoints.exported import TextSide, sampler_from_plain
from grn.checkpoints.official_class_refiner import SAMPLED, load_official_class_refiner
from grn.checkpoints.official_text_refiner import check_attention, load_official_training
from grn.checkpoints.official_tokenizer import load_official_tokenizer
from grn.method import hbq
from grn.networks.class_refiner import ClassRefiner
from grn.networks.text_encoder import PretrainedT5
from grn.networks.text_refiner import TextRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError
from grn.runtime.files import sha256_of
from grn.sampling.bundle import RefinerBundle
from grn.sampling.loading import text_refiner_bundle
from grn.weights.building import build_with_weights
from grn.weights.kinds import CONFIG, INDEX
from grn.weights.pretrained import fetch
from grn.weights.releases import File, Release, find_release

log = logging.getLogger(__name__)

Refiner = TypeVar("Refiner", ClassRefiner, TextRefiner)


def load_official_refiner(
    ckpt: str,
    *,
    task: str,
    size: str | None = None,
    size_key: str = "size",
    ema: str | float | None = None,
    **hub: Any,
) -> tuple[RefinerBundle, dict[str, Any]]:
    """A refiner of the authors' in evaluation mode, with the tokenizer, text encoder and sampling settings that belong
    to it; and what reports say of it: where it is, and all that was chosen.

    Args:
        ckpt: their repository on the Hub (`hf://bytedance-research/GRN`), or a folder or mirror with files of the same
            names; of the Hub, only those that are needed are downloaded.
        task, size: of `grn.weights.releases.RELEASES`; None: the task's first size.
        size_key: what the user calls `size`.
        ema: of files with averages: the decay of one, or `none`; None: what the authors sample from.
        hub: revision, cache_dir, token, local_files_only, as in `Pretrained.from_pretrained`.

    Raises:
        UserError: no such task or size; files that are missing, not whole, or of something else.
    """
    size, release = find_release(task, size, size_key=size_key)
    folder = fetch(ckpt, files=release.files, **hub)
    if (folder / INDEX).is_file() or (folder / CONFIG).is_file():
        raise UserError(f"task={task} is of the authors' files, and {ckpt} is an export: leave task out")
    refiner_file, tokenizer_file = (_found(folder, file, task) for file in (release.refiner, release.tokenizer))
    tokenizer = build_with_weights(
        lambda: HBQTokenizer(**release.tokenizer_model),
        load_official_tokenizer(tokenizer_file),
        source=str(tokenizer_file),
        described=f"{tokenizer_file} is no tokenizer of this release",
        remedy=_REMEDY,
    )
    sampler = sampler_from_plain(release.sampler, Path("grn.weights.releases"))
    arguments: dict[str, Any] = {"tokenizer": tokenizer.float(), "sampler": sampler}
    files = [refiner_file, tokenizer_file]
    if release.encoder is not None:
        state, decay = official_text_weights(refiner_file, ema, key="ckpt")
        refiner = _refiner(TextRefiner, release, state, refiner_file)
        labeling = labeling_of(refiner, tokenizer)
        check_attention(state, refiner.attention, refiner_file, key="ckpt")
        encoder_file = _found(folder, release.encoder, task)
        files.append(encoder_file)
        encoder = PretrainedT5(
            path=str(folder / release.encoder_tokenizer), weights=str(encoder_file), clean_captions=True
        )
        text = TextSide(
            encoder,
            release.prompts,
            release.negative_prompt,
            release.size,
            release.frames,
            release.context_latents,
            release.prompt_prefix,
            release.prompt_suffix,
        )
        bundle: RefinerBundle = text_refiner_bundle(refiner.float(), text, labeling=labeling, **arguments)
    else:
        state, decay = official_class_weights(refiner_file, ema, key="ckpt")
        refiner = _refiner(ClassRefiner, release, state, refiner_file)
        bundle = RefinerBundle(refiner.float(), labeling=labeling_of(refiner, tokenizer), **arguments)
    bundle.provenance = {
        "refiner": {"source": f"{ckpt}/{refiner_file.name}", "step": None, "ema": decay, "task": task},
        "tokenizer": {"source": f"{ckpt}/{tokenizer_file.name}", "step": None},
    }
    names = [str(path.relative_to(folder)) for path in files]
    log.info("task=%s %s=%s: %s; %s", task, size_key, size, ", ".join(names), _told(release, sampler))
    return bundle.eval(), {"ckpt": ckpt, "step": None, "task": task, "size": size, "files": names}


def official_class_weights(path: str | Path, ema: str | float | None, *, key: str) -> tuple[dict[str, Tensor], str]:
    """(The chosen weights of an official class refiner, their decay); None: what the authors sample from.

    Raises:
        UserError: a decay that the file does not hold; no such file.
    """
    decay = SAMPLED if ema is None else str(ema)
    loaded = load_official_class_refiner(path, key=key)
    states = {"none": loaded["model"], **loaded["ema"]}
    if decay not in states:
        raise UserError(f"ema={decay} is not in {path}; it holds {', '.join(states)}")
    return states[decay], decay


def official_text_weights(path: str | Path, ema: str | float | None, *, key: str) -> tuple[dict[str, Tensor], str]:
    """Likewise of an official text refiner."""
    state, averages = load_official_training(path, key=key)
    states = {"none": state, **averages}
    decay = "none" if ema is None else str(ema)
    if decay not in states:
        held = f"none and {', '.join(averages)}" if averages else "one set of weights; leave ema out"
        raise UserError(f"ema={decay}: {path} holds {held}")
    return states[decay], decay


def labeling_of(refiner: ClassRefiner | TextRefiner, tokenizer: HBQTokenizer) -> hbq.Labeling:
    """The labeling under which a refiner's tokens are the tokenizer's.

    Raises:
        UserError: there is none.
    """
    size, sizes = (tokenizer.latent_channels, tokenizer.rounds), (refiner.channels, refiner.classes)
    for labeling in get_args(hbq.Labeling):
        if hbq.num_tokens(*size, labeling) == sizes:
            return labeling
    raise UserError(
        f"model.channels={sizes[0]} model.classes={sizes[1]} do not fit a tokenizer of {size[0]} channels and "
        f"{size[1]} rounds under any labeling"
    )


_REMEDY = "download it again, or another revision of it"


def _found(folder: Path, file: File, task: str) -> Path:
    """The one file of a release, whose hash is checked where it is known."""
    paths = sorted(folder.glob(file.path))
    if len(paths) != 1:
        has = f"{len(paths)} of them" if paths else "none"
        raise UserError(f"ckpt: task={task} needs a file {file.path}, and {folder} has {has}")
    if file.sha256 is not None and (digest := sha256_of(paths[0])) != file.sha256:
        raise UserError(f"ckpt: {paths[0]} has sha256 {digest}, not {file.sha256}: {_REMEDY}")
    return paths[0]


def _refiner(kind: type[Refiner], release: Release, state: dict[str, Tensor], path: Path) -> Refiner:
    """With the definition, of those that the release may have, whose shapes the file has; else with the first."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    chosen: Mapping[str, Any] = release.models[0]
    if len(release.models) > 1:
        for model in release.models:
            with torch.device("meta"):
                own = {name: tensor.shape for name, tensor in kind(**model).state_dict().items()}
            if own == shapes:
                chosen = model
    return build_with_weights(
        lambda: kind(**chosen),
        state,
        source=str(path),
        described=f"{path} is no refiner of this release",
        remedy=_REMEDY,
    )


def _told(release: Release, sampler: Any) -> str:
    """What was chosen beside the files, in one line."""
    told = [repr(sampler)]
    if release.encoder is not None:
        height, width = release.size
        told.append(f"{release.prompt_prefix}prompt{release.prompt_suffix}")
        told.append(f"negative prompt {release.negative_prompt[:40]!r}{'...' * (len(release.negative_prompt) > 40)}")
        told.append(f"{height}x{width}" + (f", {release.frames} frames" if release.frames > 1 else ""))
    return "; ".join(told)
