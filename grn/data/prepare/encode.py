"""Token shards from pixel shards: what `python -m grn.encode` does."""

import hashlib
from itertools import product
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from grn.checkpoints.native import load_tokenizer
from grn.data.datamodule import ShardsDataModule
from grn.data.images import ImageShardsDataModule
from grn.data.prepare.shard_encoder import ShardEncoder
from grn.data.prepare.shards import write_shards
from grn.data.stream.streaming import check_first
from grn.data.stream.survey import survey
from grn.data.text_features import encoder_record
from grn.data.text_images import TextImageDataModule
from grn.data.text_tokens import pixel_arguments
from grn.data.text_videos import TextVideoDataModule
from grn.data.videos import VideoShardsDataModule
from grn.networks.text_encoder import PretrainedT5
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.configs import plain
from grn.runtime.errors import UserError
from grn.runtime.ranks import place


def encode(config: DictConfig) -> bool:
    """Writes the token shards of `data` into `out`; returns whether there was anything to do."""
    datamodule = instantiate(config.data)
    if not isinstance(datamodule, (ImageShardsDataModule, VideoShardsDataModule, TextImageDataModule)):
        raise UserError(f"data={datamodule.name}: only pixels are encoded, one data set at a time (data=digits, ...)")
    official = config.tokenizer.model
    source = {
        "path": str(config.tokenizer.ckpt),
        "official": None if official is None else plain(official, resolve=True),
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
        "source": _source(datamodule),
        "num_labels": datamodule.num_labels,
        "label_names": datamodule.label_names,
    }
    captions = None
    if isinstance(datamodule, TextImageDataModule):
        facts["text"] = _text_facts(tokenizer, datamodule)
        captions = datamodule.drawn_captions(training=False)
    else:
        facts |= {"token_shape": _token_shape(tokenizer, datamodule), "image_size": datamodule.image_size}
    if (text_encoder := _text_encoder(config, datamodule)) is not None:
        facts["text"]["encoder"] = encoder_record(text_encoder)
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
        text_encoder=None if text_encoder is None else plain(config.text_encoder, resolve=True),
        captions=captions,
    )
    if not config.num_workers:
        encoder.start_worker(0, tokenizer, text_encoder)
    del tokenizer, text_encoder  # workers read their own, and this process does not hold others beside them
    urls = {split: datamodule.urls(split) for split in config.splits}
    for split, shards in urls.items():
        check_first(shards, key=f"data.{split}")
    parameters = {
        "tokenizer": record["sha256"],
        "flip": bool(config.flip),
        "bf16": config.bf16,
        "shards": {split: _digest(datamodule, own) for split, own in urls.items()},
        "decoder": repr(encoder.decode),
    }
    if "text" in facts:
        parameters["text_encoder"] = facts["text"]["encoder"]
    return write_shards(
        Path(config.out),
        name=f"{datamodule.name}_tokens",
        parameters=parameters,
        shards=urls,
        write=encoder,
        facts=facts,
        explain=lambda split, reasons: survey(urls[split][0], reasons, key="data"),
        num_workers=config.num_workers,
        overwrite=config.overwrite,
        rank=rank,
        world_size=world_size,
    )


def _token_shape(tokenizer: HBQTokenizer, datamodule: ImageShardsDataModule | VideoShardsDataModule) -> list[int]:
    """(T, h, w) of every sample; what does not fit the strides is refused before anything is read."""
    frames = datamodule.frames if isinstance(datamodule, VideoShardsDataModule) else 1
    tokenizer.check_video((1, 3, frames, datamodule.image_size, datamodule.image_size))
    side = datamodule.image_size // tokenizer.stride
    return [1 + (frames - 1) // tokenizer.temporal_stride, side, side]


def _text_encoder(config: DictConfig, datamodule: ShardsDataModule) -> PretrainedT5 | None:
    """The frozen encoder whose features are written, too."""
    if "_target_" not in config.text_encoder:
        return None
    if not isinstance(datamodule, TextImageDataModule):
        raise UserError(
            f"text_encoder: data={datamodule.name} is not for text refiners: leave it out, or give data=captioned_image"
        )
    if not issubclass(get_class(config.text_encoder._target_), PretrainedT5):
        raise UserError(
            "text_encoder: this one is trained along with the refiner, so that its features change: leave it out; only "
            "those of a frozen one, such as umt5_xxl, can be computed ahead"
        )
    return instantiate(config.text_encoder)


def _text_facts(tokenizer: HBQTokenizer, datamodule: TextImageDataModule) -> dict[str, Any]:
    """What text refiners' tokens may be; what does not fit the strides is refused before anything is read."""
    if datamodule.pixels is not None and len(datamodule.budgets) != 1:
        raise UserError(
            f"{datamodule.key}.pixels={datamodule.pixels}: a sample is encoded in one size: give one budget, such as "
            f"{datamodule.key}.pixels={next(iter(datamodule.pixels))}, and another out=... for each"
        )
    ((_, shapes),) = datamodule.budgets
    sizes = [size for _, size in shapes]
    lengths = [1]
    if isinstance(datamodule, TextVideoDataModule):  # what a bucket is, any number of them are
        lengths += [1 + datamodule.bucket_frames, datamodule.max_frames]
    for frames, (height, width) in product(lengths, sizes):
        tokenizer.check_video((1, 3, frames, height, width))
    return {
        "sizes": [[height // tokenizer.stride, width // tokenizer.stride] for height, width in sizes],
        "latents": 1 + (lengths[-1] - 1) // tokenizer.temporal_stride,
        "captions": [name for name, _ in datamodule.captions.weights],
        "caption_prefix": datamodule.captions.prefix,
        "caption_suffix": datamodule.captions.suffix,
        "encoder": None,
    }


def _source(datamodule: ShardsDataModule) -> dict[str, Any] | None:
    """Where the pixels are, for scores of refiners that train from their tokens; None of clips without captions."""
    if isinstance(datamodule, VideoShardsDataModule):
        return None
    if isinstance(datamodule, TextImageDataModule):
        decoding = pixel_arguments(datamodule)
    else:
        decoding = {name: getattr(datamodule, name) for name in ("image_size", "center_crop")}
    return {
        "name": datamodule.name,
        "root": None if datamodule.root is None else str(datamodule.root.absolute()),
        "train": datamodule.patterns["train"],
        "val": datamodule.patterns["val"],
        **decoding,
    }


def _digest(datamodule: ShardsDataModule, urls: list[str]) -> str:
    """What tells one set of pixel shards from another: their hashes in the manifest, or else where they are."""
    known = {}
    if datamodule.manifest:
        shards = [shard for split in datamodule.manifest["splits"].values() for shard in split["shards"]]
        known = {str(datamodule.root / shard["name"]): shard["sha256"] for shard in shards}
    return hashlib.sha256("\n".join(known.get(url, url) for url in urls).encode()).hexdigest()[:16]
