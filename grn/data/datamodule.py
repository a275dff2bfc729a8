"""The base of all data modules of webdataset shards: their names, loaders and checks."""

import functools
import os
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from grn.data.manifest import how_to_make, read_manifest
from grn.data.prepare.shards import shard_paths
from grn.data.samples import collate
from grn.data.stream.endless import GlobalBatches, ResumableLoader
from grn.data.stream.streaming import ShardDataset, ShardStream, check_first, local_shards, resolve_urls
from grn.data.stream.survey import why_none
from grn.data.stream.workers import outlive_sigterm
from grn.runtime.errors import UserError, check_count
from grn.runtime.ranks import rank_and_world_size
from grn.runtime.trainer import Trainer

SPLITS = ("train", "val")


class ShardsDataModule(LightningDataModule):
    """Streams the samples of webdataset shards; a subclass says how one is decoded.

    Batches are what `grn.data.samples.collate` makes of the decoder's samples. Unusable samples are skipped and counted
    (`skipped`).

    Args:
        name: of the data, as in `data=NAME`; for messages.
        batch_size: samples a step over all ranks; each rank gets batch_size / ranks.
        root: folder of the shards, with the manifest that `grn.prepare` writes, or `<split>-*.tar` without one.
        train: shards for training: paths, urls, braces, wildcards; None: those in `root`.
        val: shards held out; None: those in `root`.
        num_labels: labels lie in [0, num_labels); None: no labels.
        train_samples: size of the training split, where there is no manifest to tell it.
        eval_batch_size: samples a batch and rank in evaluation; None: as in training.
        num_workers: worker processes a rank.
        rank_streams, worker_streams: streams of training samples, in columns that the ranks share out and in rows that
            the workers do (`GlobalBatches`); the order is a function of them and of the seed, and each needs a shard.
        shuffle_buffer: undecoded samples that each stream holds to shuffle.
        seed: of the order, and of what the decoder draws.
        key: where the config has all this, for messages.

    Raises:
        UserError: `batch_size` or the streams do not divide, shards are missing, empty or too few, or the manifest
            contradicts `num_labels`; from the methods.
    """

    name: str
    trainer: Trainer | None

    def __init__(
        self,
        *,
        name: str,
        batch_size: int,
        root: str | os.PathLike | None = None,
        train: str | Sequence[str] | None = None,
        val: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        train_samples: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        rank_streams: int = 1,
        worker_streams: int = 1,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        key: str = "data",
    ):
        super().__init__()
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        for name_, value in (sizes | {"rank_streams": rank_streams, "worker_streams": worker_streams}).items():
            if name_ != "eval_batch_size" or value is not None:
                check_count(f"{key}.{name_}", value)
        check_count(f"{key}.num_workers", num_workers, least=0)
        check_count(f"{key}.shuffle_buffer", shuffle_buffer, least=0)
        self.key = key
        self.name = name
        self.batch_size = batch_size
        self.root = None if root is None else Path(root).expanduser()
        # Plain, as they may come from Hydra: token shards remember them.
        self.patterns = {
            split: patterns if patterns is None or isinstance(patterns, str) else list(patterns)
            for split, patterns in {"train": train, "val": val}.items()
        }
        self.num_labels = num_labels
        self.train_samples = train_samples
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.rank_streams, self.worker_streams = rank_streams, worker_streams
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self._datasets: dict[str, ShardDataset] = {}

    @abstractmethod
    def decoder(self, *, training: bool) -> Callable[[dict, int], dict]:
        """(raw sample, number of the pass) -> sample, for `ShardDataset`; with random augmentation where `training`."""

    collate = staticmethod(collate)  # samples -> batch

    def setup(self, stage: str | None = None) -> None:
        """Checks that the shards are there, and that a run that validates has something to validate on, before any
        worker starts."""
        for split in SPLITS if stage in (None, "fit") else SPLITS[1:]:
            check_first(self.urls(split), key=f"{self.key}.{split}")
        _ = self._global_batches() if stage in (None, "fit") else self.rank_batch_size
        if self.trainer is not None and stage == "fit" and self.trainer.limit_val_batches:
            self.check_val()

    @functools.cached_property
    def manifest(self) -> dict | None:
        """Of `root`; None where there is none."""
        manifest = None if self.root is None else read_manifest(self.root)
        if manifest and self.num_labels is not None and manifest["num_labels"] not in (None, self.num_labels):
            raise UserError(
                f"{self.key}.num_labels={self.num_labels}, but {self.root} has {manifest['num_labels']} labels"
            )
        return manifest

    @property
    def label_names(self) -> list[str] | None:
        """One for each label, where the manifest tells them."""
        return self.manifest["label_names"] if self.manifest else None

    @property
    def num_train_samples(self) -> int:
        """Of the manifest, else the key `train_samples`.

        Raises:
            UserError: neither is there.
        """
        if self.patterns["train"] is None and self.manifest and "train" in self.manifest["splits"]:
            return self.manifest["splits"]["train"]["samples"]
        if self.train_samples is None:
            raise UserError(f"how many samples {self.name} has is not known: give {self.key}.train_samples")
        return self.train_samples

    @property
    def rank_batch_size(self) -> int:
        """Samples a step on each rank."""
        _, world_size = rank_and_world_size()
        if self.batch_size % world_size:
            raise UserError(f"{self.key}.batch_size={self.batch_size} does not divide over {world_size} ranks")
        return self.batch_size // world_size

    def urls(self, split: str) -> list[str]:
        """The shards of "train" or "val"."""
        if split not in SPLITS:
            raise UserError(f"there is no split {split!r}, only {' and '.join(SPLITS)}")
        key = f"{self.key}.{split}"
        remedy = how_to_make(self.name, key)
        if (patterns := self.patterns[split]) is not None:
            return resolve_urls(patterns, key=key, remedy=remedy)
        if self.root is None:
            raise UserError(f"{key} and {self.key}.root are both null: give one of them")
        if self.manifest:
            return shard_paths(self.root, self.manifest, split)
        return local_shards(self.root / f"{split}-*.tar", key=key, remedy=remedy)

    def train_dataloader(self) -> ResumableLoader:
        """Endless and shuffled, the same on any number of ranks and workers; as long as the trainer's run, if any."""
        # Each worker has its own batches and they have no end, so their length is exact.
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
        self._datasets["train"] = batches = self._global_batches()
        return ResumableLoader(batches, **self._loader_arguments())

    def val_dataloader(self) -> DataLoader:
        """One pass over the held-out split, in its own order, each sample once over all ranks."""
        return self._evaluation_loader("val", self._stream("val"), persistent_workers=self.num_workers > 0)

    def split_dataloader(self, split: str, *, share: bool = False) -> DataLoader:
        """One pass over all of "train" or "val" for scores: in its own order, unflipped, the same on every rank.

        Args:
            share: this rank's share alone, so that each sample comes once over all ranks.
        """
        return self._evaluation_loader(f"all of {split}", self._stream(split, split_by_rank=share))

    def check_val(self) -> None:
        """Raises:
        UserError: no held-out sample can be used; the line says why, and what there is.
        """
        stream = ShardStream(self.urls("val"), self.decoder(training=False), split_by_rank=False)
        samples = iter(stream)
        if next(samples, None) is None:
            raise UserError(f"{self.key}.val: the held-out shards have no usable sample {why_none(stream, self.key)}")
        samples.close()

    def stop_loading(self, number: int) -> None:
        """Ends the training batches soon, by `SIGTERMException(number)`, also where none can be made."""
        if (batches := self._datasets.get("train")) is not None:
            batches.stop(number)

    def skipped(self) -> dict[str, int]:
        """Reason -> samples skipped so far on this rank, by the newest loader of each kind; {} where all were good."""
        return dict(sum((Counter(dataset.skipped()) for dataset in self._datasets.values()), Counter()))

    def noted(self) -> dict[str, int]:
        """Note -> samples used all the same so far, as `skipped` counts."""
        return dict(sum((Counter(dataset.noted()) for dataset in self._datasets.values()), Counter()))

    def _global_batches(self) -> GlobalBatches:
        return GlobalBatches(
            self.urls("train"), self.decoder(training=True), collate=self.collate, **self._order_arguments()
        )

    def _order_arguments(self) -> dict[str, Any]:
        _ = self.rank_batch_size
        return {
            "batch_size": self.batch_size,
            "rank_streams": self.rank_streams,
            "worker_streams": self.worker_streams,
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
            "length": self._train_length(),
            "repeated": repeated_batches(self.trainer),
            "num_workers": self.num_workers,
            "key": self.key,
        }

    def _stream(self, split: str, **arguments) -> ShardStream:
        decoder = self.decoder(training=False)
        return ShardStream(self.urls(split), decoder, num_workers=self.num_workers, **arguments)

    def _evaluation_loader(self, kind: str, stream: ShardStream, **arguments) -> DataLoader:
        self._datasets[kind] = stream
        return DataLoader(
            stream,
            batch_size=self.eval_batch_size or self.rank_batch_size,
            num_workers=self.num_workers,
            collate_fn=self.collate,
            **self._loader_arguments(),
            **arguments,
        )

    def _loader_arguments(self) -> dict:
        return {
            "worker_init_fn": outlive_sigterm,
            "pin_memory": torch.cuda.is_available(),
            # A loader draws a seed for its workers, which must not shift the global generator.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _train_length(self) -> int | None:
        """Batches in the trainer's run (without a number of steps: in one pass over the data).

        Lightning fetches a batch ahead where a loader has no length, and its state would run ahead by as much.
        """
        if self.trainer is None:
            return None
        if self.trainer.max_steps and self.trainer.max_steps > 0:
            return self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return self.num_train_samples // self.batch_size


def repeated_batches(trainer: Trainer | None) -> int | None:
    """How many training batches the run keeps to, by the trainer's `overfit_batches`; None: all there are.

    Raises:
        UserError: a share of them, which a stream without an end does not have.
    """
    wanted = 0 if trainer is None else trainer.overfit_batches
    if type(wanted) is float and wanted > 0:
        raise UserError(f"trainer.overfit_batches={wanted}: give a whole number of batches, the data are a stream")
    return int(wanted) or None
