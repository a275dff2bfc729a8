"""What transformers loads, from folders or the Hub; no code of a checkpoint is ever executed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grn.runtime.errors import UserError
from grn.weights.pretrained import brief


def load_pretrained(key: str, path: str, load: Callable[..., Any], *, example: str, **options: Any) -> Any:
    """What `load`, a `from_pretrained` of transformers, makes of a folder or a repository on the Hub (`owner/name`).

    Args:
        example: a repository, for messages.

    Raises:
        UserError: naming `key`: nothing of that kind is there.
    """
    folder = Path(path).expanduser()
    here = folder.is_dir()
    if not here and (folder.exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise UserError(
            f"{key}: no folder {path}; give one, or a repository on the Hub such as openai/clip-vit-base-patch32"
        )
    try:
        return load(str(folder) if here else path, local_files_only=here, trust_remote_code=False, **options)
    except Exception as error:  # OSError, ValueError, those of the Hub's HTTP library, of safetensors, of tokenizers
        if here:
            raise UserError(f"{key}: {path} cannot be read ({brief(error)}); download it again") from None
        raise UserError(
            f"{key}: {path} is not a folder here, and not on the Hub ({brief(error)}); give a local folder"
        ) from None


def load_network(
    key: str, path: str, kind: type, *, example: str, device: torch.device | str, bf16: bool | None
) -> Any:
    """A frozen network of transformers' class `kind` in evaluation mode; missing weights, where transformers goes on
    with random ones, are an error.

    Args:
        example: as `load_pretrained`'s.
        bf16: None: on accelerators alone.

    Raises:
        UserError: naming `key`: nothing of that kind is there, or it lacks weights.
    """
    device = torch.device(device)
    dtype = torch.bfloat16 if (device.type != "cpu" if bf16 is None else bf16) else torch.float32
    options = {"dtype": dtype, "output_loading_info": True, "use_safetensors": True, "example": example}
    network, report = load_pretrained(key, path, kind.from_pretrained, **options)
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{key}: {path} lacks the weights {missing[0]} ({len(missing)} in all); is it a {kind.__name__}?"
        )
    return network.to(device).eval().requires_grad_(False)
