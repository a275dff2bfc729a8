"""What one GPU does, part by part, against goals: for the minutes in which there is one."""

import json
import math
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from webdataset.writer import TarWriter

from grn.benchmarks import c2i, machine, sampler, scale, tokenizer
from grn.checkpoints.native import build_network
from grn.data.samples import collate
from grn.data.stream.endless import GlobalBatches, ResumableLoader
from grn.data.tokens import TokenDecoder, write_array
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.networks.conditions import Text
from grn.networks.text_refiner import TextRefiner
from grn.networks.tokenizer import for_inference
from grn.runtime.errors import UserError
from grn.runtime.flops import training_flop
from grn.sampling.refinement import Refinement, finished
from grn.training.activations import Mode, checkpoint_activations
from grn.training.optimization import adamw, clip_gradients

BF16 = torch.bfloat16
# One H100: at least so many a second, at most so many GB; and what the authors' code did on such a card.
GOALS = {"train_B": 2600, "train_L": 900, "sample_B": 120, "entropy_B": 190, "sample_L": 41, "encode": 1500}
GOALS |= {"decode": 500}
MEMORY = {"train_B": 16, "encode": 20, "decode": 20}
AUTHORS = {"train_B": 1113, "train_L": 381, "sample_B": 29.6, "sample_L": 10.2, "encode": 538, "decode": 156}


