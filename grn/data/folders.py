"""Folders of images or videos as sources of shards: by class, with captions, clips; nothing in them is trusted."""

import io
import os
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

from joblib import cpu_count
from PIL import Image

from grn.data.clips import probe_video
from grn.data.samples import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    METADATA_SUFFIXES,
    VIDEO_SUFFIXES,
    Reason,
    Skip,
    center_crop,
    decode_image,
    read_caption,
    read_metadata,
)
from grn.data.shards import Rejected, write_shards
from grn.data.streaming import MAX_ENTRY_BYTES
from grn.errors import UserError

FORMATS = ("png", "jpg", "webp")
MIN_SIDE = 8  # pixels; below it there is nothing to see, and enlarging a pixel makes a flat square
MAX_NAMES_BYTES = 64 * 2**20

# (key, path, paths of captions) and (key, path, label); paths within the folder of the source.
File = tuple[str, str, tuple[str, ...]]
Labelled = tuple[str, str, int]


@dataclass(frozen=True, kw_only=True)
class ClassFolders:
    """`<root>/{train,val}/<class>/**/*.{jpg,jpeg,png,webp}`: ImageNet, or what torchvision's ImageFolder would read.

    Labels are the places of the sorted class names. Images are centre-cropped (DESIGN 1.4) and encoded anew.

    Args:
        root: the folder; val/ becomes the split "heldout".
        name: of the data set.
        image_size: height and width of the images, in pixels.
        num_labels: classes that there must be; None: any number.
        names: file of lines `<class> <name>`, parted by a tab or spaces; None: classes are called as their folders.
        caption: written as key.txt, with {name} in it, e.g. "a photo of {name}"; None: no captions.
        format: png (lossless), jpg or webp.
        quality: of jpg and webp, 1 to 100.
        shard_size: samples a shard, at most.
        seed: of the order, in which classes are mixed.
        num_workers: processes; None: one per CPU, 0: none but this.
    """

    root: str | None = None
    name: str = "imagenet"
    image_size: int = 256
    num_labels: int | None = None
    names: str | None = None
    caption: str | None = None
    format: str = "png"
    quality: int = 95
    shard_size: int = 1000
    seed: int = 0
    num_workers: int | None = None

    def write(self, root: str | os.PathLike, *, overwrite: bool = False, rank: int = 0, world_size: int = 1) -> bool:
        """Writes the shards and the manifest to `root`, see `grn.data.shards.write_shards`.

        Returns:
            Whether this process had a part in it.

        Raises:
            UserError: a key is out of range, the folder is not as above, or `root` holds something else.
        """
        folder = _source_folder(self.root)
        check_encoding(self.image_size, self.format, self.quality)
        if self.caption is not None and "{name}" not in self.caption:
            raise UserError(f"source.caption={self.caption!r} must have {{name}} in it, for the name of the class")
        classes = _classes(folder, "train")
        if self.num_labels not in (None, len(classes)):
            raise UserError(
                f"root={folder}: train/ has {len(classes)} class folders, but data.num_labels={self.num_labels}: "
                f"give data.num_labels={len(classes)}, or the right root"
            )
        label_names = classes if self.names is None else _names(Path(self.names).expanduser(), classes)
        images = {"train": self._images(folder, "train", classes), "heldout": self._images(folder, "val", classes)}
        return write_shards(
            root,
            name=self.name,
            parameters=_parameters(self, folder),
            shards=deal(images, self.shard_size, self.seed),
            write=partial(self._samples, folder, label_names),
            facts={"image_size": self.image_size, "num_labels": len(classes), "label_names": label_names},
            num_workers=worker_count(self.num_workers),
            overwrite=overwrite,
            rank=rank,
            world_size=world_size,
        )

    def _images(self, folder: Path, split: str, classes: list[str]) -> list[Labelled]:
        labels = {name: label for label, name in enumerate(classes)}
        if split != "train" and (unknown := set(_classes(folder, split)) - set(classes)):
            raise UserError(f"root={folder}: {split}/{min(unknown)} is a class that train/ does not have")
        paths = list_files(folder / split, IMAGE_SUFFIXES)
        paths = [path for path in paths if path.partition("/")[0] in labels]
        empty = set(classes) - {path.partition("/")[0] for path in paths}
        if not paths or (split == "train" and empty):
            raise UserError(f"root={folder}: {split}/{min(empty)} holds no files *.{{{','.join(IMAGE_SUFFIXES)}}}")
        return [(key, f"{split}/{path}", labels[path.partition("/")[0]]) for key, path in zip(make_keys(paths), paths)]

    def _samples(
        self, folder: Path, label_names: Sequence[str], images: Sequence[Labelled]
    ) -> Iterator[dict | Rejected]:
        for key, path, label in images:
            try:
                image = center_crop(decode(read_file(folder / path)), self.image_size)
            except Skip as skip:
                yield Rejected(path, skip.reason.value)
                continue
            sample = {"__key__": key, self.format: encode(image, self.format, self.quality), "cls": str(label)}
            if self.caption is not None:
                sample["txt"] = self.caption.replace("{name}", label_names[label]).encode(errors="replace")
            yield sample


