"""HBQ, FSQ, BSQ at equal bits, and no quantizer at all, between the same encoder and decoder (README.md beside this).

    python experiments/quantizers/study.py [--seeds 1 2 3]

from where the data are (pip install -e '.[studies]'). What runs/quantizers holds is not trained again, so that several
of these, each with a part of the seeds, and then one of all write the table and the plot.
"""

import argparse
import logging
import math
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import grn.cli.entry  # noqa: F401  its resolvers
from grn.cli.entry import CONF
from grn.evaluation.scoring import build_scores, real_splits, score_reconstructions
from grn.media.pixels import from_uint8
from grn.method import hbq
from grn.networks.tokenizer import PATCH, HBQTokenizer
from grn.runtime.files import write_json
from grn.studies.plots import error_bars
from grn.studies.results import Column, markdown, over_seeds, read_points, write_csv
from grn.studies.study import folder_of, missing, run_study
from grn.training.optimization import adamw, learning_rate_schedule

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
OUT = folder_of("quantizers")
CHANNELS = 4  # of all but BSQ, which has a channel for each bit
NAMES = {"continuous": "continuous", "hbq": "HBQ", "fsq": "FSQ", "bsq": "BSQ"}
SETTINGS = [("continuous", 0), *((kind, CHANNELS * rounds) for rounds in (1, 2, 4) for kind in ("hbq", "fsq", "bsq"))]
METRICS = ("psnr", "ssim", "rfid", "bit_entropy", "code_entropy")


def fsq_index(z: Tensor, levels: int) -> Tensor:
    """Float z in [-1, 1] -> int64 of its shape: the nearest of `levels` points, evenly from -1 to 1.

    For even numbers the paper shifts the tanh, so that one point is at 0; of two levels that would saturate.
    """
    return ((z.detach() + 1) / 2 * (levels - 1)).round().long()


class Autoencoder(HBQTokenizer):
    """The encoder and decoder of a tokenizer of these sizes, around a bottleneck of NAMES with `bits` a position."""

    def __init__(self, kind: str, bits: int, **sizes: Any):
        channels, rounds = (bits, 1) if kind == "bsq" else (CHANNELS, max(1, bits // CHANNELS))
        super().__init__(**sizes | {"latent_channels": channels, "rounds": rounds})
        self.kind, self.bits = kind, bits

    def forward(self, video: Tensor, *, pad: bool = False) -> tuple[Tensor, Tensor]:
        features = self.features(video)
        return self.decode(self.quantize(features)), features

    def features(self, video: Tensor) -> Tensor:
        """Float video [B, 3, 1, H, W] in [-1, 1] -> what is quantized: float32 [B, channels, 1, h, w] in [-1, 1]."""
        if self.kind != "bsq":
            return self.encode(video)
        patches = rearrange(video, "b c t (h dh) (w dw) -> b (c dw dh) t h w", dh=PATCH, dw=PATCH)
        return F.normalize(self.encoder(patches.contiguous(memory_format=torch.channels_last_3d)).float(), dim=1)

    def quantize(self, z: Tensor) -> Tensor:
        """Features -> what the decoder gets, of the same shape; gradients pass straight through."""
        if self.kind == "hbq":
            return hbq.quantize(z, self.rounds)
        if self.kind == "fsq":
            levels = 2**self.rounds
            return 2 * fsq_index(z, levels) / (levels - 1) - 1 + (z - z.detach())
        if self.kind == "bsq":
            return torch.where(z > 0, 1.0, -1.0) / self.latent_channels**0.5 + (z - z.detach())
        return z

    def codes(self, z: Tensor) -> Tensor:
        """Features -> int64 [B, bits, 1, h, w] of 0 and 1."""
        if self.kind == "fsq":
            return hbq.index_to_bits(fsq_index(z, 2**self.rounds), self.rounds)
        return hbq.tokens(z, self.rounds, "bit")  # of one round, the signs


def train(kind: str, bits: int, seed: int, pixels: Tensor, config: DictConfig) -> Autoencoder:
    """The average of the weights, trained as the experiment says on pixels uint8 [N, 3, 1, H, W]; all bottlenecks see
    the same batches in one order."""
    torch.manual_seed(seed)
    network = Autoencoder(kind, bits, **{k: v for k, v in config.model.items() if k not in ("_target_", "weights")})
    told, steps, size = config.training, config.trainer.max_steps, config.data.batch_size
    settings = {"learning_rate": told.learning_rate, "betas": told.betas, "weight_decay": told.weight_decay}
    optimizer = adamw(network, **settings)
    rate = learning_rate_schedule(optimizer, name=told.lr_schedule, warmup_steps=told.warmup_steps, total_steps=steps)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.callbacks.ema.use))
    order = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.randperm(len(pixels), generator=order) for _ in range(steps * size // len(pixels) + 1)])
    for chosen in rows.split(size)[:steps]:
        batch = from_uint8(pixels[chosen])
        loss = F.l1_loss(network(batch)[0], batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), told.gradient_clip)
        optimizer.step()
        rate.step()
        average.update_parameters(network)
    return average.module.eval()


