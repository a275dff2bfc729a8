"""From the pixels of a shard to its tokens: what `grn.encode` runs on every shard, in as many processes as wanted."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from grn.checkpoints.native import load_tokenizer
from grn.data.captions import Captions
from grn.data.clips import ClipDecoder
from grn.data.prepare.partial import Noted, Rejected
from grn.data.samples import (
    CAPTION_SUFFIXES,
    FEATURE_SUFFIXES,
    LABEL_SUFFIXES,
    METADATA_SUFFIXES,
    TOKEN_SUFFIXES,
    ImageDecoder,
    by_shape,
    decode_or_skip,
    read_captions,
)
from grn.data.stream.streaming import MAX_ENTRY_BYTES, read_shard
from grn.data.text_features import encode_captions, write_features
from grn.data.text_images import TextImageDecoder
from grn.data.text_videos import TextVideoDecoder
from grn.data.tokens import pack_bits, write_array
from grn.media.pixels import from_uint8
from grn.media.skips import Note, Reason, Skip, noting
from grn.method import hbq
from grn.networks.text_encoder import PretrainedT5
from grn.networks.tokenizer import HBQTokenizer, for_inference
from grn.runtime.errors import UserError

KEPT_SUFFIXES = (*LABEL_SUFFIXES, *CAPTION_SUFFIXES, *METADATA_SUFFIXES)
# Of a batch of clips that is encoded at once, as many as 64 images of 256x256 have: a stream takes up to twice the time
# for a few clips of 32x32.
WHOLE_PIXELS = 2**22


@dataclass
class ShardEncoder:
    """The url of a pixel shard -> its samples with tokens in place of pixels, in their order (for `write_shards`).

    Of samples of several sizes, those of one size that stand in the same batch are encoded at once.

    Args:
        tokenizer: arguments of `grn.checkpoints.native.load_tokenizer`; read once in every process.
        decode: pixels out of a raw sample, without random augmentation.
        mirrored: whether to encode the mirrored image too, as a second view.
        batch_size: samples at once, each with all its views; these, and as many again, are in memory as pixels.
        device: where to encode; None: the accelerator of this machine that the process's number falls on, or the CPU.
        first_process: number of this process, and of its first worker, among all that share this machine.
        bf16, compile: `for_inference`; in bfloat16, features near the edge of a bin may fall to the other side.
        processes: how many workers this process has started; 1 without.
        text_encoder: config of the frozen text encoder whose features are written, too; None: without them.
        captions: those that features are written of.
    """

    tokenizer: dict[str, Any]
    decode: ImageDecoder | ClipDecoder | TextImageDecoder | TextVideoDecoder
    mirrored: bool
    batch_size: int
    device: str | None = None
    bf16: bool = False
    compile: bool = False
    first_process: int = 0
    processes: int = 1
    text_encoder: dict[str, Any] | None = None
    captions: Captions | None = None
    _network: HBQTokenizer | None = field(default=None, repr=False)
    _text_encoder: PretrainedT5 | None = field(default=None, repr=False)

    def start_worker(
        self, index: int, network: HBQTokenizer | None = None, text_encoder: PretrainedT5 | None = None
    ) -> None:
        """Called once in each process, before its first shard; reads the networks unless they are given."""
        if self.device is None and torch.accelerator.is_available():
            number = (self.first_process + index) % torch.accelerator.device_count()
            self.device = f"{torch.accelerator.current_accelerator()}:{number}"
        if self.processes > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // self.processes))
        if network is None:
            network, _ = load_tokenizer(**self.tokenizer, embed=False)
        dtype = torch.bfloat16 if self.bf16 else None
        self._network = for_inference(network.to(self.device or "cpu"), dtype=dtype, compile=self.compile)
        if self.text_encoder is not None:
            self._text_encoder = (text_encoder or instantiate(self.text_encoder)).to(self.device or "cpu")

    def __call__(self, url: str) -> Iterator[dict | Rejected | Noted]:
        """Raises:
        UserError: the shard cannot be read, now at least; a damaged one is encoded as far as it goes.
        """
        batch: list[tuple[dict, Tensor]] = []
        for item in self._decoded(url):
            if isinstance(item, (Rejected, Noted)):
                yield item
                continue
            batch.append(item)
            if len(batch) == self.batch_size:
                yield from self._encoded(batch)
                batch = []
        if batch:
            yield from self._encoded(batch)

    def _decoded(self, url: str) -> Iterator[tuple[dict, Tensor] | Rejected | Noted]:
        """Decodes in threads, a batch ahead of the network."""
        ahead: deque[Future] = deque()
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for raw in self._read(url):
                ahead.append(pool.submit(self._pixels, raw))
                if len(ahead) > self.batch_size:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()

    def _pixels(self, raw: dict | Rejected) -> list[tuple[dict, Tensor] | Rejected | Noted]:
        """A sample and what there is to note on it."""
        if isinstance(raw, Rejected):
            return [raw]
        try:
            with noting() as notes:
                pixels = decode_or_skip(self.decode, raw, 0)["pixels"]
        except Skip as skip:
            return [Rejected(raw["__key__"], skip.reason.value)]
        return [*(Noted(raw["__key__"], note.value) for note in notes), (raw, pixels)]

    def _read(self, url: str) -> Iterator[dict | Rejected]:
        try:
            yield from read_shard(url, MAX_ENTRY_BYTES)
        except OSError as error:  # a lost mount, a failed download: tokens that are missing for that would be missed
            raise UserError(f"{url} cannot be read ({error}): run the same command again to resume") from None
        except MemoryError:
            raise
        except Exception as error:  # what broken archives raise has no common base
            yield Rejected(url, f"{Reason.BROKEN_SHARD.value} ({type(error).__name__}: {error})")

    def _encoded(self, batch: list[tuple[dict, Tensor]]) -> Iterator[dict | Noted]:
        raws = [raw for raw, _ in batch]
        written = [{TOKEN_SUFFIXES[0]: tokens} for tokens in self._tokens([pixels for _, pixels in batch])]
        if self._text_encoder is not None:
            assert self.captions is not None  # which are given with it
            names = [name for name, _ in self.captions.weights]
            captions = [
                {name: self.captions.worded(raw, caption) for name, caption in read_captions(raw, names).items()}
                for raw in raws
            ]
            features = encode_captions(self._text_encoder, captions, batch_size=self.batch_size)
            for raw, own in zip(raws, captions):
                if any(map(self._text_encoder.tokenization.is_cut, own.values())):
                    yield Noted(raw["__key__"], Note.CUT_CAPTION.value)
            written = [own | {FEATURE_SUFFIXES[0]: write_features(f)} for own, f in zip(written, features)]
        for raw, own in zip(raws, written):
            kept = {suffix: raw[suffix] for suffix in KEPT_SUFFIXES if isinstance(raw.get(suffix), bytes)}
            yield {"__key__": raw["__key__"]} | own | kept

    @torch.inference_mode()
    def _tokens(self, pixels: list[Tensor]) -> list[bytes]:
        """Each sample's views as an npy file."""
        network, arrays = self._network, [b""] * len(pixels)
        assert network is not None  # of a worker that was started
        for places in by_shape(pixels):
            same = torch.stack([pixels[place] for place in places]).to(network.encoder.stem.weight.device)
            views = [same, same.flip(-1)] if self.mirrored else [same]
            bits = [_tokenize(network, view) for view in views]
            for place, array in zip(places, torch.stack([pack_bits(b) for b in bits], dim=1).cpu().numpy()):
                arrays[place] = write_array(array)
        return arrays


def _tokenize(network: HBQTokenizer, pixels: Tensor) -> Tensor:
    """uint8 [B, 3, T, H, W] -> int64 `bit` tokens [B, D, T', h, w]; long clips in memory that does not grow with T."""
    if pixels.shape[2] == 1 or pixels[:, 0].numel() <= WHOLE_PIXELS:
        return network.tokenize(from_uint8(pixels), "bit")
    latents = network.encode_stream(map(from_uint8, pixels.unbind(2)))
    return torch.stack([hbq.tokens(latent, network.rounds, "bit") for latent in latents], dim=2)
