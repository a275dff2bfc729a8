"""A feature extractor for handwritten digits, trained in seconds: FID without Inception weights.

Importing this module registers `digits-classifier` with torch-fidelity: a small convolutional network that
`digits_classifier_weights` trains from the training split in seconds.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from grn.metrics.splits import grey, image_digest
from grn.runtime.errors import UserError
from grn.runtime.locks import write_cached
from grn.toys.fitting import fitted
from grn.weights.mapping import load_strict

NAME = "digits-classifier"
CLASSES = 10
SIZE = 32

EPOCHS, BATCH, LEARNING_RATE, SEED = 12, 50, 2e-3, 0
# Part of the cache key, as the weights are of the recipe too.
RECIPE = f"three convolutions 16 32 64, GELU 64, {EPOCHS} epochs of {BATCH}, {LEARNING_RATE}, {SEED}"


class DigitsClassifier(FeatureExtractorBase):
    """uint8 [B, 3, 32, 32] -> features `64` (float32 [B, 64], after the GELU) and `logits` (float32 [B, 10]).

    Args:
        name: the registered name.
        features_list: which of the two to give.
        feature_extractor_weights_path: safetensors that `digits_classifier_weights` made.
        kwargs: torch-fidelity's other settings, none of which apply.

    Raises:
        UserError: no weights, or not this network's.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs
    ):
        super().__init__(name, features_list)
        self.network = _network()
        if feature_extractor_weights_path is None:
            raise UserError(
                f"scores.fid.weights: {NAME} has none to download: give the callable that trains them "
                "(grn.toys.digits_classifier.digits_classifier_weights, see conf/scores/digits.yaml)"
            )
        try:
            state = load_file(feature_extractor_weights_path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"scores.fid.weights: {feature_extractor_weights_path} is not a readable safetensors file: delete it"
            ) from error
        load_strict(self.network, state, source=f"scores.fid.weights: {feature_extractor_weights_path}")
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "64", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": "logits", "fid": "64", "kid": "64", "prc": "64"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        features = self.network.features(_inputs(input))
        given = {"64": features, "logits": self.network.head(features)}
        return tuple(given[name] for name in self.features_list)


if NAME not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(NAME, DigitsClassifier)


def digits_classifier_weights(train_images: Tensor, labels: Tensor, cache_dir: str | Path) -> Path:
    """Trains the classifier, or finds the weights an earlier call trained from the same images and labels.

    Always on the CPU, from a fixed seed and in the order given; the caller's random state is left alone, and it may be
    in no_grad, inference mode or autocast.

    Args:
        train_images: uint8 [N, 3, 32, 32].
        labels: int64 [N] in [0, 10).
        cache_dir: the folder of `digits-classifier-<hash>.safetensors`; made if missing.

    Returns:
        The path of the weights.

    Raises:
        UserError: images of another size or labels out of range.
    """
    if len(labels) != len(train_images) or not len(labels) or labels.min() < 0 or labels.max() >= CLASSES:
        raise UserError(f"scores.fid.extractor: {NAME} needs a label in [0, {CLASSES}) for each training image")
    digest = hashlib.sha256(RECIPE.encode())
    digest.update(image_digest([train_images]).encode())
    digest.update(labels.cpu().to(torch.int64).numpy().tobytes())
    path = Path(cache_dir) / f"{NAME}-{digest.hexdigest()[:8]}.safetensors"
    if not path.is_file():
        state = _train(train_images, labels)
        write_cached(path, lambda temporary: save_file(state, temporary))
    return path


def _train(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    def begin() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        network = _network()
        inputs, known = _inputs(images.cpu()), labels.cpu().clone()

        def loss(index: Tensor) -> Tensor:
            # Shifts by a pixel or two, the one augmentation that keeps every digit what it is.
            shift = torch.randint(-2, 3, (2,)).tolist()
            return F.cross_entropy(network(inputs[index].roll(shift, dims=(2, 3))), known[index])

        return network, loss

    return fitted(begin, len(images), epochs=EPOCHS, batch_size=BATCH, learning_rate=LEARNING_RATE, seed=SEED)


class _Network(nn.Sequential):
    features: nn.Sequential
    head: nn.Linear


def _network() -> _Network:
    """float32 [B, 1, 32, 32] in [-1, 1] -> logits [B, 10]; `features` and `head` are its two parts."""
    network = _Network()
    network.add_module(
        "features",
        nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 16, 64), nn.GELU()),
        ),
    )
    network.add_module("head", nn.Linear(64, CLASSES))
    return network


def _inputs(images: Tensor) -> Tensor:
    if images.shape[1:] != (3, SIZE, SIZE) or images.dtype != torch.uint8:
        raise UserError(
            f"scores.fid.extractor: {NAME} reads uint8 [B, 3, {SIZE}, {SIZE}] images, "
            f"got {images.dtype} {list(images.shape)}"
        )
    return grey(images).unsqueeze(1) * 2 - 1
