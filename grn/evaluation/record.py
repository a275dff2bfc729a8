"""What `metrics.json` says of an evaluation beside its metrics, and which folder it may write into."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from grn.checkpoints.native import weights_hash
from grn.evaluation.compare import flat
from grn.runtime.errors import UserError
from grn.runtime.git import package_commit
from grn.runtime.secrets import without_secrets

PACKAGES = ("grn", "torch", "lightning", "transformers", "torch-fidelity", "torchmetrics", "numpy")
UNMEASURED = ("num_workers", "eval_batch_size")  # keys of data that change no metric


def settings(**given: Any) -> dict[str, Any]:
    """What the metrics are a function of beside the weights, as plain containers without secrets; long lists of prompts
    by their hash."""
    return _plain(without_secrets(given))


def provenance(network: nn.Module) -> dict[str, Any]:
    """`weights_sha256` of the scored network (names, shapes and bytes), `versions`, and `git`: the checkout's commit,
    with `+` where tracked files were changed, or None."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return {"weights_sha256": weights_hash(network.state_dict()), "versions": versions, "git": package_commit()}


def folder_for(out: Path, wanted: Mapping[str, Any], *, given: bool, overwrite: bool) -> Path:
    """Where results of these settings go: `out`, unless it holds those of others; then a folder beside it whose name
    ends with a hash of the settings.

    The same checkpoint file, trained further, replaces its earlier results.

    Args:
        out: the folder of results.
        wanted: `settings`.
        given: whether the user named `out`, which then is refused.
        overwrite: whether to replace whatever is there.

    Raises:
        UserError: `out` was given and holds results of other settings.
    """
    if overwrite or (odd := _difference(out / "metrics.json", wanted)) is None:
        return out
    if given:
        raise UserError(
            f"out={out} has results of other settings ({odd}): give another out=..., or overwrite=true to replace them"
        )
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    return out.with_name(f"{out.name}-{digest[:8]}")


def _difference(path: Path, wanted: Mapping[str, Any]) -> str | None:
    """The first key by which earlier results differ; None: there are none, or they are of these settings."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        had = earlier["settings"] if "settings" in earlier else {k: earlier[k] for k in ("num", "seed") if k in earlier}
        had, has = flat(had), flat(json.loads(json.dumps(wanted)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # nobody's results
        return None
    keys = [*has, *(key for key in had if key not in has)] if "settings" in earlier else had
    odd = next((key for key in keys if had.get(key) != has.get(key)), None)
    return None if odd is None else f"{odd}={had.get(odd)}, here {has.get(odd)}"


def _plain(node: Any) -> Any:
    if isinstance(node, Mapping):
        kept = {str(key): value for key, value in node.items() if key not in UNMEASURED}
        return {key: _hashed(value) if key == "prompts" else _plain(value) for key, value in kept.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(value) for value in node]
    return node if isinstance(node, (str, int, float, bool, type(None))) else str(node)


def _hashed(prompts: Any) -> Any:
    if not isinstance(prompts, (list, tuple)):
        return prompts
    digest = hashlib.sha256(json.dumps(list(map(str, prompts))).encode())
    return f"{len(prompts)} of sha256 {digest.hexdigest()}"
