"""python -m grn.encode ckpt=runs/digits_tokenizer data=digits: pixel shards -> token shards (conf/encode.yaml)."""

import hashlib
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from grn.checkpoints.native import load_tokenizer
from grn.cli import entry_point
from grn.data.datamodule import ShardsDataModule
from grn.data.encoding import ShardEncoder
from grn.data.images import ImageShardsDataModule
from grn.data.shards import write_shards
from grn.data.videos import VideoShardsDataModule
from grn.errors import UserError
from grn.launch import place
from grn.networks.tokenizer import HBQTokenizer


@entry_point("encode")
def main(config: DictConfig) -> None:
    encode(config)


def encode(config: DictConfig) -> bool:
    """Writes the token shards of `data` into `out`; returns whether there was anything to do."""
    datamodule = instantiate(config.data)
    if not isinstance(datamodule, (ImageShardsDataModule, VideoShardsDataModule)):
        raise UserError(f"data={datamodule.name}: only pixels are encoded, one data set at a time (data=digits, ...)")
    official = config.tokenizer.model
    source = {
        "path": str(config.tokenizer.ckpt),
        "official": None if official is None else OmegaConf.to_container(official, resolve=True),
        "ema": config.tokenizer.ema,
        "key": "ckpt",
    }
    tokenizer, record = load_tokenizer(**source, embed=False)
    facts = {
        "tokenizer": {
            "sha256": record["sha256"],
            "latent_channels": tokenizer.latent_channels,
            "rounds": tokenizer.rounds,
            "source": record["path"],
        },
        "views": 1 + bool(config.flip),
        "token_shape": _token_shape(tokenizer, datamodule),
        "source": _source(datamodule),
        "image_size": datamodule.image_size,
        "num_labels": datamodule.num_labels,
        "label_names": datamodule.label_names,
    }
    rank, local_rank, world_size = place()
    encoder = ShardEncoder(
        tokenizer=source,
        decode=datamodule.decoder(training=False),
        mirrored=bool(config.flip),
        batch_size=config.batch_size,
        device=config.device,
        bf16=config.bf16,
        compile=config.compile,
        first_process=local_rank * max(1, config.num_workers),
        processes=max(1, config.num_workers),
    )
    if not config.num_workers:
        encoder.start_worker(0, tokenizer)
    del tokenizer  # workers read their own, and this process does not hold another beside them
    urls = {split: datamodule.urls(split) for split in config.splits}
    return write_shards(
        Path(config.out),
        name=f"{datamodule.name}_tokens",
        parameters={
            "tokenizer": record["sha256"],
            "flip": bool(config.flip),
            "bf16": config.bf16,
            "shards": {split: _digest(datamodule, own) for split, own in urls.items()},
            "decoder": repr(encoder.decode),
        },
        shards=urls,
        write=encoder,
        facts=facts,
        num_workers=config.num_workers,
        overwrite=config.overwrite,
        rank=rank,
        world_size=world_size,
    )


def _token_shape(tokenizer: HBQTokenizer, datamodule: ShardsDataModule) -> list[int]:
    """(T, h, w) of every sample; what does not fit the strides is refused before anything is read."""
    frames = datamodule.frames if isinstance(datamodule, VideoShardsDataModule) else 1
    tokenizer.check_video((1, 3, frames, datamodule.image_size, datamodule.image_size))
    side = datamodule.image_size // tokenizer.stride
    return [1 + (frames - 1) // tokenizer.temporal_stride, side, side]


def _source(datamodule: ShardsDataModule) -> dict[str, Any] | None:
    """Where the images are, for scores of refiners that train from their tokens; None of clips."""
    if not isinstance(datamodule, ImageShardsDataModule):
        return None
    return {
        "name": datamodule.name,
        "root": None if datamodule.root is None else str(datamodule.root.absolute()),
        "train": datamodule.patterns["train"],
        "heldout": datamodule.patterns["heldout"],
        "image_size": datamodule.image_size,
        "center_crop": datamodule.center_crop,
    }


def _digest(datamodule: ShardsDataModule, urls: list[str]) -> str:
    """What tells one set of pixel shards from another: their hashes in the manifest, or else where they are."""
    known = {}
    if datamodule.manifest:
        shards = [shard for split in datamodule.manifest["splits"].values() for shard in split["shards"]]
        known = {str(datamodule.root / shard["name"]): shard["sha256"] for shard in shards}
    return hashlib.sha256("\n".join(known.get(url, url) for url in urls).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
