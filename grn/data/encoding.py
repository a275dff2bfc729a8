"""From the pixels of a shard to its tokens: what `grn.encode` runs on every shard, in as many processes as wanted."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grn import hbq
from grn.checkpoints.native import load_tokenizer
from grn.data.clips import ClipDecoder
from grn.data.partial import Rejected
from grn.data.samples import (
    CAPTION_SUFFIXES,
    LABEL_SUFFIXES,
    METADATA_SUFFIXES,
    TOKEN_SUFFIXES,
    ImageDecoder,
    Reason,
    Skip,
)
from grn.data.streaming import MAX_ENTRY_BYTES, read_shard
from grn.data.tokens import write_array
from grn.errors import UserError
from grn.networks.tokenizer import HBQTokenizer, for_inference
from grn.pixels import from_uint8

KEPT_SUFFIXES = (*LABEL_SUFFIXES, *CAPTION_SUFFIXES, *METADATA_SUFFIXES)


@dataclass
class ShardEncoder:
    """The url of a pixel shard -> its samples with tokens in place of pixels, in their order (for `write_shards`).

    Args:
        tokenizer: arguments of `grn.checkpoints.native.load_tokenizer`; read once in every process.
        decode: pixels out of a raw sample, without random augmentation.
        mirrored: whether to encode the mirrored image too, as a second view.
        batch_size: samples at once, each with all its views.
        device: where to encode; None: the accelerator of this machine that the process's number falls on, or the CPU.
        first_process: number of this process, and of its first worker, among all that share this machine.
        bf16, compile: `for_inference`; in bfloat16, features near the edge of a bin may fall to the other side.
        processes: how many workers this process has started; 1 without.
    """

    tokenizer: dict[str, Any]
    decode: ImageDecoder | ClipDecoder
    mirrored: bool
    batch_size: int
    device: str | None = None
    bf16: bool = False
    compile: bool = False
    first_process: int = 0
    processes: int = 1
    _network: HBQTokenizer | None = field(default=None, repr=False)

    def start_worker(self, index: int, network: HBQTokenizer | None = None) -> None:
        """Called once in each process, before its first shard; reads the tokenizer unless it is given."""
        if self.device is None and torch.accelerator.is_available():
            number = (self.first_process + index) % torch.accelerator.device_count()
            self.device = f"{torch.accelerator.current_accelerator()}:{number}"
        if self.processes > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // self.processes))
        if network is None:
            network, _ = load_tokenizer(**self.tokenizer, embed=False)
        dtype = torch.bfloat16 if self.bf16 else None
        self._network = for_inference(network.to(self.device or "cpu"), dtype=dtype, compile=self.compile)

    def __call__(self, url: str) -> Iterator[dict | Rejected]:
        """Raises:
        UserError: the shard cannot be read, now at least; a damaged one is encoded as far as it goes.
        """
        batch: list[tuple[dict, Tensor]] = []
        for item in self._decoded(url):
            if isinstance(item, Rejected):
                yield item
                continue
            batch.append(item)
            if len(batch) == self.batch_size:
                yield from self._encoded(batch)
                batch = []
        if batch:
            yield from self._encoded(batch)

    def _decoded(self, url: str) -> Iterator[tuple[dict, Tensor] | Rejected]:
        """Decodes in threads, a batch ahead of the network."""
        ahead: deque[Future] = deque()
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for raw in self._read(url):
                ahead.append(pool.submit(self._pixels, raw))
                if len(ahead) > self.batch_size:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _pixels(self, raw: dict | Rejected) -> tuple[dict, Tensor] | Rejected:
        if isinstance(raw, Rejected):
            return raw
        try:
            return raw, self.decode(raw, 0)["pixels"]
        except Skip as skip:
            return Rejected(raw["__key__"], skip.reason.value)

    def _read(self, url: str) -> Iterator[dict | Rejected]:
        try:
            yield from read_shard(url, MAX_ENTRY_BYTES)
        except OSError as error:  # a lost mount, a failed download: tokens that are missing for that would be missed
            raise UserError(f"{url} cannot be read ({error}): run the same command again to go on from here") from None
        except MemoryError:
            raise
        except Exception as error:  # what broken archives raise has no common base
            yield Rejected(url, f"{Reason.BROKEN_SHARD.value} ({type(error).__name__}: {error})")

    @torch.inference_mode()
    def _encoded(self, batch: list[tuple[dict, Tensor]]) -> Iterator[dict]:
        network = self._network
        pixels = torch.stack([pixels for _, pixels in batch]).to(network.encoder.stem.weight.device)
        views = [pixels, pixels.flip(-1)] if self.mirrored else [pixels]
        bits = [network.tokenize(from_uint8(view), "bit") for view in views]
        arrays = torch.stack([hbq.pack(b) for b in bits], dim=1).cpu().numpy()
        for (raw, _), array in zip(batch, arrays):
            kept = {suffix: raw[suffix] for suffix in KEPT_SUFFIXES if isinstance(raw.get(suffix), bytes)}
            yield {"__key__": raw["__key__"], TOKEN_SUFFIXES[0]: write_array(array)} | kept
