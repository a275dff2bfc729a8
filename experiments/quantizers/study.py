"""HBQ, FSQ, BSQ at equal bits, and no quantizer at all, between the same encoder and decoder (README.md beside this).

    python experiments/quantizers/study.py [--seeds 1 2 3]

from where the data are (pip install -e '.[studies]'). What runs/quantizers holds is not trained again, so that several
of these, each with a part of the seeds, and then one of all write the table and the plot.
"""

import argparse
import csv
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from einops import rearrange
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
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
from grn.training.optimization import adamw, learning_rate_schedule

matplotlib.use("agg")
from matplotlib import pyplot as plt

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
OUT = Path(os.environ.get("GRN_RUNS", "runs")) / "quantizers"
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
    OUT.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["+experiment=digits_tokenizer"])
    datamodule = instantiate(config.data)
    splits, device = real_splits(datamodule), torch.device("cpu")
    pixels = {name: torch.cat([batch["pixels"] for batch in read()]) for name, read in splits.items()}
    scores = build_scores(instantiate(config.scores), splits, device=device, cache_dir=OUT / "cache")
    for seed in seeds:
        for kind, bits in SETTINGS:
            path = OUT / f"{kind}-{bits}-{seed}.json"
            if path.exists():
                continue
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


def tabulate() -> list[dict[str, Any]]:
    """Writes results.csv and prints it as a table; a row a bottleneck and number of bits, over the seeds."""
    rows = []
    for kind, bits in SETTINGS:
        runs = [json.loads(path.read_text()) for path in sorted(OUT.glob(f"{kind}-{bits}-*.json"))]
        if not runs:
            continue
        row = {"bottleneck": kind, "bits": bits, "seeds": len(runs), "parameters": runs[0]["parameters"]}
        for metric in METRICS:
            values = np.array([run.get(metric, math.nan) for run in runs])
            row[metric] = values.mean()
            row[f"{metric}_error"] = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
        rows.append(row | {"cpu_seconds": sum(run["cpu_seconds"] for run in runs) / len(runs)})
    with open(HERE / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print("| bits | bottleneck | seeds | PSNR, dB | SSIM | rFID | entropy of a bit | of a code, a bit |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row[m]:.{d}f} ± {row[f'{m}_error']:.{d}f}" for m, d in zip(METRICS, (2, 4, 2, 3, 3))]
        cells = ["-" if "nan" in cell[:3] else cell for cell in cells]
        print(f"| {row['bits'] or '-'} | {NAMES[row['bottleneck']]} | {row['seeds']} | {' | '.join(cells)} |")
    return rows


def plot(rows: list[dict[str, Any]]) -> None:
    """bits.png: PSNR, SSIM and rFID by bits a position; bars and the band are standard errors over seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, (metric, label) in zip(axes, (("psnr", "PSNR, dB"), ("ssim", "SSIM"), ("rfid", "rFID"))):
        for kind, style in (("hbq", "o-C0"), ("fsq", "s--C1"), ("bsq", "^-.C2")):
            points = [row for row in rows if row["bottleneck"] == kind]
            bits, values, errors = ([row[key] for row in points] for key in ("bits", metric, f"{metric}_error"))
            axis.errorbar(bits, values, errors, fmt=style, capsize=2, label=NAMES[kind])
        bound, error = rows[0][metric], rows[0][f"{metric}_error"]
        axis.axhline(bound, color="grey", linestyle=":", label="continuous")
        axis.axhspan(bound - error, bound + error, color="grey", alpha=0.2)
        axis.set(xticks=(4, 8, 16), xlabel="bits a position", ylabel=label)
    axes[2].legend(fontsize="small")
    figure.savefig(HERE / "bits.png", dpi=100)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="none: only the table and the plot")
    if seeds := parser.parse_args().seeds:
        measure(seeds)
    plot(tabulate())


if __name__ == "__main__":
    main()