def benchmark(
    *, model: DictConfig, device: torch.device, repeats: int, parts: list[str], seconds: float, **keys: Any
) -> dict[str, Any]:
    """Runs `parts` one after the other; keys are explained in conf/benchmark/gpu.yaml.

    Returns:
        `parts`, by name: what was measured, or `error`. Each is printed as a line of JSON as soon as it is known.
    """
    known = _parts(device, repeats, keys)
    if odd := [part for part in parts if part not in known]:
        raise UserError(f"benchmark.parts={odd}: choose among {', '.join(known)}")
    if keys["steps"] < 2 or not 0 < keys["mean_steps"] < keys["steps"]:
        raise UserError(f"benchmark.mean_steps={keys['mean_steps']}: between 1 and benchmark.steps={keys['steps']}")
    begun, measured = time.monotonic(), {}
    rate = _matmul(device, repeats)
    for name in parts:
        since = time.monotonic()
        if since - begun > seconds:
            measured[name] = {"error": f"not begun within benchmark.seconds={seconds}"}
        else:
            try:
                measured[name] = known[name]()
            except Exception as error:  # whatever a part meets, the others are measured
                measured[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
                traceback.print_exc()
        row = measured[name]
        if "flop_per_second" in row:
            row["share_of_matmul"] = row["flop_per_second"] / rate
        row["took_seconds"] = time.monotonic() - since
        print(json.dumps({name: row}), flush=True)
        torch._dynamo.reset()
        torch.accelerator.empty_cache()
    Console(width=120).print(_table(measured, rate))
    return {
        "matmul_flop_per_second": rate,
        "maker_flop_per_second": get_available_flops(device, BF16),
        "sizes": {name: OmegaConf.to_container(v) if isinstance(v, (DictConfig, ListConfig)) else v
                  for name, v in keys.items()},
        "parts": measured,
    }  # fmt: skip


def _parts(device: torch.device, repeats: int, keys: dict[str, Any]) -> dict[str, Callable[[], dict[str, Any]]]:
    of = {"device": device, "repeats": repeats, "keys": keys}
    return {
        "machine": partial(_machine, device, repeats),
        "train_B": partial(_train, "B", "none", **of),
        "train_L": partial(_train, "L", "selective", **of),
        "sample_B": partial(_sample, "B", **of),
        "sample_L": partial(_sample, "L", **of),
        "entropy_B": partial(_entropy, device, keys),
        "encode": partial(_images, "encode", **of),
        "decode": partial(_images, "decode", **of),
        "clip": partial(_clip, **of),
        "text_train": partial(_text_train, **of),
        "text_sample": partial(_text_sample, **of),
        "loader": partial(_loader, **of),
    }


def _matmul(device: torch.device, repeats: int) -> float:
    product, flop = machine.matmul(device, BF16)
    product()
    return flop / min(machine.seconds(product, device) for _ in range(max(repeats, 3)))


def _machine(device: torch.device, repeats: int) -> dict[str, Any]:
    exact, flop = machine.matmul(device, torch.float32)
    source = torch.ones(2**22 if device.type == "cpu" else 2**28, device=device)
    calls = [exact, partial(torch.empty_like(source).copy_, source)]
    for call in calls:
        call()
    product, copy = machine.median_seconds(calls, device, repeats)
    return {"float32_flop_per_second": flop / product, "copy_bytes_per_second": 2 * source.nbytes / copy}


def _variant(keys: dict[str, Any], task: str, activations: Mode = "none") -> c2i.Variant:
    return c2i.Variant("bfloat16", tasks=(task,), dtype=BF16, compile=keys["compile"], activations=activations)


def _result(row: dict[str, Any]) -> dict[str, Any]:
    speed = row["images_per_second"]
    return {"per_second": speed, "bytes": row["peak_bytes"], "flop_per_second": speed * row["flop_per_image"]}


def _train(size: str, activations: Mode, *, device: torch.device, repeats: int, keys: dict[str, Any]) -> dict[str, Any]:
    network = c2i.random_network(keys[size]).to(device)
    variants = [_variant(keys, "training", activations)]
    (row,) = c2i.measure_training(network, variants, device, repeats, batch_size=keys["batch_size"])
    return _result(row)


def _sample(size: str, *, device: torch.device, repeats: int, keys: dict[str, Any]) -> dict[str, Any]:
    network = c2i.random_network(keys[size]).to(device)
    interval = tuple(keys["guidance_interval"])
    (row,) = c2i.measure_sampling(
        network,
        [_variant(keys, "sampling")],
        device,
        repeats,
        batch_size=keys["sample_batch_size"],
        sampler=Sampler(Linear(keys["steps"]), guidance=keys["guidance"], guidance_interval=interval),
        steps=keys["steps"],
    )
    return _result(row)


def _entropy(device: torch.device, keys: dict[str, Any]) -> dict[str, Any]:
    """Not compiled, guided by 1.5 in (0.2, 1): as benchmark=sampler has it."""
    measured = sampler.benchmark(
        model=keys["B"],
        device=device,
        repeats=1,
        ckpt=None,
        num=4 * keys["sample_batch_size"],
        batch_size=keys["sample_batch_size"],
        steps=keys["steps"],
        min_steps=max(1, 2 * keys["mean_steps"] // 3),
        mean_steps=keys["mean_steps"],
        bfloat16=True,
    )
    row = measured["rows"][-1]
    return {"per_second": row["images_per_second"], "steps": row["steps_mean"], "per_step": row["ratio_per_step"]}


def _images(task: str, *, device: torch.device, repeats: int, keys: dict[str, Any]) -> dict[str, Any]:
    exact = build_network(keys["tokenizer"])
    side, count = keys["image_size"], keys["image_batch_size"]
    shape = (count, 3, 1, side, side)
    if task == "decode":
        shape = (count, exact.latent_channels, 1, side // exact.stride, side // exact.stride)
    flop = tokenizer.flop_per_image(exact, task, torch.Size(shape))
    network = for_inference(exact, dtype=BF16, compile=keys["compile"]).to(device)
    given = torch.rand(shape, device=device) * 2 - 1
    call = tokenizer.call_of(network, task, given)
    call()
    _, peak = machine.peak_memory(call, device, held=[*network.parameters(), given])
    (seconds,) = machine.median_seconds([call], device, repeats)
    return {"per_second": count / seconds, "bytes": peak, "flop_per_second": flop * count / seconds}


@torch.no_grad()
def _clip(*, device: torch.device, repeats: int, keys: dict[str, Any]) -> dict[str, Any]:
    """Frames a second of one clip in a stream, encoded and decoded."""
    network = for_inference(build_network(keys["clip"]), dtype=BF16).to(device)
    side, count = keys["image_size"], keys["frames"]
    pictures = [torch.rand(1, 3, side, side, device=device) * 2 - 1 for _ in range(count)]
    latents = list(network.encode_stream(iter(pictures)))
    # `deque` with no room runs through a stream and keeps nothing of it.
    calls = [
        lambda: deque(network.encode_stream(iter(pictures)), maxlen=0),
        lambda: deque(network.decode_stream(iter(latents)), maxlen=0),
    ]
    held = [*network.parameters(), *pictures, *latents]
    peaks = [machine.peak_memory(call, device, held=held)[1] for call in calls]
    encode, decode = machine.median_seconds(calls, device, repeats)
    speeds = {"per_second": count / (encode + decode), "encode": count / encode, "decode": count / decode}
    return speeds | {"bytes": max(peaks)}


def _text_refiner(keys: dict[str, Any], device: torch.device) -> TextRefiner:
    network = scale.hollow_of(keys["text"]).to_empty(device=device)  # never on the CPU, where filling it takes minutes
    network.init_weights(torch.Generator(device).manual_seed(0))
    return network


def _text_train(*, device: torch.device, repeats: int, keys: dict[str, Any]) -> dict[str, Any]:
    """Images a second in packs, features ready: forward to AdamW, with activations checkpointed in full."""
    network = _text_refiner(keys, device)
    load = {"pixels": keys["pixels"], "text": keys["text_tokens"], "max_tokens": keys["max_tokens"]}
    images = keys["max_tokens"] // (keys["pixels"] + 1 + keys["text_tokens"])
    loss = scale.pack(network, **load)
    nowhere: dict[str, Any] = load | {"device": torch.device("meta")}
    flop = training_flop(
        network, lambda hollow: torch.cat([logits.flatten() for logits in scale.pack_logits(hollow, **nowhere)])
    )
    checkpoint_activations(network, "full")
    optimizer = adamw(network, learning_rate=0.0, betas=(0.9, 0.999), weight_decay=0.0)

    def step() -> None:
        with torch.device(device), torch.autocast(device.type, BF16):
            value = loss(network)
        value.backward()
        clip_gradients(network.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    _, peak = machine.peak_memory(step, device, held=[*network.parameters(), *state])
    (seconds,) = machine.median_seconds([step], device, repeats)
    return {"per_second": images / seconds, "bytes": peak, "flop_per_second": flop / seconds}


@torch.no_grad()
def _text_sample(*, device: torch.device, repeats: int, keys: dict[str, Any]) -> dict[str, Any]:
    """Guided images a second, each with a text of its own; without the text encoder and the decoder."""
    network, count, side = _text_refiner(keys, device).to(BF16), 2, math.isqrt(keys["pixels"])
    lengths = [keys["text_tokens"]] * count + [1]
    features = torch.randn(sum(lengths), network.text_width, device=device).to(BF16)
    cache, steps = network.text_cache(features, lengths), keys["text_steps"]

    def call() -> Tensor:
        refinement = Refinement(
            lambda tokens, t, given: network.predict(tokens, t, given.cache, given.index),
            Text(cache, torch.arange(count), torch.full((count,), count)),
            Sampler(Linear(steps), guidance=3.0),
            shape=(network.channels, 1, side, side),
            classes=network.classes,
            seed=0,
            ids=torch.arange(count, device=device),
            batch_size=count,
        )
        ((_, refined),) = finished(refinement, count)
        return refined.tokens

    call()
    _, peak = machine.peak_memory(call, device, held=list(network.parameters()))
    (seconds,) = machine.median_seconds([call], device, repeats)
    return {"per_second": count / (seconds * keys["steps"] / steps), "bytes": peak}


def _loader(*, device: torch.device, repeats: int, keys: dict[str, Any]) -> dict[str, Any]:
    """Images a second that token shards of random bits give, on the device: to be more than training takes."""
    size, batch, workers, images = keys["B"].size, keys["batch_size"], keys["num_workers"], 1024
    views = np.random.default_rng(0).integers(256, size=(2, 1, size, size, 8), dtype=np.uint8)
    entries = {"tokens.npy": write_array(views), "cls": b"1"}
    with tempfile.TemporaryDirectory() as folder:
        urls = [str(Path(folder) / f"{number:02d}.tar") for number in range(max(8, workers))]
        for url in urls:
            with TarWriter(url, encoder=False) as archive:
                for number in range(images):
                    archive.write({"__key__": f"{number:06d}"} | entries)
        data = GlobalBatches(
            urls,
            TokenDecoder((1, size, size), 8, num_labels=10),
            collate=collate,
            batch_size=batch,
            worker_streams=max(1, workers),
            num_workers=workers,
        )
        batches = iter(ResumableLoader(data, pin_memory=device.type != "cpu"))
        deque(islice(batches, 2 * max(1, workers)), maxlen=0)
        count, begun = 40 * repeats, time.perf_counter()
        for loaded in islice(batches, count):
            loaded["bits"].to(device, non_blocking=True)
        machine.synchronize(device)
        seconds = time.perf_counter() - begun
        del batches
    return {"per_second": count * batch / seconds}


def _table(measured: dict[str, dict[str, Any]], rate: float) -> Table:
    table = Table(
        title=f"matrix products in bfloat16: {rate / 1e12:.3g} TFLOP/s",
        caption="images (clip: frames) a second; share: of that rate; GB: at the peak; goals, authors: on one H100",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("part", no_wrap=True)
    for column in ("per s", "goal", "authors", "TFLOP/s", "share", "GB", "goal", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in measured.items():
        if "error" in row:
            table.add_row(name, row["error"][:60])
            continue
        share = f"{row['share_of_matmul']:.0%}" if "share_of_matmul" in row else ""
        table.add_row(
            name,
            _shown(row.get("per_second")),
            str(GOALS.get(name, "")),
            str(AUTHORS.get(name, "")),
            _shown(row.get("flop_per_second"), 1e12),
            share,
            _shown(row.get("bytes"), 1e9),
            str(MEMORY.get(name, "")),
            f"{row['took_seconds']:.0f}",
        )
    return table


def _shown(value: float | None, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.0f}" if value / unit >= 100 else f"{value / unit:.3g}"
