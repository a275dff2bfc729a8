"""The tokenizer: images a second, memory and exactness in each precision, and compiled; memory of long clips."""

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from rich import box
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from grn.benchmarks import machine
from grn.checkpoints.native import build_network, load_tokenizer
from grn.method import hbq
from grn.networks.tokenizer import HBQTokenizer, for_inference
from grn.runtime.errors import UserError
from grn.runtime.tables import show

PEAK_TO_PEAK = 2.0  # pixels are in [-1, 1]
CPU_STREAM_WIDTH = 16  # on a CPU the full network would take minutes over a long clip


@dataclass(frozen=True)
class Variant:
    """A way to run the network."""

    name: str
    dtype: torch.dtype = torch.float32
    compile: bool = False


VARIANTS = (
    Variant("float32"),
    Variant("bfloat16", dtype=torch.bfloat16),
    Variant("compiled", dtype=torch.bfloat16, compile=True),
)


def benchmark(
    *,
    model: DictConfig,
    device: torch.device,
    repeats: int,
    ckpt: str | None,
    image_size: int,
    batch_size: int | None,
    compile: bool | None,
    stream: DictConfig,
) -> dict[str, Any]:
    """Measures images and, by `stream`, the memory of clips; conf/benchmark/tokenizer.yaml explains the keys."""
    on_cpu = device.type == "cpu"
    batch_size = batch_size or (1 if on_cpu else 64)
    compile = not on_cpu if compile is None else compile
    tokenizer = _tokenizer(model, ckpt)
    streamed, stream_size = _stream_tokenizer(tokenizer, stream, device), stream.image_size or (64 if on_cpu else 256)
    tokenizer.check_video((batch_size, 3, 1, image_size, image_size))
    for count in stream.frames:
        streamed.check_video((1, 3, count, stream_size, stream_size))
    variants = [variant for variant in VARIANTS if compile or not variant.compile]
    rates, rows = measure_images(tokenizer, variants, device, repeats, image_size=image_size, batch_size=batch_size)
    for name, measured in rows.items():
        show(_image_table(f"{name}: {batch_size} x {image_size}x{image_size}", measured, device))
    print("matrix products: " + ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates.items()))
    memory = measure_streams(streamed, device, frames=stream.frames, image_size=stream_size)
    show(_stream_table(f"clips in a stream: {stream_size}x{stream_size}", memory, device))
    return {
        "matmul_flop_per_second": rates,
        "sizes": {"batch_size": batch_size, "image_size": image_size, "model": tokenizer.config, "ckpt": ckpt},
        "memory_method": machine.memory_method(device),
        **rows,
        "stream": {"image_size": stream_size, "model": streamed.config, "rows": memory},
    }


def _tokenizer(model: DictConfig, ckpt: str | None) -> HBQTokenizer:
    if ckpt is not None:
        return load_tokenizer(ckpt, embed=False, key="benchmark.ckpt")[0]
    if model.get("weights"):
        return load_tokenizer(model.weights, embed=False, official=model)[0]
    tokenizer = build_network(model)
    if not isinstance(tokenizer, HBQTokenizer):
        raise UserError("benchmark=tokenizer measures tokenizers: model=tokenizer, model=tokenizer_small, ...")
    return tokenizer


