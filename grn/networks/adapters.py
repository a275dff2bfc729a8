"""Low-rank adapters (LoRA, arXiv 2106.09685) of a text refiner: trained by peft, kept as safetensors, merged by sums.

A linear layer W of a block has W + (alpha / rank) B A, with A [rank, in] and B [out, rank], which starts at zero.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grn.networks.captioned_refiner import CaptionedRefiner
from grn.runtime.errors import UserError, check_count, check_number

LAYERS = r"(.*\.)?blocks\.\d+\.(attention\.(q|k|v|out)|mlp\.(gate|value|out))"  # that have adapters
_BASE, _PARTS = ".base_layer.weight", (".lora_A.default.weight", ".lora_B.default.weight")


def check_adapters(settings: object) -> dict[str, Any]:
    """`training.adapters` as {"rank": int, "alpha": number}.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(settings, Mapping) or settings.keys() != {"rank", "alpha"}:
        raise UserError(f"training.adapters={str(settings)[:100]} must be {{rank:16,alpha:16}}, or null for none")
    check_count("training.adapters.rank", settings["rank"])
    check_number("training.adapters.alpha", settings["alpha"], least=1e-6)
    return dict(settings)


def add_adapters(network: CaptionedRefiner, *, rank: int, alpha: float, seed: int) -> None:
    """Gives every linear layer of a refiner's blocks an adapter, and freezes everything else.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("training.adapters needs peft: pip install -e '.[finetune]'") from None
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Any number is an alpha, whatever its annotation says.
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=LAYERS)  # pyright: ignore[reportArgumentType]
        inject_adapter_in_model(config, network.refiner)


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a network's weights with adapters, those of the adapters by the refiner's names: `blocks.0.mlp.out.lora_A`."""
    found = {}
    for name, tensor in state.items():
        for part in _PARTS:
            if name.endswith(part):
                layer = name.removesuffix(part).removeprefix("refiner.")
                found[f"{layer}.{part.split('.')[1]}"] = tensor
    return found


def merged(state: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float, *, source: str) -> dict:
    """The weights of a refiner with adapters added, by plain names (with or without `refiner.` before them).

    Args:
        state: the refiner's, with or without adapters of its own, which are left out.
        adapters: as of `adapter_state`.
        scale: alpha / rank.
        source: where they are from, for errors.

    Raises:
        UserError: adapters that do not fit the weights.
    """
    plain = {name.replace(_BASE, ".weight"): it for name, it in state.items() if not name.endswith(_PARTS)}
    prefix = "refiner." if any(name.startswith("refiner.") for name in plain) else ""
    layers = {name.rpartition(".")[0] for name in adapters}
    if not layers or adapters.keys() != {f"{layer}.lora_{part}" for layer in layers for part in "AB"}:
        raise UserError(f"{source} holds no adapters of a text refiner")
    for layer in sorted(layers):
        down, up, name = adapters[f"{layer}.lora_A"], adapters[f"{layer}.lora_B"], f"{prefix}{layer}.weight"
        own = plain.get(name)
        if (
            own is None
            or not re.fullmatch(LAYERS, layer)
            or down.ndim != 2
            or up.ndim != 2
            or (up.shape[0], down.shape[1], up.shape[1]) != (*own.shape, down.shape[0])
        ):
            raise UserError(f"{source}: the adapter of {layer[:100]} does not fit this refiner, another size perhaps")
        delta = scale * (up.float() @ down.float()).to(own.device)
        if not delta.isfinite().all():
            raise UserError(f"{source}: the adapter of {layer[:100]} is not finite")
        plain[name] = (own.float() + delta).to(own.dtype)
    return plain


def save_adapters(path: Path, adapters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Writes the tensors of `adapter_state` with the rank and alpha of `settings`."""
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in adapters.items()}
    save_file(tensors, path, metadata={"alpha": str(settings["alpha"]), "rank": str(settings["rank"])})


def load_adapters(path: str | Path) -> tuple[dict[str, Tensor], float]:
    """(The tensors of a file of `save_adapters`, their scale).

    Raises:
        UserError: there is no such file, or it is of something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file; python -m grn.export format=adapters writes one")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        scale = float(metadata["alpha"]) / float(metadata["rank"])
    except Exception as error:  # whatever safetensors and numbers raise of a hostile file
        raise UserError(f"{path} is no file of adapters ({type(error).__name__})") from None
    if not 0 < scale < math.inf or not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise UserError(f"{path} is no file of adapters")
    return tensors, scale
