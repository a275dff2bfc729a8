"""Reads the authors' tokenizer checkpoints (`HBQ_*.ckpt`) into the names of `grn.networks.tokenizer.HBQTokenizer`."""

from pathlib import Path

from torch import Tensor

from grn.checkpoints.mapping import Rule, rename
from grn.checkpoints.reading import read_untrusted
from grn.errors import UserError


def _gain(gamma: Tensor) -> Tensor:
    """[C, 1, 1(, 1)] -> [C]; a view, so that nothing huge is made of a hostile file before its shapes are checked."""
    return gamma.squeeze(tuple(range(1, gamma.ndim)))


_BLOCKS = {  # where residual blocks are
    r"encoder\.downsamples\.(\d+)\.downsamples\.(\d+)": r"encoder.stages.\1.blocks.\2",
    r"decoder\.upsamples\.(\d+)\.upsamples\.(\d+)": r"decoder.stages.\1.blocks.\2",
    r"(encoder|decoder)\.middle\.0": r"\1.middle.block1",
    r"(encoder|decoder)\.middle\.2": r"\1.middle.block2",
}

TOKENIZER_RULES: list[Rule] = [
    Rule(r"conv1\.(?P<p>weight|bias)", r"encoder.to_latent.\g<p>"),
    Rule(r"conv2\.(?P<p>weight|bias)", r"decoder.from_latent.\g<p>"),
    Rule(r"(encoder|decoder)\.conv1\.(?P<p>weight|bias)", r"\1.stem.\g<p>"),
    Rule(r"(encoder|decoder)\.head\.0\.gamma", r"\1.head.norm.gamma", _gain),
    Rule(r"(encoder|decoder)\.head\.2\.(?P<p>weight|bias)", r"\1.head.conv.\g<p>"),
    Rule(r"(encoder|decoder)\.middle\.1\.norm\.gamma", r"\1.middle.attention.norm.gamma", _gain),
    Rule(r"(encoder|decoder)\.middle\.1\.to_qkv\.(?P<p>weight|bias)", r"\1.middle.attention.qkv.\g<p>"),
    Rule(r"(encoder|decoder)\.middle\.1\.proj\.(?P<p>weight|bias)", r"\1.middle.attention.out.\g<p>"),
    # The resampling is one more entry in the official list of a stage's blocks; its names tell it from them.
    Rule(
        r"encoder\.downsamples\.(\d+)\.downsamples\.\d+\.resample\.1\.(?P<p>weight|bias)",
        r"encoder.stages.\1.downsample.space.\g<p>",
    ),
    Rule(
        r"encoder\.downsamples\.(\d+)\.downsamples\.\d+\.time_conv\.(?P<p>weight|bias)",
        r"encoder.stages.\1.downsample.time.\g<p>",
    ),
    Rule(
        r"decoder\.upsamples\.(\d+)\.upsamples\.\d+\.resample\.1\.(?P<p>weight|bias)",
        r"decoder.stages.\1.upsample.space.\g<p>",
    ),
    Rule(
        r"decoder\.upsamples\.(\d+)\.upsamples\.\d+\.time_conv\.(?P<p>weight|bias)",
        r"decoder.stages.\1.upsample.time.\g<p>",
    ),
    *(
        rule
        for official, ours in _BLOCKS.items()
        for rule in (
            Rule(rf"{official}\.residual\.0\.gamma", rf"{ours}.norm1.gamma", _gain),
            Rule(rf"{official}\.residual\.2\.(?P<p>weight|bias)", rf"{ours}.conv1.\g<p>"),
            Rule(rf"{official}\.residual\.3\.gamma", rf"{ours}.norm2.gamma", _gain),
            Rule(rf"{official}\.residual\.6\.(?P<p>weight|bias)", rf"{ours}.conv2.\g<p>"),
            Rule(rf"{official}\.shortcut\.(?P<p>weight|bias)", rf"{ours}.shortcut.\g<p>"),
        )
    ),
]


def load_official_tokenizer(path: str | Path) -> dict[str, Tensor]:
    """The weights of an official tokenizer file, on the CPU, by our names; the averaged ones (`ema`) where it has them.

    Nothing in the file is executed. Whether they fit a network is for `grn.checkpoints.mapping.load_strict` to say.

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
        raise UserError(f"{path} is no official tokenizer checkpoint: it has neither `ema` nor `vae` weights")
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        raise UserError(f"{path} is no official tokenizer checkpoint: its weights are not all named tensors")
    return rename(state, TOKENIZER_RULES, source=str(path))