@torch.no_grad()
def entropies(network: Autoencoder, pixels: Tensor) -> dict[str, float]:
    """How evenly held-out uint8 pixels [N, 3, 1, H, W] use the codes, 1 being best.

    `bit_entropy`: in bits, the mean over the bits of a position; `code_entropy`: of all bits of a position at once, for
    each bit, where there are few enough codes to be counted (256).
    """
    if not network.bits:
        return {}
    codes = torch.cat([network.codes(network.features(from_uint8(part))) for part in pixels.split(100)])
    codes = codes.transpose(0, 1).flatten(1)  # [bits, positions]
    share = codes.double().mean(dim=1)
    told = {"bit_entropy": torch.special.entr(torch.stack([share, 1 - share])).sum(dim=0).mean().item() / math.log(2)}
    if network.bits <= 8:
        counts = torch.bincount(codes.T @ 2 ** torch.arange(network.bits), minlength=2**network.bits)
        told["code_entropy"] = torch.special.entr(counts / counts.sum()).sum().item() / math.log(2) / network.bits
    return told


def measure(seeds: list[int]) -> None:
    """Leaves `<bottleneck>-<bits>-<seed>.json` in OUT."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["+experiment=digits_tokenizer"])
    datamodule = instantiate(config.data)
    splits, device = real_splits(datamodule), torch.device("cpu")
    pixels = {name: torch.cat([batch["pixels"] for batch in read()]) for name, read in splits.items()}
    scores = build_scores(instantiate(config.scores), splits, device=device, cache_dir=OUT / "cache")

    def path_of(seed: int, kind: str, bits: int) -> Path:
        return OUT / f"{kind}-{bits}-{seed}.json"

    for (seed, kind, bits), path in missing([(seed, *setting) for seed in seeds for setting in SETTINGS], path_of):
        started = time.process_time()
        network = train(kind, bits, seed, pixels["train"], config)
        row = {"bottleneck": kind, "bits": bits, "seed": seed, "cpu_seconds": time.process_time() - started}
        row["parameters"] = sum(p.numel() for p in network.parameters())
        for score in scores.values():
            score.reset()
        found = score_reconstructions(network, scores, datamodule)
        found = {key: found[key] for key in ("psnr", "ssim", "rfid")} | entropies(network, pixels["val"])
        write_json(path, row | found)
        log.info("%s: %s", path.stem, {key: round(value, 3) for key, value in found.items()})


def tabulate() -> pd.DataFrame:
    """Writes results.csv and prints it as a table; a row a bottleneck and number of bits, over the seeds."""
    by, measures = ["bottleneck", "bits", "parameters"], [*METRICS, "cpu_seconds"]
    needed = (*measures[:3], "cpu_seconds", "parameters")  # no quantizer, no bits, no entropy of these
    points = read_points(OUT, ("bits", "bottleneck"), needed, order={"bottleneck": NAMES})
    points = points.reindex(columns=[*by, *measures])
    table = over_seeds(points, by, measures).drop(columns="cpu_seconds_error")
    table.insert(2, "seeds", table.pop("seeds"))
    write_csv(table, HERE / "results.csv")
    shown = table.assign(bits=[bits or "-" for bits in table.bits], bottleneck=table.bottleneck.map(NAMES))
    columns = [Column("bits"), Column("bottleneck"), Column("seeds"), Column("psnr", "PSNR, dB", spec=".2f")]
    columns += [Column("ssim", "SSIM", spec=".4f"), Column("rfid", "rFID", spec=".2f")]
    columns += [Column("bit_entropy", "entropy of a bit", spec=".3f")]
    print(markdown(shown, [*columns, Column("code_entropy", "of a code, a bit", spec=".3f")]))
    return table


def plot(table: pd.DataFrame) -> None:
    """bits.png: PSNR, SSIM and rFID by bits a position; bars and the band are standard errors over seeds."""
    named = table.assign(bottleneck=table.bottleneck.map(NAMES))
    figure = Figure((11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (metric, label) in zip(axes, (("psnr", "PSNR, dB"), ("ssim", "SSIM"), ("rfid", "rFID"))):
        error_bars(axis, named, "bits", metric, "bottleneck", {"HBQ": "o-C0", "FSQ": "s--C1", "BSQ": "^-.C2"})
        bound, error = table[metric][0], table[f"{metric}_error"][0]
        axis.axhline(bound, color="grey", linestyle=":", label="continuous")
        axis.axhspan(bound - error, bound + error, color="grey", alpha=0.2)
        axis.set(xticks=(4, 8, 16), xlabel="bits a position", ylabel=label)
    axes[2].legend(fontsize="small")
    figure.savefig(HERE / "bits.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="none: only the table and the plot")
    if seeds := parser.parse_args().seeds:
        measure(seeds)
    plot(tabulate())


if __name__ == "__main__":
    run_study(main)
