"""Scikit-learn's digits as the shards have them: 32x32 RGB, 1500 to train and 297 held out, stratified."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from grn.toys.digits_classifier import digits_classifier_weights


@pytest.fixture(scope="session")
def digits():
    """{"train": (images uint8 [1500, 3, 32, 32], labels int64 [1500]), "val": (the same of 297)}."""
    raw = load_digits()
    grey = np.round(raw.images / 16 * 255).astype(np.uint8)
    rgb = [np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")) for x in grey]
    images, labels = torch.from_numpy(np.stack(rgb)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(raw.target)
    train, val = train_test_split(np.arange(len(labels)), test_size=297, stratify=raw.target, random_state=0)
    return {"train": (images[train], labels[train]), "val": (images[val], labels[val])}


@pytest.fixture(scope="session")
def make_split():
    """make_split(images, labels, batch) -> a split: what a datamodule gives a score, with its time axis."""

    def make(images, labels=None, batch=100):
        def batches():
            for start in range(0, len(images), batch):
                yield {"pixels": images[start : start + batch].unsqueeze(2)} | (
                    {} if labels is None else {"label": labels[start : start + batch]}
                )

        return batches

    return make


@pytest.fixture(scope="session")
def splits(digits, make_split):
    """The keyword arguments `train` and `val` of every score."""
    return {name: make_split(*data) for name, data in digits.items()}


@pytest.fixture(scope="session")
def classifier_weights(digits, built_once):
    def build(folder):
        digits_classifier_weights(*digits["train"], folder)

    return digits_classifier_weights(*digits["train"], built_once("digits_classifier", build))
