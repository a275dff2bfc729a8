"""The authors' tokenizer checkpoints (`HBQ_*.ckpt`) <-> the names of `grn.networks.tokenizer.HBQTokenizer`."""

import re
from pathlib import Path

import torch
from torch import Tensor

from grn.runtime.errors import UserError
from grn.runtime.files import write_atomically
from grn.weights.mapping import Rule, rename, rename_back
from grn.weights.reading import read_untrusted


def _gain(gamma: Tensor) -> Tensor:
    """[C, 1, 1(, 1)] -> [C]; a view, so that nothing huge is made of a hostile file before its shapes are checked."""
    return gamma.squeeze(tuple(range(1, gamma.ndim)))


def _gain_of_frames(gamma: Tensor) -> Tensor:
    """[C] -> [C, 1, 1]."""
    return gamma[:, None, None]


def _gain_of_clips(gamma: Tensor) -> Tensor:
    """[C] -> [C, 1, 1, 1]."""
    return gamma[:, None, None, None]


_BLOCKS = {  # where residual blocks are
    r"encoder\.downsamples\.(\d+)\.downsamples\.(\d+)": r"encoder.stages.\1.blocks.\2",
    r"decoder\.upsamples\.(\d+)\.upsamples\.(\d+)": r"decoder.stages.\1.blocks.\2",
    r"(encoder|decoder)\.middle\.0": r"\1.middle.block1",
    r"(encoder|decoder)\.middle\.2": r"\1.middle.block2",
}


def tokenizer_rules(blocks: int | None = None) -> list[Rule]:
    """The mapping of names.

    Args:
        blocks: residual blocks of an encoder stage, which only the way back (`rename_back`) needs: a stage's resampling
            is one more entry in the official list of its blocks, so their count is in its name.
    """
    down, up = (r"\d+", r"\d+") if blocks is None else (str(blocks), str(blocks + 1))
    downsample = rf"encoder\.downsamples\.(\d+)\.downsamples\.{down}"
    upsample = rf"decoder\.upsamples\.(\d+)\.upsamples\.{up}"
    return [
        Rule(r"conv1\.(?P<p>weight|bias)", r"encoder.to_latent.\g<p>"),
        Rule(r"conv2\.(?P<p>weight|bias)", r"decoder.from_latent.\g<p>"),
        Rule(r"(encoder|decoder)\.conv1\.(?P<p>weight|bias)", r"\1.stem.\g<p>"),
        Rule(r"(encoder|decoder)\.head\.0\.gamma", r"\1.head.norm.gamma", _gain, _gain_of_clips),
        Rule(r"(encoder|decoder)\.head\.2\.(?P<p>weight|bias)", r"\1.head.conv.\g<p>"),
        Rule(r"(encoder|decoder)\.middle\.1\.norm\.gamma", r"\1.middle.attention.norm.gamma", _gain, _gain_of_frames),
        Rule(r"(encoder|decoder)\.middle\.1\.to_qkv\.(?P<p>weight|bias)", r"\1.middle.attention.qkv.\g<p>"),
        Rule(r"(encoder|decoder)\.middle\.1\.proj\.(?P<p>weight|bias)", r"\1.middle.attention.out.\g<p>"),
        Rule(rf"{downsample}\.resample\.1\.(?P<p>weight|bias)", r"encoder.stages.\1.downsample.space.\g<p>"),
        Rule(rf"{downsample}\.time_conv\.(?P<p>weight|bias)", r"encoder.stages.\1.downsample.time.\g<p>"),
        Rule(rf"{upsample}\.resample\.1\.(?P<p>weight|bias)", r"decoder.stages.\1.upsample.space.\g<p>"),
        Rule(rf"{upsample}\.time_conv\.(?P<p>weight|bias)", r"decoder.stages.\1.upsample.time.\g<p>"),
        *(
            rule
            for official, ours in _BLOCKS.items()
            for rule in (
                Rule(rf"{official}\.residual\.0\.gamma", rf"{ours}.norm1.gamma", _gain, _gain_of_clips),
                Rule(rf"{official}\.residual\.2\.(?P<p>weight|bias)", rf"{ours}.conv1.\g<p>"),
                Rule(rf"{official}\.residual\.3\.gamma", rf"{ours}.norm2.gamma", _gain, _gain_of_clips),
                Rule(rf"{official}\.residual\.6\.(?P<p>weight|bias)", rf"{ours}.conv2.\g<p>"),
                Rule(rf"{official}\.shortcut\.(?P<p>weight|bias)", rf"{ours}.shortcut.\g<p>"),
            )
        ),
    ]


TOKENIZER_RULES = tokenizer_rules()


def load_official_tokenizer(path: str | Path) -> dict[str, Tensor]:
    """The weights of an official tokenizer file, on the CPU, by our names; the averaged ones (`ema`) where it has them.

    Nothing in the file is executed. Whether they fit a network is for `grn.weights.mapping.load_strict` to say.

    Raises:
        UserError: no such file, not a checkpoint, not one of a tokenizer.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no such tokenizer checkpoint: {path}; give the path of an official HBQ_*.ckpt file")
    complaint = f"{path} cannot be read as a tokenizer checkpoint: download it again"
    contents = read_untrusted(path, complaint, mmap=True)
    contents = contents if isinstance(contents, dict) else {}
    state = next(
        (contents[key] for key in ("ema", "vae") if isinstance(contents.get(key), dict) and contents[key]), None
    )
    if state is None:
        raise UserError(f"{path} is not an official tokenizer checkpoint: it has neither `ema` nor `vae` weights")
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        raise UserError(f"{path} is not an official tokenizer checkpoint: its weights are not all named tensors")
    return rename(state, TOKENIZER_RULES, source=str(path))


def official_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tokenizer's state dict in the authors' names and shapes: the inverse of `rename` with `TOKENIZER_RULES`."""
    in_first_stage = (re.match(r"encoder\.stages\.0\.blocks\.(\d+)\.", name) for name in state)
    blocks = 1 + max((int(match[1]) for match in in_first_stage if match), default=0)
    return rename_back(state, tokenizer_rules(blocks), source="tokenizer")


def save_official_tokenizer(state: dict[str, Tensor], path: str | Path) -> Path:
    """Writes a tokenizer's state dict as a file of the authors' kind, `{"ema": ...}`, atomically; returns its path."""
    contents = {"ema": {name: tensor.detach().cpu() for name, tensor in official_state(state).items()}}
    return write_atomically(Path(path).expanduser(), lambda temporary: torch.save(contents, temporary))