@dataclass(frozen=True, kw_only=True)
class CaptionedFiles(ABC):
    """What `CaptionedImages` and `Clips` share: files, however deep in a folder, with captions beside them.

    The caption of `x.jpg` is the text of `x.txt`, or "caption" of the JSON object in `x.json`.

    Args:
        root: the folder. Where it has both train/ and val/, these are the splits "train" and "heldout".
        name: of the data set.
        heldout: otherwise, how many files are drawn for the split "heldout".
        shard_size: samples a shard, at most.
        seed: of the draw and of the order.
        num_workers: processes; None: one per CPU, 0: none but this.
    """

    suffixes: ClassVar[tuple[str, ...]]
    needs_caption: ClassVar[bool]

    root: str | None = None
    name: str
    heldout: int
    shard_size: int
    seed: int = 0
    num_workers: int | None = None

    def write(self, root: str | os.PathLike, *, overwrite: bool = False, rank: int = 0, world_size: int = 1) -> bool:
        """Writes the shards and the manifest to `root`, see `grn.data.shards.write_shards`.

        Returns:
            Whether this process had a part in it.

        Raises:
            UserError: a key is out of range, there are no files, or `root` holds something else.
        """
        folder = _source_folder(self.root)
        return write_shards(
            root,
            name=self.name,
            parameters=_parameters(self, folder),
            shards=deal(self._splits(folder), self.shard_size, self.seed),
            write=partial(self._samples, folder),
            facts=self.facts(),
            num_workers=worker_count(self.num_workers),
            overwrite=overwrite,
            rank=rank,
            world_size=world_size,
        )

    def facts(self) -> dict[str, object]:
        """For the manifest."""
        return {}

    @abstractmethod
    def media(self, path: Path) -> dict[str, bytes]:
        """{suffix: bytes} of a file; raises `Skip` where it cannot be used."""

    def _splits(self, folder: Path) -> dict[str, list[File]]:
        if os.path.isdir(folder / "train") and os.path.isdir(folder / "val"):
            return {"train": self._files(folder, "train/"), "heldout": self._files(folder, "val/")}
        files = self._files(folder, "")
        if not 1 <= self.heldout < len(files):
            raise UserError(
                f"source.heldout={self.heldout} must lie in 1 to {len(files) - 1}: root has {len(files)} files"
            )
        random.Random(f"heldout/{self.seed}").shuffle(files)
        files.sort(key=lambda file: self.needs_caption and not file[2])  # what will be rejected is drawn last
        return {"train": files[self.heldout :], "heldout": files[: self.heldout]}

    def _files(self, folder: Path, part: str) -> list[File]:
        """Every file in a part of the folder."""
        media, texts = [], {}
        for path in list_files(folder / part, (*self.suffixes, *CAPTION_SUFFIXES, *METADATA_SUFFIXES)):
            if suffix_of(path) in self.suffixes:
                media.append(path)
            else:
                texts.setdefault(os.path.splitext(path)[0], []).append(part + path)
        if not media:
            raise UserError(f"root={folder / part} holds no files *.{{{','.join(self.suffixes)}}}")
        captions = [tuple(texts.get(os.path.splitext(path)[0], ())) for path in media]
        return [(key, part + path, own) for key, path, own in zip(make_keys(media), media, captions)]

    def _samples(self, folder: Path, files: Sequence[File]) -> Iterator[dict | Rejected]:
        for key, path, texts in files:
            try:
                captions = self._captions(folder, texts)
                yield {"__key__": key} | self.media(folder / path) | captions
            except Skip as skip:
                yield Rejected(path, skip.reason.value)

    def _captions(self, folder: Path, paths: Sequence[str]) -> dict[str, bytes]:
        """{"txt": bytes, "json": bytes}, as far as they are there, and as a reader of the shards would take them.

        A caption is in "txt", too, which is what text refiners read unless `data.captions` says otherwise.
        """
        raw = {suffix_of(path): read_file(folder / path) for path in paths}
        caption = read_caption(raw, read_metadata(raw))
        if not caption and self.needs_caption:
            raise Skip(Reason.NO_CAPTION)
        return {"txt": encode_caption(caption)} | raw if caption else raw


