"""Images in shards, with labels or captions: the digits, ImageNet, and folders of captioned images."""

from typing import Any

from grn.data.datamodule import ShardsDataModule
from grn.data.manifest import how_to_make
from grn.data.samples import ImageDecoder
from grn.runtime.errors import UserError, check_count


class ImageShardsDataModule(ShardsDataModule):
    """Images from webdataset shards (`key.jpg` or another of `IMAGE_SUFFIXES`, `key.cls`, `key.txt` or `key.json`).

    Batches are {"pixels": uint8 [B, 3, 1, H, W], "label": int64 [B] (with `num_labels`), "caption": list[str] (where
    there are any), "key": list[str]}.

    Args:
        image_size: height and width of the images, in pixels; None is refused: no manifest tells it.
        flip: mirror training images at random.
        center_crop: resize and crop other sizes to `image_size`; else they are skipped.
        shards: as `ShardsDataModule` has them.
    """

    def __init__(self, *, image_size: int | None, flip: bool = False, center_crop: bool = False, **shards: Any):
        super().__init__(**shards)
        if image_size is None:
            raise UserError(
                f"{self.key}.root={self.root} has no manifest that tells the size of its images: "
                f"{how_to_make(self.name, f'{self.key}.root')}; or give {self.key}.image_size"
            )
        check_count(f"{self.key}.image_size", image_size)
        self.image_size, self.flip, self.center_crop = image_size, flip, center_crop

    def decoder(self, *, training: bool) -> ImageDecoder:
        return ImageDecoder(
            image_size=self.image_size,
            num_labels=self.num_labels,
            center_crop=self.center_crop,
            flip=self.flip and training,
            seed=self.seed,
        )
