"""LightningModule of class refiners: pixels -> tokens -> corrupted tokens -> predictions."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from grn.data.contract import check_batch
from grn.data.samples import key_id
from grn.data.tokens import unpack_bits
from grn.method import corruption, philox
from grn.method.philox import Stream
from grn.metrics.ranks import Totals
from grn.runtime.errors import UserError, check_count
from grn.runtime.flops import forward_flop, training_flop
from grn.runtime.trainer import is_logged
from grn.sampling.bundle import RefinerBundle
from grn.training.fsdp import FSDP, gather_weights, release_weights
from grn.training.optimization import (
    Curve,
    FiniteLoss,
    adamw,
    check_adamw,
    clip_gradients,
    learning_rate_schedule,
    planned_steps,
)
from grn.training.restoring import check_count_of_states, check_weights

ACCURACY_BINS = 10
SignalRatioInput = Literal["nominal", "realized"]
VALIDATION_SEED = 0x5EED  # the corruption of held-out samples is the same at every validation and in every run


class RefinerModule(LightningModule):
    """A class-conditional refiner over the tokens of a frozen tokenizer.

    Args:
        bundle: the network that is trained, the tokenizer, which is frozen, and how pictures and scores of the run are
            sampled; it samples in the trainer's precision from then on.
        learning_rate, betas, weight_decay: AdamW.
        lr_schedule, warmup_steps: `learning_rate_schedule`.
        gradient_clip: largest global gradient norm; None does not clip.
        label_dropout: share of labels that are replaced by the null class.
        signal_ratio_mean, signal_ratio_std, signal_ratio_shift: of t = shift(sigmoid(std*n + mean), alpha); 1 does not
            shift, above 1 there is more noise.
        signal_ratio_input: what the network is told: `nominal`, the probability t with which tokens were kept, or
            `realized`, the share of them that was.
        loss_chunk: of how many positions training has logits at a time, computed again for the backward pass; None: of
            all, which are kept. The loss is the same to rounding. The network takes `targets` and `loss_chunk` then, as
            `ClassRefiner` does.
        seed: of every draw of training.

    Raises:
        UserError: values of other kinds than these, or a network that has no loss in chunks.
    """

    def __init__(
        self,
        bundle: RefinerBundle,
        *,
        learning_rate: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        lr_schedule: Curve = "constant",
        warmup_steps: int = 0,
        gradient_clip: float | None = 0.1,
        label_dropout: float = 0.1,
        signal_ratio_mean: float = -0.8,
        signal_ratio_std: float = 0.8,
        signal_ratio_shift: float = 1.0,
        signal_ratio_input: SignalRatioInput = "nominal",
        loss_chunk: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.bundle = bundle
        bundle.precision = self._precision
        if type(signal_ratio_shift) not in (int, float) or not 0 < signal_ratio_shift < math.inf:
            raise UserError(
                f"training.signal_ratio_shift={signal_ratio_shift} must be a positive number; 1 shifts nothing"
            )
        if signal_ratio_input not in get_args(SignalRatioInput):
            known = ", ".join(get_args(SignalRatioInput))
            raise UserError(f"training.signal_ratio_input={signal_ratio_input}: choose among {known}")
        if loss_chunk is not None:
            check_count("training.loss_chunk", loss_chunk)
            if not getattr(bundle.network, "scores_targets", False):
                raise UserError(
                    f"training.loss_chunk={loss_chunk}: {type(bundle.network).__name__} has no loss in chunks; "
                    "training.loss_chunk=null has it of all positions at once"
                )
        self._is_batch_checked = False
        self.network = bundle.network
        self.tokenizer = bundle.tokenizer.eval().requires_grad_(False)
        check_adamw(learning_rate=learning_rate, betas=betas, weight_decay=weight_decay)
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.lr_schedule: Curve = lr_schedule
        self.warmup_steps, self.gradient_clip = warmup_steps, gradient_clip
        self.label_dropout = label_dropout
        self.signal_ratio_mean, self.signal_ratio_std = signal_ratio_mean, signal_ratio_std
        self.signal_ratio_shift, self.signal_ratio_input = signal_ratio_shift, signal_ratio_input
        self.loss_chunk = loss_chunk
        self.seed = seed
        self.finite_loss = FiniteLoss()
        self.checkpoint_extras: dict[str, Any] = {}  # what else a checkpoint is of (grn.training.building)
        self.initial_weights: dict[str, Tensor] | None = None  # for `configure_model` to shard
        self.initial_averages: dict[str, dict[str, Tensor]] = {}  # decay -> state, for EMAs that start elsewhere
        self._accuracy: tuple[Tensor, Tensor] | None = None
        self._network_flop = 0
        self._encoding_flop: dict[torch.Size, int] = {}

    def train(self, mode: bool = True) -> "RefinerModule":
        super().train(mode)
        self.tokenizer.eval()
        return self

    def setup(self, stage: str) -> None:
        if stage == "fit":  # before a strategy shards the network
            tokens = torch.zeros(1, *self.bundle.token_shape, dtype=torch.long, device="meta")
            t, labels = torch.zeros(1, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
            self._network_flop = training_flop(self.network, lambda network: network(tokens, t, labels))

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, DDPStrategy):
            # Else ranks with fewer held-out batches than others would miss the sending of these fixed tables.
            self.trainer.strategy._ddp_kwargs["broadcast_buffers"] = False
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

        Pixels are encoded in the tokenizer's own precision, whatever the trainer's: tokens are what is learned.
        """
        if "bits" in batch:
            return unpack_bits(
                batch["bits"], self.tokenizer.latent_channels, self.tokenizer.rounds, self.bundle.labeling
            )
        return self.bundle.tokenize(batch["pixels"])

    def predict_corrupted(
        self, tokens: Tensor, labels: Tensor, *, seed: int, ids: Tensor, step: int, **options: Any
    ) -> tuple[Tensor, Any]:
        """Corrupts true tokens and predicts them: (t [B] as the network is told, logits); all draws are functions of
        (seed, ids, step). `options` go to the network, which gives what they ask for in place of logits."""
        t = self.draw_signal_ratio(seed, ids, step)
        noisy, t = self.corrupt(tokens, t, seed=seed, ids=ids, step=step)
        return t, self.network(noisy, t, labels, **options)

    def draw_signal_ratio(self, seed: int, ids: Tensor, step: int) -> Tensor:
        """The probability float32 [B] with which each sample's tokens are kept."""
        return corruption.signal_ratio(
            seed,
            ids,
            step,
            mean=self.signal_ratio_mean,
            std=self.signal_ratio_std,
            alpha=self.signal_ratio_shift,
        )

    def corrupt(self, tokens: Tensor, t: Tensor, *, seed: int, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(Corrupted tokens, the signal ratios float32 [B] that the network is told); see `method.corruption`."""
        draws = {"seed": seed, "ids": ids, "step": step}
        noisy = corruption.corrupt(tokens, t, self.network.classes, **draws)
        if self.signal_ratio_input == "realized":
            t = corruption.realized_ratio(tuple(tokens.shape[1:]), t, **draws)
        return noisy, t

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        if not self._is_batch_checked:  # the first one: a data module may be anybody's
            check_batch(batch, num_labels=self.network.num_labels)
            self._is_batch_checked = True

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        tokens, labels = self.tokenize(batch), batch["label"]
        ids = self._positions(batch_idx, len(labels))
        dropped = philox.uniform(self.seed, Stream.CONDITION_DROPOUT, ids, self.global_step) < self.label_dropout
        labels = torch.where(dropped, self.network.num_labels, labels)
        draws = {"seed": self.seed, "ids": ids, "step": self.global_step}
        if self.loss_chunk is None:
            t, logits = self.predict_corrupted(tokens, labels, **draws)
            loss, accuracy = corruption.token_loss(logits, tokens), corruption.token_accuracy(logits.detach(), tokens)
        else:
            t, (losses, accuracy) = self.predict_corrupted(
                tokens, labels, **draws, targets=tokens, loss_chunk=self.loss_chunk
            )
            loss = losses.mean()
        self.finite_loss.watch(loss)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        self._add_accuracy(accuracy, t)
        return loss

    def _positions(self, batch_idx: int, count: int) -> Tensor:
        """int64 [count]: where this rank's samples stand in the step's global batch (`grn.data.stream.endless`)."""
        ranks = self.trainer.world_size
        accumulated = batch_idx % self.trainer.accumulate_grad_batches * ranks * count
        return accumulated + self.global_rank + ranks * torch.arange(count, device=self.device)

    def _add_accuracy(self, accuracy: Tensor, t: Tensor) -> None:
        """Sums over the steps between two logged ones, so that every bin of t has something to show."""
        sums, counts = bin_by_signal_ratio(accuracy, t)
        if self._accuracy is not None:
            sums, counts = sums + self._accuracy[0], counts + self._accuracy[1]
        self._accuracy = sums, counts

    def _log_curves(self) -> None:
        if is_logged(self.trainer, self.global_step):
            self.finite_loss.check(self)
            assert self._accuracy is not None  # after a training step
            sums, counts = self.trainer.strategy.reduce(torch.stack(self._accuracy), reduce_op="sum")
            curves = {"train/accuracy/mean": (sums.sum() / counts.sum()).item()}
            for i, (total, count) in enumerate(zip(sums.tolist(), counts.tolist())):
                if count:
                    curves[f"train/accuracy/t_{i / ACCURACY_BINS:.1f}"] = total / count
            for logger in self.loggers:  # self.log would repeat the last value of a bin that nothing fell into
                logger.log_metrics(curves, self.global_step)
            self._accuracy = None

    def on_validation_start(self) -> None:
        gather_weights(self.network)  # of which callbacks have put the average in place

    def on_validation_epoch_start(self) -> None:
        self._validated = Totals(3, dtype=torch.float32).to(self.device)  # samples, losses, accuracies

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        tokens, labels = self.tokenize(batch), batch["label"]
        ids = self._validation_ids(batch, batch_idx)
        _, logits = self.predict_corrupted(tokens, labels, seed=VALIDATION_SEED, ids=ids, step=0)
        accuracy = corruption.token_accuracy(logits, tokens).mean()
        self._add_validated(len(labels), corruption.token_loss(logits, tokens), accuracy)

    def _add_validated(self, samples: int, loss: Tensor, accuracy: Tensor) -> None:
        """Counts a batch, of which `loss` and `accuracy` are means over its samples."""
        sums = samples * torch.stack([loss.float(), accuracy.float()])
        self._validated.update(torch.cat([sums.new_tensor([samples]), sums]))

    def on_validation_epoch_end(self) -> None:
        release_weights(self.network)  # before they take it out again
        samples, loss, accuracy = self._validated.compute()  # on every rank, whether it has held-out samples or not
        if not samples:
            raise UserError("validation: no held-out sample could be used: check the data.val shards")
        self.log("val/loss", loss / samples, prog_bar=True)
        self.log("val/accuracy", accuracy / samples)

    def _validation_ids(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """By their keys, so that a sample is corrupted alike on whatever rank and in whatever batch it is; without, by
        their places."""
        if "key" not in batch:
            count = len(batch["label"])
            return (
                batch_idx * count + torch.arange(count, device=self.device)
            ) * self.trainer.world_size + self.global_rank
        return torch.tensor([key_id(key) % 2**32 for key in batch["key"]], device=self.device)

    # --- optimization -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = adamw(
            self.network, learning_rate=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
        scheduler = learning_rate_schedule(
            optimizer,
            name=self.lr_schedule,
            warmup_steps=self.warmup_steps,
            total_steps=planned_steps(self.trainer),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("train/grad_norm", clip_gradients(self.network.parameters(), self.gradient_clip))
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        self._log_curves()

    def _precision(self) -> AbstractContextManager:
        """The trainer's: callbacks ask for samples outside of Lightning's steps."""
        return self.trainer.precision_plugin.forward_context() if self._trainer else nullcontext()

    # --- checkpoints: what is frozen is recorded beside the weights, not among them ----------------------------------

    @property
    def frozen(self) -> dict[str, nn.Module]:
        """The parts that checkpoints leave out, by name."""
        return {name: part for name, part in self.bundle.parts.items() if name != "network"}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.finite_loss.check(self)
        checkpoint.update(self.checkpoint_extras)
        frozen = self.frozen
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in checkpoint["state_dict"].items() if name.partition(".")[0] not in frozen
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("state_dict")
        if isinstance(state, dict):
            for name, part in self.frozen.items():
                state |= part.state_dict(prefix=f"{name}.")
        check_weights(self.state_dict(), state, "the weights")
        check_count_of_states(checkpoint, 1)


def bin_by_signal_ratio(values: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Sums per-sample values [B] into ten equal bins of t: (sums [10], counts [10]), both float32, no host sync."""
    index = (t * ACCURACY_BINS).long().clamp_(0, ACCURACY_BINS - 1)
    zeros = values.new_zeros(ACCURACY_BINS)
    return zeros.index_add(0, index, values), zeros.index_add(0, index, torch.ones_like(values))