@dataclass(frozen=True, kw_only=True)
class CaptionedImages(CaptionedFiles):
    """A folder of `x.{jpg,jpeg,png,webp}` with `x.txt` or `x.json`, see `CaptionedFiles`; those without are rejected.

    Args:
        image_size: centre-crop the images to this height and width and encode them anew; None: their bytes stay.
        format: where encoded anew: png (lossless), jpg or webp.
        quality: of jpg and webp, 1 to 100.
    """

    suffixes: ClassVar = IMAGE_SUFFIXES
    needs_caption: ClassVar = True

    name: str = "text_image"
    heldout: int = 1000
    shard_size: int = 1000
    image_size: int | None = None
    format: str = "jpg"
    quality: int = 95

    def facts(self) -> dict[str, object]:
        if self.image_size is not None:
            check_encoding(self.image_size, self.format, self.quality)
        return {"image_size": self.image_size}

    def media(self, path: Path) -> dict[str, bytes]:
        data = read_file(path)
        image = decode(data)
        if self.image_size is None:
            return {suffix_of(path): data}
        return {self.format: encode(center_crop(image, self.image_size), self.format, self.quality)}


@dataclass(frozen=True, kw_only=True)
class Clips(CaptionedFiles):
    """A folder of `x.{mp4,webm,mkv,mov}`, some with `x.txt` or `x.json`, see `CaptionedFiles`; their bytes stay."""

    suffixes: ClassVar = VIDEO_SUFFIXES
    needs_caption: ClassVar = False

    name: str = "text_video"
    heldout: int = 100
    shard_size: int = 100

    def media(self, path: Path) -> dict[str, bytes]:
        data = read_file(path)
        probe_video(data, suffix_of(path))
        return {suffix_of(path): data}


@dataclass(frozen=True, kw_only=True)
class CaptionedClips(Clips):
    """`Clips`, of which those without a caption are rejected."""

    needs_caption: ClassVar = True


