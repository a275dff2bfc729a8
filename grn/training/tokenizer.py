"""LightningModule of the HBQ tokenizer: L1 + LPIPS + hinge GAN on reconstructions through the quantizer."""

import functools
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F

from grn.data.contract import check_batch
from grn.media.pixels import as_frames, from_uint8, to_uint8
from grn.metrics.reconstruction import ReconstructionScores
from grn.networks.discriminator import generator_loss, hinge_discriminator_loss
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError
from grn.runtime.flops import training_flop
from grn.runtime.trainer import is_logged
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


class TokenizerModule(LightningModule):
    """Autoencoder and, where `gan_weight` > 0, its discriminator.

    Optimized by hand, since there may be two optimizers; `global_step` counts the autoencoder's steps alone.

    Args:
        network: the tokenizer, trained.
        discriminator: float pixels [B, 3, T, H, W] in [-1, 1] -> logits; None where `gan_weight` is 0.
        perceptual: (reconstruction, pixels), both float [N, 3, H, W] in [-1, 1] -> scalar distance (LPIPS); None where
            `perceptual_weight` is 0.
        l1_weight, perceptual_weight, gan_weight: of the losses.
        gan_start: step from which on the discriminator is trained and counts.
        learning_rate, betas, weight_decay, lr_schedule, warmup_steps: AdamW, for both networks.
        gradient_clip: largest global gradient norm of each network; None does not clip.
    """

    def __init__(
        self,
        network: HBQTokenizer,
        discriminator: nn.Module | None = None,
        perceptual: nn.Module | None = None,
        *,
        l1_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        gan_weight: float = 0.3,
        gan_start: int = 0,
        learning_rate: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        lr_schedule: Curve = "constant",
        warmup_steps: int = 0,
        gradient_clip: float | None = 1.0,
    ):
        super().__init__()
        self.initial_averages: dict[str, dict[str, Tensor]] = {}  # as refiners have them
        self.automatic_optimization = False
        if gan_weight > 0 and discriminator is None:
            raise UserError(f"training.gan_weight={gan_weight} needs training.discriminator; 0 trains without")
        if perceptual_weight > 0 and perceptual is None:
            raise UserError(f"training.perceptual_weight={perceptual_weight} needs training.perceptual; 0: without")
        self.network = network
        self.discriminator = discriminator if gan_weight > 0 else None
        self.perceptual = perceptual if perceptual_weight > 0 else None
        if self.perceptual is not None:
            self.perceptual.requires_grad_(False).eval()
        self.l1_weight, self.perceptual_weight, self.gan_weight = l1_weight, perceptual_weight, gan_weight
        self.gan_start = gan_start
        check_adamw(learning_rate=learning_rate, betas=betas, weight_decay=weight_decay)
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.lr_schedule, self.warmup_steps, self.gradient_clip = lr_schedule, warmup_steps, gradient_clip
        self.finite_loss = FiniteLoss()
        self._is_batch_checked = False
        self.checkpoint_extras: dict[str, Any] = {}  # what else a checkpoint is of (grn.training.building)
        self._flop: dict[torch.Size, int] = {}

    def train(self, mode: bool = True) -> "TokenizerModule":
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()
        return self

    def setup(self, stage: str) -> None:
        if isinstance(self.trainer.strategy, DDPStrategy):
            # Images leave the temporal convolutions without a gradient, and each backward pass is of one network alone.
            self.trainer.strategy._ddp_kwargs["find_unused_parameters"] = True
            # Ranks may have fewer held-out batches than others. Batch norm's statistics, the discriminator's, are of
            # rank 0 all the same, and nobody reads them.
            self.trainer.strategy._ddp_kwargs["broadcast_buffers"] = False

    def flop_per_sample(self, batch: dict[str, Any]) -> int:
        """FLOP of training the autoencoder on one sample of such a batch, without those of the losses' networks."""
        shape = batch["pixels"].shape[1:]
        if shape not in self._flop:
            pixels = torch.empty(1, *shape, device="meta")
            self._flop[shape] = training_flop(self.network, lambda network: network(pixels)[0])
        return self._flop[shape]

    # --- the task ---------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        if not self._is_batch_checked:  # the first one: a data module may be anybody's
            check_batch(batch, num_labels=None)
            self._is_batch_checked = True

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pixels = from_uint8(batch["pixels"])
        discriminator = self.discriminator if self.global_step >= self.gan_start else None
        reconstruction, _ = self.network(pixels)
        losses = {"l1": self.l1_weight * F.l1_loss(reconstruction.float(), pixels)}
        if self.perceptual is not None:
            losses["lpips"] = self.perceptual_weight * self.perceptual(as_frames(reconstruction), as_frames(pixels))
        if discriminator is not None:
            discriminator.requires_grad_(False)  # the generator's loss trains the generator alone
            losses["gan"] = self.gan_weight * generator_loss(discriminator(reconstruction))
        loss = functools.reduce(torch.add, losses.values())
        self.finite_loss.watch(loss)
        self.manual_backward(loss)
        if discriminator is not None:
            discriminator.requires_grad_(True)
            judged = discriminator(pixels), discriminator(reconstruction.detach())
            discriminator_loss = hinge_discriminator_loss(*judged)
            self.finite_loss.watch(discriminator_loss)
            self.manual_backward(discriminator_loss)
            self.log("train/discriminator", discriminator_loss, sync_dist=True)

        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        for name, value in losses.items():
            self.log(f"train/{name}", value, sync_dist=True)
        if is_logged(self.trainer, self.global_step):
            self.finite_loss.check(self)
        self._step(discriminator)

    def _step(self, discriminator: nn.Module | None) -> None:
        optimizers: Any = self.optimizers()  # one, or of two networks two
        schedulers: Any = self.lr_schedulers()
        optimizer, scheduler = (optimizers[0], schedulers[0]) if self.discriminator else (optimizers, schedulers)
        self.log("train/grad_norm", clip_gradients(self.network.parameters(), self.gradient_clip))
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if discriminator is not None:
            clip_gradients(discriminator.parameters(), self.gradient_clip)
            bare = optimizers[1].optimizer  # Lightning's wrapper would count a second global step
            bare.step()
            bare.zero_grad()
            schedulers[1].step()

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [B, 3, T, H, W] -> uint8 reconstruction through the quantizer, same shape."""
        return to_uint8(self.network(from_uint8(pixels))[0])

    def on_validation_epoch_start(self) -> None:
        # One for each data set that is validated: of a mixture, the first is logged as `val/...` as if it were alone.
        others = list(getattr(getattr(self.trainer, "datamodule", None), "parts", ()))[1:]
        prefixes = ["", *(f"{name}/" for name in others)]
        self._scores = {prefix: ReconstructionScores(device=self.device) for prefix in prefixes}

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        scores = [*self._scores.values()][dataloader_idx]
        scores.update(as_frames(batch["pixels"]), as_frames(self.reconstruct(batch["pixels"])))

    def on_validation_epoch_end(self) -> None:
        for prefix, scores in self._scores.items():
            for name, value in scores.compute().items():
                self.log(f"val/{prefix}{name}", value, prog_bar=name == "psnr")

    # --- optimization -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> tuple[list, list]:
        networks = [self.network] + ([] if self.discriminator is None else [self.discriminator])
        optimizers = [
            adamw(network, learning_rate=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay)
            for network in networks
        ]
        schedule = {
            "name": self.lr_schedule,
            "warmup_steps": self.warmup_steps,
            "total_steps": planned_steps(self.trainer),
        }
        return optimizers, [learning_rate_schedule(optimizer, **schedule) for optimizer in optimizers]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.finite_loss.check(self)
        checkpoint.update(self.checkpoint_extras)
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in checkpoint["state_dict"].items() if not name.startswith("perceptual.")
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("state_dict")
        if self.perceptual is not None and isinstance(state, dict):
            state |= self.perceptual.state_dict(prefix="perceptual.")
        check_weights(self.state_dict(), state, "the weights")
        check_count_of_states(checkpoint, 1 if self.discriminator is None else 2)
