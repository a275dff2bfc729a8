"""Token shards of captioned images and clips: what `grn.encode` makes of text refiners' data, packed as those are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grn.data.captions import Captions, caption_draws
from grn.data.datamodule import SPLITS
from grn.data.samples import is_mirrored
from grn.data.text_features import FeatureForm, encoder_record, is_encoder_record
from grn.data.text_images import PackedDataModule, PackedTokens, TextImageDataModule
from grn.data.text_videos import TextVideoDataModule
from grn.data.tokens import Encoded, is_count, read_view
from grn.media.skips import Reason, Skip
from grn.networks.text_encoder import DTYPES, PretrainedT5, TextEncoder
from grn.runtime.errors import UserError

PLACES = {"name", "root", *SPLITS}  # what a source has beside what decides which pixels of a sample are encoded:
OF_IMAGES = ("pixels", "resolutions", "min_size", "max_aspect")
OF_CLIPS = ("fps", "bucket", "max_frames")


@dataclass(frozen=True)
class TextTokenDecoder:
    """Raw webdataset sample -> packed tokens with a caption and key (a callable for `ShardDataset`).

    The draws are those of `TextImageDecoder`.

    Args:
        sizes: the (h, w) that a sample may have.
        latents: how many it may have.
        width: bytes of a position, ceil(z*M/8).
        captions: which are drawn, and how.
        features: of the captions, where the shards have them; None: they are not read.
        flip: take the mirrored view of every other sample, by the draw that pixels are mirrored by.
        seed: the run's seed.
    """

    sizes: frozenset[tuple[int, int]]
    latents: int
    width: int
    captions: Captions
    features: FeatureForm | None = None
    flip: bool = False
    seed: int = 0

    def __call__(self, raw: Mapping[str, object], pass_number: int) -> dict:
        """-> {"bits": uint8 [T', h, w, width], "caption": str, "key": str}; with `features` also {"features": Tensor
        [tokens, text width], None for the empty caption}.

        Raises:
            Skip: with the reason.
        """
        key = raw["__key__"]
        name, caption = self.captions.draw(raw, caption_draws(self.seed, pass_number, key))
        mirrored = self.flip and is_mirrored(self.seed, pass_number, key)
        bits = read_view(raw, mirrored=mirrored, width=self.width)
        if bits.shape[0] > self.latents or tuple(bits.shape[1:3]) not in self.sizes:
            raise Skip(Reason.BAD_TOKENS)
        sample = {"bits": bits, "caption": caption, "key": key}
        if self.features is not None:
            sample["features"] = self.features.read(raw, name) if caption else None
        return sample


class TextTokensDataModule(Encoded, PackedDataModule):
    """Captioned images or clips from the token shards of `grn.encode`, packed without padding.

    They are what the tokenizer makes of the pixel shards' samples in the size that each was encoded in, with the same
    captions and, sample by sample and pass by pass, the same one of several, dropped alike and mirrored alike; in the
    same order, too, where no sample was rejected and the keys of the loader are the same. Of a video its middle clip
    was encoded, once, where training from pixels draws others; several clips of a long one are not made.

    Batches are what `PackedDataModule` gives, with "bits" in place of "pixels" (`collate_lists`), and with "features".

    Args:
        features: use the text features that the shards have, so that training need not compute them; None: where they
            have some.
        others: as `Encoded` and `PackedDataModule` have them.

    Raises:
        UserError: `root` holds no such shards, or not the features asked for.
    """

    captioned = True

    def __init__(self, *, features: bool | None = None, **others: Any):
        super().__init__(**others)
        self.text: dict[str, Any] = self.manifest["text"]
        self.encoder: dict[str, Any] | None = self.text["encoder"]
        if self.encoder is not None:
            self.encoder = {"clean_captions": False} | self.encoder  # of shards from before there was a choice
        if features and self.encoder is None:
            raise UserError(
                f"{self.key}.features=true, but {self.root} has none: encode it with text_encoder=..., or "
                f"{self.key}.features=null"
            )
        self.features = None
        if self.encoder is not None and features is not False:
            form = self.encoder
            self.features = FeatureForm(form["width"], DTYPES[form["dtype"]], form["max_length"])
            if odd := [name for name, _ in self.captions.weights if name not in self.text["captions"]]:
                raise UserError(
                    f"{self.key}.captions={dict(self.captions.weights)}: {self.root} has no features of {odd[0]}, only "
                    f"of {', '.join(self.text['captions'])}; encode it again, or {self.key}.features=false"
                )
            if self.captions.sentence_dropout:
                raise UserError(
                    f"{self.key}.sentence_dropout={self.captions.sentence_dropout}: {self.root} has features of whole "
                    f"captions alone: leave it out, or give {self.key}.features=false"
                )
            for name, own in (("prefix", self.captions.prefix), ("suffix", self.captions.suffix)):
                if own != (known := self.text.get(f"caption_{name}", "")):
                    raise UserError(
                        f"{self.key}.caption_{name}={own!r}: {self.root} has features of captions with {known!r}: give "
                        f"that, encode it again, or {self.key}.features=false"
                    )

    @property
    def contents(self) -> str:
        return "tokens" if self.features is None else "tokens with text features"

    def check_packing(self, tokens: PackedTokens) -> None:
        """As of `PackedDataModule`.

        Raises:
            UserError: a sample may be too large for a pack.
        """
        height, width = max(self.text["sizes"], key=math.prod)
        shape = (self.text["latents"], height, width)
        if (count := math.prod(shape) + 2) > self.max_tokens:
            raise UserError(
                f"{self.key}.max_tokens={self.max_tokens} holds no sample of {'x'.join(map(str, shape))} tokens, "
                f"{count} at least, such as {self.root} may have: give more"
            )

    def check_text_encoder(self, encoder: TextEncoder | None) -> None:
        """For features that were computed ahead.

        Args:
            encoder: the run's frozen one; None: it trains its own.

        Raises:
            UserError: the shards' features are of another one.
        """
        known = self.encoder
        if self.features is None or known is None:
            return
        own = encoder_record(encoder) if isinstance(encoder, PretrainedT5) else None
        alike = ("sha256", "max_length", "clean_captions", "width", "dtype")
        if own is None or any(own[key] != known[key] for key in alike):
            told = f"max_length {known['max_length']}, clean_captions {str(known['clean_captions']).lower()}"
            kind = "trained along" if encoder is None else "another one"
            raise UserError(
                f"{self.key}.root={self.root} has features of the text encoder {known['source']} ({told}, sha256 "
                f"{known['sha256'][:12]}), and text_encoder is {kind}: give that one, or {self.key}.features=false"
            )

    def decoder(self, *, training: bool) -> TextTokenDecoder:
        return TextTokenDecoder(
            sizes=frozenset(map(tuple, self.text["sizes"])),
            latents=self.text["latents"],
            width=self.token_bytes,
            captions=self.drawn_captions(training=training),
            features=self.features,
            flip=self.flip and training,
            seed=self.seed,
        )

    def _pixels(self, source: Mapping[str, Any], **places: Any) -> TextImageDataModule:
        arguments = {name: value for name, value in source.items() if name not in PLACES}
        kind = TextVideoDataModule if "fps" in arguments else TextImageDataModule
        return kind(captions=dict(self.captions.weights), max_tokens=self.max_tokens, **arguments, **places)

    def _manifest_fits(self) -> bool:
        text, source = self.manifest["text"], self.manifest.get("source")
        return (
            super()._manifest_fits()
            and isinstance(text, dict)
            and is_count(text.get("latents"))
            and isinstance(text.get("sizes"), list)
            and len(text["sizes"]) > 0
            and all(isinstance(size, list) and len(size) == 2 and all(map(is_count, size)) for size in text["sizes"])
            and isinstance(text.get("captions"), list)
            and all(isinstance(name, str) for name in text["captions"])
            and "encoder" in text
            and (text["encoder"] is None or is_encoder_record(text["encoder"]))
            and source is not None
            and self._source_fits(source)
        )

    def _source_fits(self, source: Mapping[str, Any]) -> bool:
        if source.keys() - PLACES not in (set(OF_IMAGES), {*OF_IMAGES, *OF_CLIPS}):
            return False
        try:
            self._pixels(source, name="pixels", batch_size=1)
        except (UserError, TypeError, ValueError, ArithmeticError, AttributeError):
            return False
        return True


def pixel_arguments(data: TextImageDataModule) -> dict[str, Any]:
    """The arguments that decide which pixels of a sample are encoded (JSON values), for `source` in the manifest."""
    arguments = {name: getattr(data, name) for name in OF_IMAGES}
    if isinstance(data, TextVideoDataModule):
        arguments |= {"fps": float(data.fps), "bucket": float(data.bucket), "max_frames": data.max_frames}
    return arguments
