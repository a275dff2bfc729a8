"""Training a refiner (DESIGN 1.3, 1.4): pixels -> tokens -> corrupted tokens -> the network tells the true ones."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from grn import hbq, philox, refinement
from grn.data.samples import key_id
from grn.errors import UserError
from grn.flops import forward_flop, training_flop
from grn.networks.tokenizer import HBQTokenizer
from grn.philox import Stream
from grn.pixels import from_uint8, to_uint8
from grn.sampler import Condition, Labels, Refined, Sampler, Start, Step, refine_queue
from grn.training.fsdp import FSDP, gather_weights, release_weights
from grn.training.optimization import FiniteLoss, adamw, clip_gradients, learning_rate_schedule

VALIDATION_SEED = 0x5EED  # the corruption of held-out samples is the same at every validation and in every run


class RefinerModule(LightningModule):
    """A class-conditional refiner over the tokens of a frozen tokenizer.

    Args:
        network: (tokens int64 [B, D, T, H, W], t float [B], labels int64 [B]) -> logits [B, classes, D, T, H, W], with
            attributes `channels` (D), `classes`, `num_labels` (also the null label) and `size` (tokens a side).
        tokenizer: frozen; gives the tokens and turns samples into pixels.
        sampler: how `generate` samples unless told otherwise.
        labeling: `ind` or `bit` (DESIGN 1.1).
        learning_rate, betas, weight_decay: AdamW.
        lr_schedule, warmup_steps: `learning_rate_schedule`.
        gradient_clip: largest global gradient norm; None does not clip.
        label_dropout: share of labels that are replaced by the null class.
        signal_ratio_mean, signal_ratio_std: of n in t = sigmoid(std*n + mean).
        seed: of every draw of training.

    Raises:
        UserError: a network that does not fit the tokenizer's tokens.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: HBQTokenizer,
        sampler: Sampler,
        *,
        labeling: hbq.Labeling = "ind",
        learning_rate: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
        gradient_clip: float | None = 0.1,
        label_dropout: float = 0.1,
        signal_ratio_mean: float = -0.8,
        signal_ratio_std: float = 0.8,
        seed: int = 0,
    ):
        super().__init__()
        channels, classes = hbq.num_tokens(tokenizer.latent_channels, tokenizer.rounds, labeling)
        if (network.channels, network.classes) != (channels, classes):
            raise UserError(
                f"model.channels={network.channels} model.classes={network.classes} do not fit the tokenizer: "
                f"training.labeling={labeling} of {tokenizer.latent_channels} channels and {tokenizer.rounds} rounds "
                f"needs model.channels={channels} model.classes={classes}"
            )
        self.network = network
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.sampler = sampler
        self.labeling = labeling
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.lr_schedule, self.warmup_steps, self.gradient_clip = lr_schedule, warmup_steps, gradient_clip
        self.label_dropout = label_dropout
        self.signal_ratio_mean, self.signal_ratio_std = signal_ratio_mean, signal_ratio_std
        self.seed = seed
        self.finite_loss = FiniteLoss()
        self.checkpoint_extras: dict[str, Any] = {}  # what else makes a checkpoint self-contained (grn.modules)
        self.provenance: dict[str, dict[str, Any]] = {}  # of its parts' weights, for exports of it (grn.modules)
        self.initial_weights: dict[str, Tensor] | None = None  # for `configure_model` to shard
        self.initial_averages: dict[str, dict[str, Tensor]] = {}  # decay -> state, for EMAs that start elsewhere
        self._accuracy: tuple[Tensor, Tensor] | None = None
        self._network_flop: int | None = None
        self._encoding_flop: dict[torch.Size, int] = {}

    @property
    def num_labels(self) -> int:
        """Among how many conditions samples are asked for, by number."""
        return self.network.num_labels

    @property
    def token_shape(self) -> tuple[int, int, int, int]:
        """(D, T, H, W) of one sample."""
        return self.network.channels, 1, self.network.size, self.network.size

    def train(self, mode: bool = True) -> "RefinerModule":
        super().train(mode)
        self.tokenizer.eval()
        return self

    def setup(self, stage: str) -> None:
        if stage == "fit":  # before a strategy shards the network
            tokens = torch.zeros(1, *self.token_shape, dtype=torch.long, device="meta")
            t, labels = torch.zeros(1, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
            self._network_flop = training_flop(self.network, lambda network: network(tokens, t, labels))

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FSDP):
            self.trainer.strategy.shard(self.network, self.initial_weights, seed=self.seed)
            self.initial_weights = None

    def flop_per_sample(self, batch: dict[str, Any]) -> int:
        """FLOP of training on one sample of such a batch: the network's, and the tokenizer's where it gets pixels."""
        if "bits" in batch:
            return self._network_flop
        shape = batch["pixels"].shape[1:]
        if shape not in self._encoding_flop:
            pixels = torch.empty(1, *shape, device="meta")
            self._encoding_flop[shape] = forward_flop(self.tokenizer, lambda tokenizer: tokenizer.encode(pixels))
        return self._network_flop + self._encoding_flop[shape]

    # --- the task ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def tokenize(self, batch: dict[str, Any]) -> Tensor:
        """A batch's `pixels`, uint8 [B, 3, T, H, W], or its packed `bits` -> int64 tokens [B, D, T', h, w].

        Pixels are encoded in the tokenizer's own precision, whatever the trainer's: tokens are what is learnt.
        """
        if "bits" in batch:
            return hbq.unpack(batch["bits"], self.tokenizer.latent_channels, self.tokenizer.rounds, self.labeling)
        with torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.tokenize(from_uint8(batch["pixels"]), self.labeling)

    def predict_corrupted(
        self, tokens: Tensor, labels: Tensor, *, seed: int, ids: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Corrupts true tokens and predicts them: (t [B], logits); all draws are functions of (seed, ids, step)."""
        t = refinement.signal_ratio(seed, ids, step, mean=self.signal_ratio_mean, std=self.signal_ratio_std)
        noisy = refinement.corrupt(tokens, t, self.network.classes, seed=seed, ids=ids, step=step)
        return t, self.network(noisy, t, labels)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        tokens, labels = self.tokenize(batch), batch["label"]
        ids = self._positions(batch_idx, len(labels))
        dropped = philox.uniform(self.seed, Stream.CONDITION_DROPOUT, ids, self.global_step) < self.label_dropout
        labels = torch.where(dropped, self.network.num_labels, labels)
        t, logits = self.predict_corrupted(tokens, labels, seed=self.seed, ids=ids, step=self.global_step)
        loss = refinement.token_loss(logits, tokens)
        self.finite_loss.watch(loss)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        self._log_accuracy(refinement.token_accuracy(logits.detach(), tokens), t)
        return loss

    def _positions(self, batch_idx: int, count: int) -> Tensor:
        """int64 [count]: where this rank's samples stand in the step's global batch (`grn.data.endless`)."""
        ranks = self.trainer.world_size
        accumulated = batch_idx % self.trainer.accumulate_grad_batches * ranks * count
        return accumulated + self.global_rank + ranks * torch.arange(count, device=self.device)

    def _log_accuracy(self, accuracy: Tensor, t: Tensor) -> None:
        """Sums over the steps between two logged ones, so that every bin of t has something to show."""
        sums, counts = refinement.bin_by_signal_ratio(accuracy, t)
        if self._accuracy is not None:
            sums, counts = sums + self._accuracy[0], counts + self._accuracy[1]
        self._accuracy = sums, counts
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.finite_loss.check(self)
            sums, counts = self.trainer.strategy.reduce(torch.stack([sums, counts]), reduce_op="sum")
            curves = {"train/accuracy/mean": (sums.sum() / counts.sum()).item()}
            for i, (total, count) in enumerate(zip(sums.tolist(), counts.tolist())):
                if count:
                    curves[f"train/accuracy/t_{i / refinement.ACCURACY_BINS:.1f}"] = total / count
            for logger in self.loggers:  # self.log would repeat the last value of a bin that nothing fell into
                logger.log_metrics(curves, self.global_step)
            self._accuracy = None

    def on_validation_start(self) -> None:
        gather_weights(self.network)  # of which callbacks have put the average in place

    def on_validation_epoch_end(self) -> None:
        release_weights(self.network)  # before they take it out again

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        tokens, labels = self.tokenize(batch), batch["label"]
        ids = self._validation_ids(batch)
        _, logits = self.predict_corrupted(tokens, labels, seed=VALIDATION_SEED, ids=ids, step=0)
        # A float: of whole numbers, Lightning's mean over ranks loses the fraction.
        on_epoch = {"batch_size": float(len(labels)), "sync_dist": True}
        self.log("val/loss", refinement.token_loss(logits, tokens), prog_bar=True, **on_epoch)
        self.log("val/accuracy", refinement.token_accuracy(logits, tokens).mean(), **on_epoch)

    def _validation_ids(self, batch: dict[str, Any]) -> Tensor:
        """By their keys, so that a sample is corrupted alike on whatever rank and in whatever batch it is."""
        return torch.tensor([key_id(key) % 2**32 for key in batch["key"]], device=self.device)

    # --- optimisation -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = adamw(
            self.network, learning_rate=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
        scheduler = learning_rate_schedule(
            optimizer,
            name=self.lr_schedule,
            warmup_steps=self.warmup_steps,
            total_steps=self.trainer.max_steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("train/grad_norm", clip_gradients(self.network.parameters(), self.gradient_clip))
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    # --- sampling ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        labels: Tensor,
        *,
        seed: int,
        ids: Tensor,
        sampler: Sampler | None = None,
        callback: Callable[[Step], None] | None = None,
    ) -> Refined:
        """Samples tokens of the classes `labels` (int64 [B], on this module's device) in one batch."""
        batches = self.generate_queue(
            labels, seed=seed, ids=ids, batch_size=len(labels), sampler=sampler, callback=callback
        )
        ((_, refined),) = batches
        return refined

    def generate_queue(
        self,
        labels: Tensor,
        *,
        seed: int,
        ids: Tensor,
        batch_size: int,
        sampler: Sampler | None = None,
        start: Start | None = None,
        callback: Callable[[Step], None] | None = None,
    ) -> Iterator[tuple[Tensor, Refined]]:
        """Samples tokens of the classes `labels` (int64 [N], on this module's device); see `grn.sampler.refine_queue`.

        Of a compiled network the rows of a call are bucketed.
        """

        def predict(tokens: Tensor, t: Tensor, condition: Condition) -> Tensor:
            with self._precision():
                return self.predict(tokens, t, condition)

        with self._precision():
            condition = self.condition(labels)
        return refine_queue(
            predict,
            condition,
            sampler or self.sampler,
            shape=self.token_shape,
            classes=self.network.classes,
            seed=seed,
            ids=ids,
            batch_size=batch_size,
            start=start,
            # nn.Module.compile() leaves no public trace.
            bucketed=any(module._compiled_call_impl is not None for module in self.network.modules()),
            callback=callback,
        )

    def _precision(self) -> AbstractContextManager:
        """The trainer's: callbacks ask for samples outside of Lightning's steps."""
        return self.trainer.precision_plugin.forward_context() if self._trainer else nullcontext()

    def condition(self, labels: Tensor) -> Condition:
        """What samples of the classes `labels`, int64 [B], are conditioned on."""
        return Labels(labels, self.network.num_labels)

    def predict(self, tokens: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `grn.sampler.refine` asks for it."""
        return self.network(tokens, t, condition.index)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """int64 tokens [B, D, T', h, w] -> uint8 pixels [B, 3, T, H, W]."""
        return to_uint8(self.tokenizer.detokenize(tokens, self.labeling))

    def decode_stream(self, tokens: Tensor) -> Iterator[Tensor]:
        """The frames of `decode` one by one, uint8 [B, 3, H, W], in memory that does not grow with the clip."""
        latents = hbq.dequantize(tokens, self.tokenizer.rounds, self.labeling).unbind(2)
        return map(to_uint8, self.tokenizer.decode_stream(latents))

    # --- checkpoints: what is frozen is recorded beside the weights, not among them ----------------------------------

    @property
    def frozen(self) -> dict[str, nn.Module]:
        """The parts that checkpoints leave out, by name."""
        return {"tokenizer": self.tokenizer}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.finite_loss.check(self)
        checkpoint.update(self.checkpoint_extras)
        frozen = self.frozen
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in checkpoint["state_dict"].items() if name.partition(".")[0] not in frozen
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, part in self.frozen.items():
            checkpoint["state_dict"] |= part.state_dict(prefix=f"{name}.")
