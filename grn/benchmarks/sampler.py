"""Entropy-guided sampling beside a fixed schedule: does it take what its steps are worth?"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig
from rich import box
from rich.table import Table

from grn.benchmarks import machine
from grn.checkpoints.native import build_network
from grn.method.sampler import Sampler
from grn.method.schedules import EntropyGuided, Linear
from grn.networks.class_refiner import ClassRefiner
from grn.networks.conditions import Labels
from grn.runtime.errors import UserError
from grn.runtime.tables import show
from grn.sampling.calibration import fit
from grn.sampling.loading import load_refiner
from grn.sampling.refinement import Refined, Refinement, finished

SEED = 0
BAR = 1.15  # entropy-guided sampling in S steps in the mean takes at most this times S/N of what N fixed steps take


NAMES = ("fixed", "entropy-guided")


def benchmark(
    *,
    model: DictConfig,
    device: torch.device,
    repeats: int,
    ckpt: str | None,
    num: int | None,
    batch_size: int | None,
    steps: int,
    min_steps: int,
    mean_steps: float,
    bfloat16: bool,
) -> dict[str, Any]:
    """Measures both schedules in turns and prints one table; the keys are explained in conf/benchmark/sampler.yaml.

    Returns:
        `rows`, one for each dtype and schedule, beside the sizes, the sampler and the schedule that was fitted.
    """
    on_cpu = device.type == "cpu"
    num, batch_size = num or (256 if on_cpu else 2048), batch_size or (64 if on_cpu else 256)
    for key, value in {"num": num, "batch_size": batch_size}.items():
        if value < 1:
            raise UserError(f"benchmark.{key}={value}: at least one")
    if not min_steps < mean_steps < steps:
        raise UserError(
            f"benchmark.mean_steps={mean_steps}: between benchmark.min_steps={min_steps} and benchmark.steps={steps}"
        )
    network, trained = _refiner(model, ckpt)
    network = network.to(device).eval()
    fixed = replace(trained, schedule=Linear(steps))
    run = _Runs(network, num, batch_size, device)

    dtypes = (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)
    # A fixed schedule's first steps are those of an entropy-guided one: it knows the entropies that would decide.
    guided = EntropyGuided(min_steps=min_steps, max_steps=steps)
    entropy = run(fixed, dtypes[0]).trace[:, guided.warmup]
    guided = replace(fixed, schedule=fit(guided, entropy, target=mean_steps))
    rows, calls = [], []
    for dtype in dtypes:
        for name, sampler in zip(NAMES, (fixed, guided)):
            found, others = run(sampler, dtype), run(sampler, dtype, batch_size=batch_size // 2 + 1)
            rows.append(
                {
                    "variant": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "steps_mean": found.steps.double().mean().item(),
                    "steps_min": found.steps.min().item(),
                    "steps_max": found.steps.max().item(),
                    "equal_tokens": (found.tokens == others.tokens).double().mean().item(),
                }
            )
            calls.append(lambda sampler=sampler, dtype=dtype: run(sampler, dtype))
    for row, seconds in zip(rows, machine.median_seconds(calls, device, repeats)):
        row |= {"seconds": seconds, "images_per_second": num / seconds}
    for row in rows:
        reference = next(r for r in rows if r["dtype"] == row["dtype"])  # the fixed one
        row["ratio"] = row["seconds"] / reference["seconds"]
        row["ratio_per_step"] = row["ratio"] / (row["steps_mean"] / reference["steps_mean"])
        row["within_bar"] = row["ratio_per_step"] <= BAR
    sizes = {"num": num, "batch_size": batch_size, "parameters": sum(p.numel() for p in network.parameters())}
    show(_table(rows, sizes, device))
    return {
        "sizes": sizes,
        "ckpt": ckpt,
        "sampler": repr(guided),
        "entropy": {"mean": entropy.mean().item(), "std": entropy.std().item()},
        "bar": BAR,
        "rows": rows,
    }


def _refiner(model: DictConfig, ckpt: str | None) -> tuple[ClassRefiner, Sampler]:
    """A trained one with its sampler, or one of random weights whose predictions depend on all that it sees."""
    if ckpt is not None:
        try:
            bundle, _ = load_refiner(ckpt)
        except UserError as error:
            raise UserError(f"benchmark.{error}") from None
        return bundle.network, bundle.sampler
    network = build_network(model)
    if not isinstance(network, ClassRefiner):
        raise UserError(
            "benchmark=sampler measures class-conditional refiners: model=class_refiner, or benchmark.ckpt=..."
        )
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        modulated: list[Any] = [*network.blocks, network.head]
        for module in modulated:
            module.modulation.weight.normal_(std=0.3, generator=generator)
        network.head.out.weight.normal_(std=0.1, generator=generator)
        network.label_embedding.weight.normal_(generator=generator)
    return network, Sampler(guidance=1.5, guidance_interval=(0.2, 1.0))


@dataclass(frozen=True)
class _Runs:
    """Samples `num` images, and says what became of all of them."""

    network: ClassRefiner
    num: int
    batch_size: int
    device: torch.device

    def __call__(self, sampler: Sampler, dtype: torch.dtype, batch_size: int | None = None) -> Refined:
        network, labels = self.network, torch.arange(self.num) % self.network.num_labels
        refinement = Refinement(
            lambda tokens, t, condition: network(tokens, t, condition.index),
            Labels(labels.to(self.device), network.num_labels),
            sampler,
            shape=(network.channels, 1, network.size, network.size),
            classes=network.classes,
            seed=SEED,
            ids=torch.arange(self.num, device=self.device),
            batch_size=batch_size or self.batch_size,
        )
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            ((_, refined),) = finished(refinement, self.num)
        return refined


def _table(rows: list[dict[str, Any]], sizes: dict[str, int], device: torch.device) -> Table:
    table = Table(
        caption=(
            f"{sizes['num']} samples, {sizes['batch_size']} at a time, on {device}; ratio: of the time to that of the "
            f"first row; per step: that to the ratio of the steps (bar: {BAR}); equal tokens: with the same samples in "
            f"batches of {sizes['batch_size'] // 2 + 1}"
        ),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("variant", no_wrap=True)
    for column in ("steps", "s", "img/s", "ratio", "per\nstep", "equal\ntokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row["variant"] == NAMES[0]:
            table.add_section()
            table.add_row(row["dtype"])
        table.add_row(
            f"  {row['variant']}",
            f"{row['steps_mean']:.1f} ({row['steps_min']}-{row['steps_max']})",
            f"{row['seconds']:.3g}",
            f"{row['images_per_second']:.3g}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_per_step']:.3f}",
            f"{row['equal_tokens']:.2%}",
        )
    return table
