"""A training step of a sharded refiner on many GPUs, on a machine without any: fake tensors, a fake process group.

What is counted is what FSDP2 does with the very networks: who holds which bytes, and what is sent. Nothing is computed,
so nothing is timed.
"""

import logging
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, get_args

import lightning
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grn.checkpoints.native import build_network
from grn.method import corruption
from grn.networks.class_refiner import ClassRefiner
from grn.networks.text_refiner import TextRefiner
from grn.runtime.configs import plain
from grn.runtime.errors import UserError, check_count
from grn.runtime.tables import show
from grn.training.activations import Mode, checkpoint_activations
from grn.training.fsdp import FSDP, local
from grn.training.optimization import adamw, clip_gradients

DECAY = 0.999


def benchmark(
    *,
    model: DictConfig,
    device: torch.device,
    repeats: int,
    ranks: int,
    shard_size: int | None,
    activations: Mode,
    averages: int,
    batch_size: int | None,
    pixels: int,
    text: int,
    max_tokens: int,
    loss_chunk: int | None,
) -> dict[str, Any]:
    """Takes a step as the first and as the last rank, and prints one table; keys are explained in
    conf/benchmark/scale.yaml.

    Returns:
        `ranks`, a row for the first and the last rank, and `checkpoint`.
    """
    for key, value in {"ranks": ranks, "pixels": pixels, "text": text, "max_tokens": max_tokens}.items():
        check_count(f"benchmark.{key}", value)
    check_count("benchmark.averages", averages, least=0)
    if shard_size is not None and (shard_size < 1 or ranks % shard_size):
        raise UserError(f"benchmark.shard_size={shard_size} does not divide benchmark.ranks={ranks}")
    if activations not in get_args(Mode):
        raise UserError(f"benchmark.activations={activations}: choose among {', '.join(get_args(Mode))}")
    arguments = {"shard_size": shard_size, "activations": activations, "averages": averages}
    if batch_size is not None:
        check_count("benchmark.batch_size", batch_size)
    network = hollow_of(model)
    parameters = sum(p.numel() for p in network.parameters())
    if loss_chunk is not None:
        check_count("benchmark.loss_chunk", loss_chunk)
    load: dict[str, Any] = {"pixels": pixels, "text": text, "max_tokens": max_tokens}
    what = f"a pack of {max_tokens} tokens a rank"
    if isinstance(network, TextRefiner):
        pack(network, **load)
    elif isinstance(network, ClassRefiner):
        load = {"batch": batch_size or max(1, 1024 // ranks)}
        what = f"{load['batch']} images a rank"
    else:
        raise UserError("benchmark=scale is for refiners: model=class_refiner_G, or model=text_refiner_2B")
    load["loss_chunk"] = loss_chunk
    # In processes of their own: PyTorch keeps the meshes of a process that it has been told it is.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        told = plain(model, resolve=True)
        rows = [processes.submit(_as_rank, rank, ranks, told, load, arguments) for rank in sorted({0, ranks - 1})]
        rows = [row.result() for row in rows]
    total = 4 * parameters * (3 + averages)
    checkpoint = {"bytes": total, "files": ranks, "bytes_of_a_file": math.ceil(total / ranks)}
    show(_table(rows, parameters, ranks, shard_size, what, activations))
    print(f"checkpoint: {total / 1e9:.1f} GB in {ranks} files of {checkpoint['bytes_of_a_file'] / 1e9:.2f} GB, "
          "an index and the rest")  # fmt: skip
    return {
        "parameters": parameters,
        "step": what,
        **arguments,
        "loss_chunk": loss_chunk,
        "ranks": rows,
        "checkpoint": checkpoint,
    }


def hollow_of(model: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return build_network(model)


def _as_rank(
    rank: int, ranks: int, model: dict[str, Any], load: dict[str, Any], arguments: dict[str, Any]
) -> dict[str, Any]:
    """A row, of this process as one of so many, of which there are no others."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "scale"}
    told |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in told.items()}
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing here changes what it returns in place
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    network = hollow_of(model)
    loss = images(network, **load) if isinstance(network, ClassRefiner) else pack(network, **load)
    return {"rank": rank} | _step(network, loss, **arguments)


Loss = Callable[[Any], Tensor]  # of a network


def images(network: ClassRefiner, batch: int, loss_chunk: int | None = None) -> Loss:
    """The loss of so many corrupted maps, as training has it with such a `training.loss_chunk`."""

    def loss(network: ClassRefiner) -> Tensor:
        tokens = torch.zeros(batch, network.channels, 1, network.size, network.size, dtype=torch.long)
        ids = torch.arange(batch)
        t = corruption.signal_ratio(0, ids, 0, mean=-0.8, std=0.8)
        noisy = corruption.corrupt(tokens, t, network.classes, seed=0, ids=ids, step=0)
        labels = torch.zeros(batch, dtype=torch.long)
        if loss_chunk is not None:
            return network(noisy, t, labels, targets=tokens, loss_chunk=loss_chunk)[0].mean()
        return corruption.token_loss(network(noisy, t, labels), tokens)

    return loss


def pack(network: TextRefiner, pixels: int, text: int, max_tokens: int, loss_chunk: int | None = None) -> Loss:
    """The loss of a pack of as many images as fit, each with a caption; features come with the data."""
    count, side = max_tokens // (pixels + 1 + text), math.isqrt(pixels)
    if not count or side**2 != pixels:
        raise UserError(
            f"benchmark.pixels={pixels}: a square, of which one image and benchmark.text={text} fit "
            f"benchmark.max_tokens={max_tokens}"
        )

    def loss(network: TextRefiner) -> Tensor:
        device = torch.get_default_device()
        tokens = [torch.zeros(network.channels, 1, side, side, dtype=torch.long, device=device)] * count
        if loss_chunk is not None:
            chunked = {"targets": tokens, "loss_chunk": loss_chunk}
            return pack_logits(network, pixels, text, max_tokens, device, **chunked)[0].mean()
        return corruption.per_sample(pack_logits(network, pixels, text, max_tokens, device), tokens)[0].mean()

    return loss


def pack_logits(
    network: TextRefiner, pixels: int, text: int, max_tokens: int, device: torch.device, **options: Any
) -> Any:
    """Of the images of such a pack, or what `options` of the network ask for in their place."""
    count, side = max_tokens // (pixels + 1 + text), math.isqrt(pixels)
    tokens = torch.zeros(network.channels, 1, side, side, dtype=torch.long, device=device)
    features = torch.zeros(count * text, network.text_width, dtype=torch.bfloat16, device=device)
    return network([tokens] * count, torch.zeros(count, device=device), features, [text] * count, **options)


class _Sharded(lightning.LightningModule):
    def configure_model(self) -> None:
        """Lightning wants networks to be sharded here; `_step` does it."""


def _step(
    network: nn.Module, loss: Loss, *, shard_size: int | None, activations: Mode, averages: int
) -> dict[str, Any]:
    trainer = lightning.Trainer(
        accelerator="cpu", devices=dist.get_world_size(), strategy=FSDP(shard_size), precision="bf16-mixed",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    strategy: Any = trainer.strategy
    strategy.connect(_Sharded())
    strategy.setup_environment()
    with FakeTensorMode(allow_non_fake_inputs=True), Account() as account:
        strategy.shard(network)
        checkpoint_activations(network, activations)
        weights = [local(p.detach()) for p in network.parameters()]
        average = [[w.clone() for w in weights] for _ in range(averages)]
        optimizer = adamw(network, learning_rate=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
        for number in range(2):  # the first makes the optimizer's state
            if number == 1:
                account.begin({"weights": weights, "averages": [w for one in average for w in one]} | _state(optimizer))
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(network)
            value.backward()
            account.hold("gradients", [local(p.grad) for p in network.parameters() if p.grad is not None])
            clip_gradients(network.parameters(), 0.1)
            optimizer.step()
            if number == 1:
                break
            optimizer.zero_grad()
            for one in average:
                get_ema_multi_avg_fn(DECAY)(one, weights, 1)
    held = {name: account.bytes_of(name) for name in ("weights", "gradients", "optimizer", "averages")}
    sent = {name: account.sent.get(name, 0) for name in sorted(account.sent)}
    return {"bytes": held | account.rest, "peak_bytes": account.peak, "received_bytes": sent}


def _state(optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    return {"optimizer": [local(v) for values in optimizer.state.values() for v in values.values() if v.ndim]}


class Account(TorchDispatchMode):
    """Bytes of all tensors alive, by what holds them, and what collectives bring.

    FSDP empties the storage of weights that it has gathered and keeps it: sizes are asked for at every operator.

    Attributes:
        peak: most bytes alive since `begin`.
        rest: what of it nothing holds: activations, and what is gathered or not yet reduced.
        sent: bytes that this rank gets from others since `begin`, by collective.
    """

    def __init__(self):
        super().__init__()
        self._alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.begin({})

    def begin(self, held: Mapping[str, Iterable[Tensor]]) -> None:
        self.peak, self.rest, self.sent = 0, {}, {}
        self._held: dict[str, set[torch.UntypedStorage]] = {}
        for name, tensors in held.items():
            self.hold(name, tensors)
            self._alive -= self._held[name]  # counted once and for all
        self._fixed = sum(map(self.bytes_of, held))

    def hold(self, name: str, tensors: Iterable[Tensor]) -> None:
        self._held[name] = {tensor.untyped_storage() for tensor in tensors}

    def bytes_of(self, name: str) -> int:
        return sum(storage.nbytes() for storage in self._held.get(name, ()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):  # a DTensor's own storage would be that of the whole
                self._alive.add(getattr(leaf, "_local_tensor", leaf).untyped_storage())
        if func.namespace == "c10d":
            self._count(func, args)
        if not self._held:
            return result
        now = self._fixed + sum(storage.nbytes() for storage in self._alive)
        if now > self.peak:
            self.peak = now
            self.rest = {"activations": now - sum(map(self.bytes_of, self._held))}
        return result

    def _count(self, func: Any, args: Any) -> None:
        """Of the whole, all but what a rank has itself comes from others; of a sum, twice that (ring)."""
        name = func.name().partition("::")[2].strip("_")
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        whole = max((t.numel() * t.element_size() for t in tensors), default=0)
        group = next((it.size() for it in args if isinstance(it, dist.ProcessGroup)), None)
        if group is None:
            group = next(dist.ProcessGroup.unbox(it).size() for it in args if isinstance(it, torch.ScriptObject))
        share = (group - 1) / group * (2 if "allreduce" in name else 1)
        self.sent[name] = self.sent.get(name, 0) + round(whole * share)


PARTS = ("weights", "gradients", "optimizer", "averages", "activations")


def _table(
    rows: list[dict[str, Any]], parameters: int, ranks: int, shard_size: int | None, what: str, activations: str
) -> Table:
    table = Table(
        title=f"{parameters / 1e6:.1f} M parameters on {ranks} ranks in copies of {shard_size or ranks}",
        caption=f"GB a rank; {what}, activation_checkpointing={activations}; activations: all else at the peak, with "
        "gathered weights and gradients; received: in a step",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("rank", *PARTS, "peak", "received"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        values = [
            *(row["bytes"].get(part, 0) for part in PARTS),
            row["peak_bytes"],
            sum(row["received_bytes"].values()),
        ]
        table.add_row(str(row["rank"]), *(f"{value / 1e9:.2f}" for value in values))
    return table
