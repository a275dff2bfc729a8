"""The class-conditional refiner: training from tokens and sampling, in each precision, compiled, with less memory."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from omegaconf import DictConfig
from rich import box
from rich.table import Table
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from grn.benchmarks import machine
from grn.checkpoints.native import build_network
from grn.method import corruption
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.networks.class_refiner import ClassRefiner
from grn.networks.conditions import Labels
from grn.runtime.errors import UserError
from grn.runtime.flops import forward_flop, training_flop
from grn.runtime.tables import show
from grn.sampling.refinement import Refinement, finished
from grn.training.activations import Mode, checkpoint_activations
from grn.training.optimization import adamw, clip_gradients

DECAYS = (0.9999, 0.9996)
SEED = 0


@dataclass(frozen=True)
class Variant:
    """A way to train or sample."""

    name: str
    tasks: tuple[str, ...] = ("training", "sampling")
    dtype: torch.dtype = torch.float32
    compile: bool = False
    activations: Mode = "none"
    mode: str = "default"  # of torch.compile


VARIANTS = (
    Variant("float32"),
    Variant("bfloat16", dtype=torch.bfloat16),
    Variant("compiled", dtype=torch.bfloat16, compile=True),
    Variant("CUDA graphs", dtype=torch.bfloat16, tasks=("sampling",), compile=True, mode="reduce-overhead"),
    # For less memory: cluster.activation_checkpointing, without and with torch.compile.
    Variant("selective", dtype=torch.bfloat16, tasks=("training",), activations="selective"),
    Variant("selective, compiled", dtype=torch.bfloat16, tasks=("training",), compile=True, activations="selective"),
    Variant("full", dtype=torch.bfloat16, tasks=("training",), activations="full"),
)


def benchmark(
    *,
    model: DictConfig,
    device: torch.device,
    repeats: int,
    batch_size: int | None,
    sample_batch_size: int | None,
    steps: int,
    measured_steps: int | None,
    guidance: float,
    guidance_interval: list[float],
    compile: bool | None,
) -> dict[str, Any]:
    """Measures both tasks and prints one table; the keys are explained in conf/benchmark/c2i.yaml.

    Returns:
        `training` and `sampling`, a row for each variant, beside the sizes and rates that they are measured against.
    """
    on_cpu = device.type == "cpu"
    batch_size, sample_batch_size = batch_size or (1 if on_cpu else 128), sample_batch_size or (1 if on_cpu else 64)
    measured_steps = measured_steps or min(steps, 4 if on_cpu else steps)
    compile = not on_cpu if compile is None else compile
    sizes = {"batch_size": batch_size, "sample_batch_size": sample_batch_size, "steps": steps}
    sizes |= {"measured_steps": measured_steps}
    for key, value in sizes.items():
        if value < 1:
            raise UserError(f"benchmark.{key}={value}: at least one")
    network = random_network(model).to(device)
    interval: Any = tuple(guidance_interval)
    sampler = Sampler(Linear(steps), guidance=guidance, guidance_interval=interval)
    variants = [variant for variant in VARIANTS if compile or not variant.compile]
    rates = measure_matmul(variants, device, repeats)
    rows = {
        "training": measure_training(network, variants, device, repeats, batch_size=batch_size),
        "sampling": measure_sampling(
            network, variants, device, repeats, batch_size=sample_batch_size, sampler=sampler, steps=measured_steps
        ),
    }
    for row in (row for measured in rows.values() for row in measured):
        row["flop_per_second"] = row["flop_per_image"] * row["images_per_second"]
        row["limit_images_per_second"] = rates[row["dtype"]] / row["flop_per_image"]
        row["share_of_matmul"] = row["flop_per_second"] / rates[row["dtype"]]
        peak = get_available_flops(device, getattr(torch, row["dtype"]))
        row["mfu"] = row["flop_per_second"] / peak if peak else None
    show(_table(rows, device))
    print(
        f"training: batch {batch_size}, {_three_digits(rows['training'][0]['flop_per_image'] / 1e9)} GFLOP an image; "
        f"sampling: batch {sample_batch_size}, {measured_steps} of {steps} steps measured, "
        f"{_three_digits(rows['sampling'][0]['flop_per_image'] / 1e9)} GFLOP an image; matrix products: "
        + ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates.items())
    )
    return {
        "matmul_flop_per_second": rates,
        "sizes": sizes
        | {
            "guidance_interval": list(guidance_interval),
            "parameters": sum(p.numel() for p in network.parameters()),
        },
        "memory_method": machine.memory_method(device),
        **rows,
    }


def random_network(model: DictConfig) -> ClassRefiner:
    """Random weights, none of them zero: a new network would predict the same for all inputs."""
    network = build_network(model)
    if not isinstance(network, ClassRefiner):
        raise UserError("benchmark=c2i measures class-conditional refiners: size=B, or model=class_refiner")
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        modulated: list[Any] = [*network.blocks, network.head]
        for module in modulated:
            module.modulation.weight.normal_(std=0.02, generator=generator)
        network.head.out.weight.normal_(std=0.02, generator=generator)
    return network


def measure_matmul(variants: list[Variant], device: torch.device, repeats: int) -> dict[str, float]:
    """FLOP/s of large matrix products by the dtypes of `variants`, the best of `repeats` (at least 3)."""
    products = {_name(variant.dtype): machine.matmul(device, variant.dtype) for variant in variants}
    for product, _ in products.values():
        product()
    return {
        name: flop / min(machine.seconds(product, device) for _ in range(max(repeats, 3)))
        for name, (product, flop) in products.items()
    }


def measure_training(
    network: ClassRefiner, variants: list[Variant], device: torch.device, repeats: int, *, batch_size: int
) -> list[dict[str, Any]]:
    """Whole steps as the trainer takes them: corruption, forward, backward, clipping, AdamW, two EMAs; a row a variant.

    `error`: of the logits against those of the first variant, norm over norm. The learning rate is 0, so that all
    variants see the same weights.
    """
    averages = [[p.detach().clone() for p in network.parameters()] for _ in DECAYS]
    batch = _inputs(network, batch_size, device)
    flop = training_flop(network, lambda hollow: hollow(*_inputs(network, 1, torch.device("meta"))))
    optimizer = adamw(network, learning_rate=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    calls, rows, reference = [], [], None
    for variant in (variant for variant in variants if "training" in variant.tasks):
        predict = _predict(network, variant)
        logits = _running_as(variant, device, predict)(*batch).detach()
        reference = logits if reference is None else reference
        error = ((logits - reference).norm() / reference.norm()).item()
        call = _running_as(variant, device, _step(network, predict, optimizer, averages, batch))
        call()  # compiles, and makes the optimizer's state
        state = [value for values in optimizer.state.values() for value in values.values()]
        held = [*network.parameters(), *(p for average in averages for p in average), *state, *batch]
        _, peak = machine.peak_memory(call, device, held=held)
        calls.append(call)
        rows.append(_row(variant, device, flop, peak) | {"error": error})
    _fill_in(rows, [batch_size / seconds for seconds in machine.median_seconds(calls, device, repeats)])
    return rows


def _step(
    network: ClassRefiner,
    predict: Callable,
    optimizer: torch.optim.Optimizer,
    averages: list[list[Tensor]],
    batch: tuple[Tensor, Tensor, Tensor],
) -> Callable[[], None]:
    tokens, _, labels = batch
    ids = torch.arange(len(labels), device=labels.device)
    weights = [p.detach() for p in network.parameters()]

    def step() -> None:
        t = corruption.signal_ratio(SEED, ids, 0, mean=-0.8, std=0.8)
        noisy = corruption.corrupt(tokens, t, network.classes, seed=SEED, ids=ids, step=0)
        corruption.token_loss(predict(noisy, t, labels), tokens).backward()
        clip_gradients(network.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        for decay, average in zip(DECAYS, averages):
            get_ema_multi_avg_fn(decay)(average, weights, 1)

    return step


def measure_sampling(
    network: ClassRefiner,
    variants: list[Variant],
    device: torch.device,
    repeats: int,
    *,
    batch_size: int,
    sampler: Sampler,
    steps: int,
) -> list[dict[str, Any]]:
    """Noise to tokens; a row a variant. `steps` are taken, and their time is scaled to all by passes of the network.

    FLOP are those that the schedule needs. `equal_tokens`: with the first variant.
    """
    short = replace(sampler, schedule=Linear(steps))
    forward = forward_flop(network, lambda hollow: hollow(*_inputs(network, 1, torch.device("meta"))))
    _, _, labels = _inputs(network, batch_size, device)
    ids = torch.arange(batch_size, device=device)
    calls, rows, reference = [], [], None
    for variant in (variant for variant in variants if "sampling" in variant.tasks):
        predict = _predict(network, variant)

        def sample(predict: Callable = predict, variant: Variant = variant) -> Tensor:
            refinement = Refinement(
                lambda given, t, condition: predict(given, t, condition.index),
                Labels(labels, network.num_labels),
                short,
                shape=(network.channels, 1, network.size, network.size),
                classes=network.classes,
                seed=SEED,
                ids=ids,
                batch_size=batch_size,
                bucketed=variant.compile,
                compiled=variant.compile,
            )
            ((_, refined),) = finished(refinement, batch_size)
            return refined.tokens

        call = _running_as(variant, device, sample)
        if variant.compile:
            call()
        tokens, peak = machine.peak_memory(call, device, held=[*network.parameters(), labels, ids])
        reference = tokens if reference is None else reference
        calls.append(call)
        equal = (tokens == reference).double().mean().item()
        rows.append(_row(variant, device, forward * passes(sampler), peak) | {"equal_tokens": equal})
    times = machine.median_seconds(calls, device, repeats)
    scale = passes(sampler) / passes(short)
    _fill_in(rows, [batch_size / (seconds * scale) for seconds in times])
    return rows


def passes(sampler: Sampler) -> int:
    """How often a sample runs through the network: once a step, and once more where guidance acts."""
    schedule = sampler.schedule
    ratios = schedule.signal_ratio(torch.arange(schedule.max_steps), torch.tensor([schedule.max_steps]))
    return len(ratios) + int(sampler.guides(ratios).sum())


def _inputs(network: ClassRefiner, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random (tokens, t, labels)."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (batch_size, network.channels, 1, network.size, network.size)
    tokens = torch.randint(network.classes, shape, generator=generator)
    t = torch.rand(batch_size, generator=generator)
    labels = torch.randint(network.num_labels, (batch_size,), generator=generator)
    return tokens.to(device), t.to(device), labels.to(device)


def _predict(network: ClassRefiner, variant: Variant) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if variant.activations != "none":
        shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        network = copy.deepcopy(network, shared)
        checkpoint_activations(network, variant.activations)
    return torch.compile(network, mode=variant.mode) if variant.compile else network


def _running_as(variant: Variant, device: torch.device, function: Callable) -> Callable:
    autocast = {"dtype": torch.bfloat16, "enabled": variant.dtype == torch.bfloat16}

    def call(*arguments: Any) -> Any:
        with torch.autocast(device.type, **autocast):
            return function(*arguments)

    return call


def _row(variant: Variant, device: torch.device, flop: int, peak: int) -> dict[str, Any]:
    unseen = variant.compile and device.type == "cpu"  # no way to see a compiled call's temporaries there
    return {
        "variant": variant.name,
        "dtype": _name(variant.dtype),
        "flop_per_image": flop,
        "peak_bytes": None if unseen else peak,
    }


def _fill_in(rows: list[dict[str, Any]], speeds: list[float]) -> None:
    for row, speed in zip(rows, speeds):
        row |= {"images_per_second": speed, "ratio": speed / speeds[0]}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(tasks: dict[str, list[dict[str, Any]]], device: torch.device) -> Table:
    caption = (
        f"MB: what is held, and {machine.memory_method(device)}; limit: images/s at this machine's rate of matrix "
        "products in that dtype, share: of that rate; MFU: of the maker's figure; off: error of the logits (training), "
        "tokens that differ (sampling), against the first row"
    )
    table = Table(caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("variant", no_wrap=True)
    for column in ("img/s", "ratio", "MB", "TFLOP/s", "limit", "share", "MFU", "off"):
        table.add_column(column, justify="right", no_wrap=True)
    for task, rows in tasks.items():
        table.add_section()
        table.add_row(task)
        for row in rows:
            table.add_row(
                f"  {row['variant']}",
                _three_digits(row["images_per_second"]),
                f"{row['ratio']:.2f}",
                "-" if row["peak_bytes"] is None else _three_digits(row["peak_bytes"] / 1e6),
                _three_digits(row["flop_per_second"] / 1e12),
                _three_digits(row["limit_images_per_second"]),
                f"{row['share_of_matmul']:.0%}",
                "-" if row["mfu"] is None else f"{row['mfu']:.0%}",
                f"{row['error']:.0e}" if "error" in row else f"{1 - row['equal_tokens']:.1%}",
            )
    return table


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