def list_files(folder: Path, suffixes: Sequence[str]) -> list[str]:
    """The paths within `folder`, sorted, of all files with one of the suffixes (in any case), however deep.

    Links are followed, yet no folder is entered twice, so that loops end. What is hidden (".name") is left out.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"root: the folder {error.filename} cannot be read: {error.strerror}")

    paths, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        within = Path(place).relative_to(folder)
        paths += [(within / name).as_posix() for name in names if name[0] != "." and suffix_of(name) in suffixes]
    return sorted(paths)


def suffix_of(path: str | os.PathLike) -> str:
    """In small letters, without the dot."""
    return os.path.splitext(path)[1].lower().removeprefix(".")


def make_keys(paths: Sequence[str]) -> list[str]:
    """Keys of samples: the paths without suffix, free of dots and of what is not safe in names of files.

    Different paths have different keys: whatever is replaced (by %XX) can be told from it, and files that differ in
    their suffix alone keep it (as x+png, x+jpg).
    """
    stems = Counter(os.path.splitext(path)[0] for path in paths)
    keys = []
    for stem, suffix in map(os.path.splitext, paths):
        key = quote(os.fsencode(stem)).replace(".", "%2E")
        keys.append(key if stems[stem] == 1 else f"{key}+{suffix.removeprefix('.')}")
    return keys


def read_file(path: Path) -> bytes:
    """The bytes of a file that is no larger than what is read from shards (`MAX_ENTRY_BYTES` of its suffix).

    Raises:
        Skip: it is larger, cannot be read, or is no file but a pipe or a device.
    """
    limit = MAX_ENTRY_BYTES[suffix_of(path)]
    try:
        if not path.is_file():
            raise Skip(Reason.UNREADABLE_FILE)
        if path.stat().st_size > limit:
            raise Skip(Reason.OVERSIZE_ENTRY)
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError:
        raise Skip(Reason.UNREADABLE_FILE) from None
    if len(data) > limit:
        raise Skip(Reason.OVERSIZE_ENTRY)
    return data


def encode_caption(caption: str) -> bytes:
    """As UTF-8; a `Skip` where that has no such letters (JSON's escapes may spell halves of some)."""
    try:
        return caption.encode()
    except UnicodeEncodeError:
        raise Skip(Reason.BAD_CAPTION) from None


def decode(data: bytes) -> Image.Image:
    """An image as `decode_image` gives it; a `Skip` too where there is next to nothing to see on it."""
    image = decode_image(data)
    if min(image.size) < MIN_SIDE:
        raise Skip(Reason.TOO_SMALL)
    return image


def encode(image: Image.Image, format: str, quality: int) -> bytes:
    """Pixels alone: colour profiles and the like, which readers pass over, are left out."""
    image.info.clear()
    options = {"png": {"format": "PNG"}, "webp": {"format": "WEBP", "quality": quality}}
    options["jpg"] = {"format": "JPEG", "quality": quality, "subsampling": 0}
    data = io.BytesIO()
    image.save(data, **options[format])
    return data.getvalue()


def check_encoding(image_size: int, format: str, quality: int) -> None:
    """Raises a UserError where `encode` could not make such images."""
    if not MIN_SIDE <= image_size <= 4096:
        raise UserError(f"source.image_size={image_size} must lie in {MIN_SIDE} to 4096")
    if format not in FORMATS:
        raise UserError(f"source.format={format} must be one of {', '.join(FORMATS)}")
    if not 1 <= quality <= 100:
        raise UserError(f"source.quality={quality} must lie in 1 to 100")


def _source_folder(root: str | None) -> Path:
    if root is None:
        raise UserError("root must be given: root=/path/to/the/folder/of/files")
    if not os.path.isdir(folder := Path(root).expanduser().absolute()):
        raise UserError(f"root={root} is not a folder: give the one that holds the files")
    return folder


def _parameters(source: ClassFolders | CaptionedFiles, folder: Path) -> dict:
    """What the shards are made from; how many processes make them is no part of it."""
    parameters = asdict(source) | {"root": str(folder)}
    del parameters["num_workers"], parameters["name"]
    return parameters


def worker_count(num_workers: int | None) -> int:
    """None: one per CPU."""
    return cpu_count() if num_workers is None else num_workers


def deal(splits: dict[str, list], shard_size: int, seed: int) -> dict[str, list[tuple]]:
    """Each split shuffled, in shards that are all about as large."""
    if shard_size < 1:
        raise UserError(f"source.shard_size={shard_size} must be at least 1")
    shards = {}
    for split, items in splits.items():
        items = sorted(items)
        random.Random(f"order/{split}/{seed}").shuffle(items)
        number = -(-len(items) // shard_size)
        shards[split] = [tuple(items[i::number]) for i in range(number)]
    return shards


def _classes(folder: Path, split: str) -> list[str]:
    """Sorted names of the class folders of a split."""
    try:
        with os.scandir(folder / split) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"root={folder}: {split}/ cannot be read ({error.strerror}): it must hold {split}/<class>/*.jpg"
        ) from None
    if not classes:
        raise UserError(
            f"root={folder}: {split}/ has no class folders: move each image to {split}/<class>/, under the class names "
            "of train/ (those of ImageNet's validation images are in its development kit)"
        )
    return classes


def _names(path: Path, classes: Sequence[str]) -> list[str]:
    """One for each class, from lines `<class> <name>`."""
    try:
        with open(path, "rb") as file:
            lines = file.read(MAX_NAMES_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"source.names={path} cannot be read as text: {error}") from None
    names = {}
    for line in lines:
        own, _, name = line.strip().partition("\t" if "\t" in line else " ")
        names[own.strip()] = name.strip()
    if missing := [name for name in classes if not names.get(name)]:
        raise UserError(f"source.names={path} has no name for {len(missing)} classes, the first is {missing[0]}")
    return [names[name] for name in classes]
