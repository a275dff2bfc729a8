"""The judge of digits: a classifier, independent of the model, that reads samples."""

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.svm import SVC
from torch import Tensor

from grn.metrics.intervals import of_share
from grn.metrics.ranks import Totals
from grn.metrics.splits import Split, grey, labelled_images
from grn.runtime.errors import UserError

CELLS = 8  # scikit-learn's digits are 8x8 drawings: what a judge needs of one is in so many means


class DigitsJudge:
    """A support vector classifier of the real training images reads the generated ones.

    It shares nothing with the generator or the FID's extractor: an RBF-kernel SVC (scikit-learn, C = 10, gamma = scale)
    on the 8x8 cell means of the gray image. `compute` gives `judge_accuracy` (share of images read as the label they
    were asked for), `judge_accuracy_<class>` for every class asked for, and `judge_val_accuracy` (the same on the
    real held-out images: how far to trust it).

    Args:
        train, val: the splits (`grn.metrics.splits`), with labels.
        device: where the counts are kept for the reduction over ranks; the SVC runs on the CPU.
        cache_dir: not used.

    Raises:
        UserError: a split without images or labels, or training images of a single class.
    """

    def __init__(
        self,
        *,
        train: Split,
        val: Split,
        device: torch.device | str = "cpu",
        cache_dir: str | Path | None = None,
    ):
        images, labels = labelled_images(train, name="training")
        if len(labels.unique()) < 2:
            raise UserError("scores.judge: the training split must have at least two classes")
        self.classes = int(labels.max()) + 1
        self.svc = SVC(kernel="rbf", C=10.0, gamma="scale").fit(_cell_means(images), labels.numpy())
        images, labels = labelled_images(val, name="held-out")
        self.val_accuracy = (self.read(images) == labels).double().mean().item()
        self.counts = Totals(2, self.classes, dtype=torch.int64).to(device)  # asked for, and read as such

    def read(self, images: Tensor) -> Tensor:
        """The classes read off images uint8 [B, 3, H, W]: int64 [B], on the CPU."""
        return torch.from_numpy(self.svc.predict(_cell_means(images))).to(torch.int64)

    def update(self, images: Tensor, labels: Tensor, ids: Tensor | None = None) -> None:
        """Adds generated images uint8 [B, 3, H, W] and the labels int64 [B] that were asked for; ids are not read.

        Raises:
            UserError: a label that the training split does not have.
        """
        labels = labels.cpu()
        if labels.min() < 0 or labels.max() >= self.classes:
            raise UserError(f"labels: the judge knows the classes 0 to {self.classes - 1}, got {labels.tolist()}")
        right = labels[self.read(images) == labels]
        self.counts.update(torch.stack([torch.bincount(x, minlength=self.classes) for x in (labels, right)]))

    def compute(self) -> dict[str, float]:
        """The scores of all images given since the last `reset`, over all ranks; every rank must call it.

        Raises:
            UserError: no image was given.
        """
        asked, right = self.counts.compute().tolist()
        if not sum(asked):
            raise UserError("scores.judge: no images to judge: generate at least one")
        scores = {"judge_accuracy": sum(right) / sum(asked)}
        scores |= {f"judge_accuracy_{c}": right[c] / asked[c] for c in range(self.classes) if asked[c]}
        return scores | {"judge_val_accuracy": self.val_accuracy}

    def uncertainty(self) -> dict[str, float]:
        """As in `grn.evaluation.scoring.uncertainties`."""
        asked, right = self.counts.compute().sum(dim=1).tolist()
        return {"judge_accuracy": of_share(right, asked)}

    def reset(self) -> None:
        """Forgets the generated images."""
        self.counts.reset()


def _cell_means(images: Tensor):
    """uint8 [B, 3, H, W] -> numpy float32 [B, 64] in [0, 1]."""
    return F.adaptive_avg_pool2d(grey(images.cpu()).unsqueeze(1), CELLS).flatten(1).numpy()
