"""Features of a frozen text encoder beside the tokens of captioned samples: what `grn.encode text_encoder=...` adds.

A sample has `key.features.safetensors`: name of a caption (`grn.data.samples.read_captions`) -> features
[tokens, width] in the encoder's own dtype. The manifest knows the encoder: the hash of its weights and vocabulary, and
how many tokens it takes of a caption. The empty caption's features are not among them: the run's encoder gives them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from grn.checkpoints.native import weights_hash
from grn.data.samples import FEATURE_SUFFIXES, needed
from grn.media.skips import Reason, Skip
from grn.networks.text_encoder import DTYPES, PretrainedT5


@dataclass(frozen=True)
class FeatureForm:
    """What features of a caption are: `dtype` [1..max_length, width]."""

    width: int
    dtype: torch.dtype
    max_length: int

    def read(self, raw: Mapping[str, object], name: str) -> Tensor:
        """Those of the caption `name` of a raw sample, none of which is trusted.

        Raises:
            Skip: there are none, of another form, or not finite.
        """
        data = needed(raw, FEATURE_SUFFIXES, Reason.NO_FEATURES)
        try:
            features = load(data).get(name)
        except MemoryError:
            raise
        except Exception:  # what safetensors raises on broken files has no common base
            raise Skip(Reason.BAD_FEATURES) from None
        if features is None:
            raise Skip(Reason.NO_FEATURES)
        fits = features.ndim == 2 and 1 <= len(features) <= self.max_length and features.shape[1] == self.width
        if not fits or features.dtype != self.dtype or not features.isfinite().all():
            raise Skip(Reason.BAD_FEATURES)
        return features


def encoder_record(encoder: PretrainedT5) -> dict[str, Any]:
    """What tells an encoder from others, and of which form its features are (JSON values)."""
    parts = [weights_hash(encoder.encoder.state_dict()), *sorted(encoder.tokenizer.get_vocab().items())]
    return {
        "sha256": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        "source": encoder.reference["weights"] or encoder.reference["path"],
        "width": encoder.width,
        "dtype": encoder.reference["dtype"],
        "max_length": encoder.max_length,
        "clean_captions": encoder.clean_captions,
    }


def is_encoder_record(record: object) -> bool:
    """Whether a manifest's value is what `encoder_record` gives."""
    return (
        isinstance(record, dict)
        and all(isinstance(record.get(key), str) for key in ("sha256", "source"))
        and all(type(record.get(key)) is int and 1 <= record[key] <= 2**16 for key in ("width", "max_length"))
        and record.get("dtype") in DTYPES
        and isinstance(record.get("clean_captions", False), bool)  # earlier ones lack it: they were not
    )


@torch.inference_mode()
def encode_captions(
    encoder: PretrainedT5, captions: Sequence[Mapping[str, str]], *, batch_size: int
) -> list[dict[str, Tensor]]:
    """Samples' captions by name -> their features by name, on the CPU; so many texts at a time."""
    texts = [text for own in captions for text in own.values()]
    features = []
    for start in range(0, len(texts), batch_size):
        joined, lengths = encoder(texts[start : start + batch_size])
        features += joined.cpu().split(lengths)
    found = iter(features)
    return [{name: next(found) for name in own} for own in captions]


def write_features(features: Mapping[str, Tensor]) -> bytes:
    """Name of a caption -> its features [tokens, width], as a safetensors file."""
    return save({name: tensor.contiguous() for name, tensor in features.items()})
