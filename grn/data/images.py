"""Images in shards, with labels or captions: the digits, ImageNet, and folders of captioned images."""

from typing import Any

from grn.data.datamodule import ShardsDataModule
from grn.data.samples import ImageDecoder
from grn.errors import UserError


class ImageShardsDataModule(ShardsDataModule):
    """Images from webdataset shards (`key.{png,jpg,webp}`, `key.cls`, `key.txt` or `key.json`).

    Batches are {"pixels": uint8 [B, 3, 1, H, W], "label": int64 [B] (with `num_labels`), "caption": list[str] (where
    there are any), "key": list[str]}.

    Args:
        image_size: height and width of the images, in pixels.
        flip: mirror training images at random.
        center_crop: bring other sizes to `image_size` (DESIGN 1.4); else they are skipped.
        shards: as `ShardsDataModule` has them.
    """

    def __init__(self, *, image_size: int, flip: bool = False, center_crop: bool = False, **shards: Any):
        super().__init__(**shards)
        if image_size < 1:
            raise UserError(f"{self.key}.image_size={image_size} must be at least 1")
        self.image_size, self.flip, self.center_crop = image_size, flip, center_crop

    def decoder(self, *, training: bool) -> ImageDecoder:
        return ImageDecoder(
            image_size=self.image_size,
            num_labels=self.num_labels,
            center_crop=self.center_crop,
            flip=self.flip and training,
            seed=self.seed,
        )
