"""Images of stripes that are as wide as their label says."""

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SIZE, WIDTHS = 32, (1, 2, 4, 8)  # pixels


class Stripes(Dataset):
    """Samples {"pixels": uint8 [3, 1, 32, 32], "label": int}; where they begin is drawn by the sample's number."""

    def __init__(self, count: int, *, seed: int):
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor | int]:
        draws = torch.Generator().manual_seed(self.seed * 2**20 + number)
        label = number % len(WIDTHS)
        start = int(torch.randint(2 * WIDTHS[label], (), generator=draws))
        light = (torch.arange(SIZE) + start).div(WIDTHS[label], rounding_mode="floor") % 2 * 255
        return {"pixels": light.to(torch.uint8).expand(3, 1, SIZE, SIZE), "label": label}


class StripesData(LightningDataModule):
    """Args:
    count: images to train from.
    batch_size: of training and validation.
    seed: of the images.
    """

    def __init__(self, *, count: int = 1000, batch_size: int = 20, seed: int = 0):
        super().__init__()
        self.splits = {"train": Stripes(count, seed=seed), "val": Stripes(100, seed=seed + 1)}
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.splits["train"], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self.split_dataloader("val")

    def split_dataloader(self, split: str) -> DataLoader:
        """The whole split once, in order; only scores need it."""
        return DataLoader(self.splits[split], self.batch_size)
