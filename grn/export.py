"""python -m grn.export ckpt=runs/digits_tokenizer: a trained tokenizer as a folder to share (conf/export.yaml)."""

import logging
from pathlib import Path

from omegaconf import DictConfig

from grn.checkpoints.native import is_pretrained, load_tokenizer
from grn.checkpoints.official_tokenizer import save_official_tokenizer
from grn.cli import entry_point
from grn.errors import UserError

log = logging.getLogger(__name__)

FORMATS = ("pretrained", "official")


@entry_point("export")
def main(config: DictConfig) -> None:
    export(config)


def export(config: DictConfig) -> Path:
    """Writes a tokenizer's weights for others: a folder for `HBQTokenizer.from_pretrained`, or an official file.

    Returns:
        what was written: `out`, to which format=official adds `.ckpt`.
    """
    if config.format not in FORMATS:
        raise UserError(f"format={config.format}: choose among {', '.join(FORMATS)}")
    if config.format == "pretrained" and Path(config.ckpt).is_dir() and is_pretrained(config.ckpt):
        raise UserError(f"ckpt: {config.ckpt} is an export already (format=official makes one of the authors' files)")
    tokenizer, record = load_tokenizer(
        config.ckpt, embed=False, official=config.tokenizer.model, ema=config.ema, key="ckpt"
    )
    if config.format == "official":
        out = save_official_tokenizer(tokenizer.state_dict(), f"{str(config.out).removesuffix('.ckpt')}.ckpt")
    else:
        provenance = {"source": str(config.ckpt), "step": record["step"], "sha256": record["sha256"]}
        out = tokenizer.save_pretrained(config.out, provenance=provenance)
    log.info("exported: %s (sha256 of the weights: %s)", out, record["sha256"])
    return out


if __name__ == "__main__":
    main()