def measure_images(
    tokenizer: HBQTokenizer,
    variants: list[Variant],
    device: torch.device,
    repeats: int,
    *,
    image_size: int,
    batch_size: int,
) -> tuple[dict[str, float], dict[str, list[dict[str, Any]]]]:
    """Each variant encodes and decodes random images; the first is taken for exact.

    Returns:
        (FLOP/s of matrix products by dtype; for `encode` and `decode` a row for each variant.) FLOP are those of
        convolutions and matrix products. `psnr` in dB compares pixels, clipped to [-1, 1]: of `decode` of the same
        features, of `encode` with the tokens of both decoded alike. `equal_tokens`: the share of `ind` tokens that
        `encode` finds as the first variant does.
    """
    networks = _networks(tokenizer, variants, device)
    exact = networks[variants[0].name]
    products = {_name(variant.dtype): machine.matmul(device, variant.dtype) for variant in variants}
    rates, tables = dict.fromkeys(products, 0.0), {}
    given = torch.rand(batch_size, 3, 1, image_size, image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = given.to(device)
    for task in ("encode", "decode"):
        calls, rows = [], []
        reference: Any = None
        for variant in variants:
            call = call_of(networks[variant.name], task, given)
            result, peak = _first_pass(call, variant, device, held=[*networks[variant.name].parameters(), given])
            reference = result if reference is None else reference
            flop = flop_per_image(tokenizer, task, given.shape)
            row = {"variant": variant.name, "dtype": _name(variant.dtype), "flop_per_image": flop, "peak_bytes": peak}
            rows.append(row | _closeness(task, result, reference, exact))
            calls.append(call)
        seconds = machine.median_seconds([*calls, *(product for product, _ in products.values())], device, repeats)
        for (name, (_, flop)), measured in zip(products.items(), seconds[len(calls) :]):
            rates[name] = max(rates[name], flop / measured)
        for row, measured in zip(rows, seconds):
            row["images_per_second"] = batch_size / measured
            row["ratio"] = seconds[0] / measured
            row["flop_per_second"] = row["flop_per_image"] * batch_size / measured
        tables[task] = rows
        given = reference if task == "encode" else given
    for row in (row for rows in tables.values() for row in rows):
        row["share_of_matmul"] = row["flop_per_second"] / rates[row["dtype"]]
    return rates, tables


def flop_per_image(tokenizer: HBQTokenizer, task: str, shape: torch.Size) -> int:
    """Floating-point operations of convolutions and matrix products, counted while the network runs without data."""
    hollow = copy.deepcopy(tokenizer).to("meta")
    with FlopCounterMode(display=False) as counter:
        call_of(hollow, task, torch.empty(shape, device="meta"))()
    return counter.get_total_flops() // shape[0]


def _networks(tokenizer: HBQTokenizer, variants: list[Variant], device: torch.device) -> dict[str, HBQTokenizer]:
    """By variant; those of one dtype share a copy of the weights, and a compiled one has its own."""
    shared: dict[torch.dtype, HBQTokenizer] = {}
    networks = {}
    for variant in variants:
        if variant.dtype not in shared:
            shared[variant.dtype] = for_inference(copy.deepcopy(tokenizer), dtype=variant.dtype).to(device)
        network = shared[variant.dtype]
        networks[variant.name] = for_inference(copy.deepcopy(network), compile=True) if variant.compile else network
    return networks


def call_of(network: HBQTokenizer, task: str, given: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        return getattr(network, task)(given)

    return call


def _first_pass(
    call: Callable[[], Tensor], variant: Variant, device: torch.device, *, held: list[Tensor]
) -> tuple[Tensor, int | None]:
    """(What the call returns, its peak memory); it is warm afterwards."""
    if variant.compile:
        result = call()
        if device.type == "cpu":
            return result, None  # no way to see a compiled call's temporaries there
    return machine.peak_memory(call, device, held=held)


@torch.no_grad()
def _closeness(task: str, result: Tensor, reference: Tensor, exact: HBQTokenizer) -> dict[str, float]:
    if task == "decode":
        return {"psnr": psnr(result, reference)}
    found, expected = (hbq.tokens(features, exact.rounds, "ind") for features in (result, reference))
    if torch.equal(found, expected):
        return {"psnr": math.inf, "equal_tokens": 1.0}
    pixels = [exact.detokenize(tokens, "ind") for tokens in (found, expected)]
    return {"psnr": psnr(*pixels), "equal_tokens": (found == expected).double().mean().item()}


def psnr(pixels: Tensor, reference: Tensor) -> float:
    """dB between pixels on the scale [-1, 1], clipped to it; infinite for equal ones."""
    error = pixels.float().clamp(-1, 1) - reference.float().clamp(-1, 1)
    return (10 * torch.log10(PEAK_TO_PEAK**2 / error.double().square().mean())).item()


def measure_streams(
    tokenizer: HBQTokenizer, device: torch.device, *, frames: Sequence[int], image_size: int
) -> list[dict[str, Any]]:
    """Peak memory of encoding and of decoding random clips frame by frame; a row for each length, `frames` ascending.

    Frames and latents are made when asked for and dropped when they have been used. `ratio`: to the first length.
    """
    network = for_inference(copy.deepcopy(tokenizer)).to(device)
    weights = list(network.parameters())
    rows: list[dict[str, Any]] = []
    for count in frames:
        pictures = (torch.rand(1, 3, image_size, image_size, device=device) * 2 - 1 for _ in range(count))
        side, latents = image_size // network.stride, 1 + (count - 1) // network.temporal_stride
        features = (torch.rand(1, network.latent_channels, side, side, device=device) * 2 - 1 for _ in range(latents))
        row: dict[str, Any] = {"frames": count}
        for task, stream in (
            ("encode", network.encode_stream(pictures)),
            ("decode", network.decode_stream(features)),
        ):
            # `deque` with no room runs through a stream and keeps nothing of it.
            _, peak = machine.peak_memory(lambda stream=stream: deque(stream, maxlen=0), device, held=weights)
            row[task] = {"peak_bytes": peak, "ratio": peak / (rows[0][task]["peak_bytes"] if rows else peak)}
        rows.append(row)
    return rows


def _stream_tokenizer(tokenizer: HBQTokenizer, stream: DictConfig, device: torch.device) -> HBQTokenizer:
    """The tokenizer that clips run through: of other widths than the one for images where `stream` or a CPU says so."""
    on_cpu = device.type == "cpu"
    widths = {name: stream[name] or (CPU_STREAM_WIDTH if on_cpu else None) for name in ("dim", "decoder_dim")}
    changed: dict[str, Any] = {name: width for name, width in widths.items() if width}
    return HBQTokenizer(**tokenizer.config | changed) if changed else tokenizer


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _image_table(title: str, rows: list[dict[str, Any]], device: torch.device) -> Table:
    caption = (
        f"MB: weights, input and {machine.memory_method(device)}; GFLOP: an image; share: of the rate of matrix "
        "products in that dtype; dB, tokens: PSNR of the pixels, and equal tokens, against the first row"
    )
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("variant", no_wrap=True)
    for column in ("img/s", "ratio", "MB", "GFLOP", "GFLOP/s", "share", "dB", "tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["variant"],
            _three_digits(row["images_per_second"]),
            f"{row['ratio']:.2f}",
            "-" if row["peak_bytes"] is None else _three_digits(row["peak_bytes"] / 1e6),
            _three_digits(row["flop_per_image"] / 1e9),
            _three_digits(row["flop_per_second"] / 1e9),
            f"{row['share_of_matmul']:.0%}",
            f"{row['psnr']:.1f}",
            f"{row['equal_tokens']:.2%}" if "equal_tokens" in row else "",
        )
    return table


def _stream_table(title: str, rows: list[dict[str, Any]], device: torch.device) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, caption=f"MB: weights and {machine.memory_method(device)}")
    for column in ("frames", "encode MB", "ratio", "decode MB", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [f(row[task]) for task in ("encode", "decode") for f in (_megabytes, _ratio)]
        table.add_row(str(row["frames"]), *cells)
    return table


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _megabytes(measured: dict[str, float]) -> str:
    return f"{measured['peak_bytes'] / 1e6:.2f}"


def _ratio(measured: dict[str, float]) -> str:
    return f"{measured['ratio']:.3f}"
