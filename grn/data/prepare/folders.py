"""Sources of shards: folders of images by class, of captioned images, of clips; files are untrusted."""

import io
import os
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args
from urllib.parse import quote

from joblib import cpu_count
from PIL import Image

from grn.data.prepare.partial import Noted, Rejected
from grn.data.prepare.source import Source
from grn.data.samples import CAPTION_SUFFIXES, METADATA_SUFFIXES, read_caption, read_metadata
from grn.data.stream.streaming import MAX_ENTRY_BYTES, is_clutter
from grn.media.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, center_crop, decode_image
from grn.media.skips import Reason, Skip, noting
from grn.media.video import probe_video
from grn.runtime.errors import UserError, check_count

Format = Literal["png", "jpg", "webp"]
STREAMS = 8  # shards that the data configs of folders read side by side
MIN_SIDE = 8  # pixels; below it there is nothing to see, and enlarging a pixel makes a flat square
MAX_NAMES_BYTES = 64 * 2**20

# (key, path, paths of captions) and (key, path, label); paths within the folder of the source.
File = tuple[str, str, tuple[str, ...]]
Labelled = tuple[str, str, int]


@dataclass(frozen=True, kw_only=True)
class ClassFolders(Source):
    """`<root>/<class>/**/*.jpg` (`IMAGE_SUFFIXES`), as torchvision's ImageFolder has it, or, as in ImageNet,
    `<root>/{train,val}/<class>/**/*.jpg`.

    Labels are the places of the sorted class names. Images are center-cropped and re-encoded. What else
    there is is counted.

    Args:
        root: the folder; with train/ and val/, the latter is the split "val".
        val: otherwise, how many images are drawn for the split "val", as many of each class as their numbers
            allow; None: one in ten, at most 1000.
        name: of the data set.
        image_size: height and width of the images, in pixels.
        num_labels: classes that there must be; None: any number.
        names: file of lines `<class> <name>`, parted by a tab or spaces; None: classes are called as their folders.
        caption: written as key.txt, with {name} in it, e.g. "a photo of {name}"; None: no captions.
        format: png (lossless), jpg or webp.
        quality: of jpg and webp, 1 to 100.
        shard_size: samples a shard, at most; None: as `deal` has it.
        seed: of the order, in which classes are mixed.
        num_workers: processes; None: one per CPU, 0: none but this.
    """

    root: str | None = None
    val: int | None = None
    name: str = "imagenet"
    image_size: int = 256
    num_labels: int | None = None
    names: str | None = None
    caption: str | None = None
    format: Format = "png"
    quality: int = 95
    shard_size: int | None = None
    seed: int = 0
    num_workers: int | None = None

    def content(self) -> dict[str, Any]:
        folder = _source_folder(self.root)
        check_encoding(self.image_size, self.format, self.quality)
        if self.caption is not None and "{name}" not in self.caption:
            raise UserError(f"source.caption={self.caption!r} must have {{name}} in it, for the name of the class")
        has = {name: _has_folders(folder / name) for name in ("train", "val")}
        if has["val"] and not has["train"]:
            raise UserError(f"root={folder} has val/<class>/ and no train/<class>/: give the folder that holds both")
        is_split, part = os.path.isdir(folder / "val") and has["train"], "train/" if has["train"] else ""
        classes = _classes(folder, part)
        if self.num_labels not in (None, len(classes)):
            raise UserError(
                f"root={folder}: {part or 'it'} has {len(classes)} class folders, but data.num_labels="
                f"{self.num_labels}: give data.num_labels={len(classes)}, or the right root"
            )
        label_names = classes if self.names is None else _names(Path(self.names).expanduser(), classes)
        train, others = self._images(folder, part, classes)
        if is_split:
            val, more = self._images(folder, "val/", classes)
            others = [*_beside(folder), *others, *more]
        else:
            train, val = self._drawn(train)
        images = {"train": train, "val": val}
        return {
            "parameters": _parameters(self, folder),
            "shards": deal(images, self.shard_size, self.seed),
            "write": partial(self._samples, folder, label_names),
            "facts": {"image_size": self.image_size, "num_labels": len(classes), "label_names": label_names},
            "left_out": others,
            "num_workers": worker_count(self.num_workers),
        }

    def _images(self, folder: Path, part: str, classes: list[str]) -> tuple[list[Labelled], list[Rejected]]:
        """The images of a part of the folder, and what is left out of it."""
        labels = {name: label for label, name in enumerate(classes)}
        if part == "val/" and (unknown := set(_classes(folder, part)) - set(classes)):
            raise UserError(f"root={folder}: {part}{min(unknown)} is a class that train/ does not have")
        files = list_files(folder / part)
        images, others = _of_suffixes(files, IMAGE_SUFFIXES, part)
        paths = [path for path in images if path.partition("/")[0] in labels]
        others += [Rejected(f"{part}{path}", Reason.OTHER_PLACE.value) for path in sorted({*images} - {*paths})]
        empty = set(classes) - {path.partition("/")[0] for path in paths}
        if not paths or (part != "val/" and empty):
            own = [path for path in files if path.startswith(f"{min(empty)}/")]
            raise UserError(f"root={folder}: {part}{min(empty)} {_none_of(IMAGE_SUFFIXES, own)}")
        labelled = [
            (key, f"{part}{path}", labels[path.partition("/")[0]]) for key, path in zip(make_keys(paths), paths)
        ]
        return labelled, others

    def _drawn(self, images: list[Labelled]) -> tuple[list[Labelled], list[Labelled]]:
        """(The images of "train", those of "val"): each class in turn gives one, and keeps one at least."""
        number = _val(self.val, len(images))
        random.Random(f"heldout/{self.seed}").shuffle(images)
        turns: Counter[int] = Counter()
        order = []
        for image in images:
            order.append((turns[image[2]], image))
            turns[image[2]] += 1
        order.sort(key=lambda it: (it[0], it[1][2]))
        keeping = [image for turn, image in order if turn < turns[image[2]] - 1]  # else a class would have none left
        if number > len(keeping):
            raise UserError(f"source.val={number} must be at most {len(keeping)}: each class trains from one image")
        val = set(keeping[:number])
        return [image for image in images if image not in val], sorted(val)

    def _samples(
        self, folder: Path, label_names: Sequence[str], images: Sequence[Labelled]
    ) -> Iterator[dict | Rejected | Noted]:
        for key, path, label in images:
            try:
                with noting() as notes:
                    image = center_crop(decode(read_file(folder / path)), self.image_size)
            except Skip as skip:
                yield Rejected(path, skip.reason.value)
                continue
            yield from (Noted(path, note.value) for note in notes)
            sample = {"__key__": key, self.format: encode(image, self.format, self.quality), "cls": str(label)}
            if self.caption is not None:
                sample["txt"] = self.caption.replace("{name}", label_names[label]).encode(errors="replace")
            yield sample


@dataclass(frozen=True, kw_only=True)
class CaptionedFiles(Source):
    """What `CaptionedImages` and `Clips` share: files, however deep in a folder, with captions beside them.

    The caption of `x.jpg` is the text of `x.txt`, or "caption" of the JSON object in `x.json`.

    Args:
        root: the folder. Where it has both train/ and val/, these are the splits "train" and "val".
        name: of the data set.
        val: otherwise, how many files are drawn for the split "val"; None: one in ten, at most 1000.
        shard_size: samples a shard, at most; None: as `deal` has it.
        seed: of the draw and of the order.
        num_workers: processes; None: one per CPU, 0: none but this.
    """

    suffixes: ClassVar[tuple[str, ...]]
    needs_caption: ClassVar[bool]
    most: ClassVar[int] = 1000  # samples a shard

    root: str | None = None
    name: str
    val: int | None = None
    shard_size: int | None = None
    seed: int = 0
    num_workers: int | None = None

    def content(self) -> dict[str, Any]:
        folder = _source_folder(self.root)
        splits, left_out = self._splits(folder)
        return {
            "parameters": _parameters(self, folder),
            "shards": deal(splits, self.shard_size, self.seed, most=self.most),
            "write": partial(self._samples, folder),
            "facts": self.facts(),
            "left_out": left_out,
            "num_workers": worker_count(self.num_workers),
        }

    def facts(self) -> dict[str, object]:
        """For the manifest."""
        return {}

    @abstractmethod
    def media(self, path: Path) -> dict[str, bytes]:
        """{suffix: bytes} of a file; raises `Skip` where it cannot be used."""

    def _splits(self, folder: Path) -> tuple[dict[str, list[File]], list[Rejected]]:
        """The files of each split, and what is left out."""
        if os.path.isdir(folder / "train") and os.path.isdir(folder / "val"):
            train, others = self._files(folder, "train/")
            val, more = self._files(folder, "val/")
            return {"train": train, "val": val}, [*_beside(folder), *others, *more]
        files, others = self._files(folder, "")
        number = _val(self.val, len(files))
        random.Random(f"heldout/{self.seed}").shuffle(files)
        files.sort(key=lambda file: self.needs_caption and not file[2])  # what will be rejected is drawn last
        return {"train": files[number:], "val": files[:number]}, others

    def _files(self, folder: Path, part: str) -> tuple[list[File], list[Rejected]]:
        """Every file in a part of the folder with its captions, and what is left out of it."""
        found = list_files(folder / part)
        files, others = _of_suffixes(found, (*self.suffixes, *CAPTION_SUFFIXES, *METADATA_SUFFIXES), part)
        media, texts = [], {}
        for path in files:
            if suffix_of(path) in self.suffixes:
                media.append(path)
            else:
                texts.setdefault(os.path.splitext(path)[0], []).append(part + path)
        if not media:
            raise UserError(f"root={folder / part} {_none_of(self.suffixes, found)}")
        captions = [tuple(texts.get(os.path.splitext(path)[0], ())) for path in media]
        told = {
            os.path.splitext(path)[0]
            for path in found
            if suffix_of(path) not in (*CAPTION_SUFFIXES, *METADATA_SUFFIXES)
        }
        others += [
            Rejected(path, Reason.LONE_CAPTION.value) for stem in sorted(texts.keys() - told) for path in texts[stem]
        ]
        return [(key, part + path, own) for key, path, own in zip(make_keys(media), media, captions)], others

    def _samples(self, folder: Path, files: Sequence[File]) -> Iterator[dict | Rejected | Noted]:
        for key, path, texts in files:
            try:
                with noting() as notes:
                    sample = {"__key__": key} | self.media(folder / path) | self._captions(folder, texts)
            except Skip as skip:
                yield Rejected(path, skip.reason.value)
                continue
            yield from (Noted(path, note.value) for note in notes)
            yield sample

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
    """A folder of `x.jpg` (`IMAGE_SUFFIXES`) with `x.txt` or `x.json`, see `CaptionedFiles`; without: rejected.

    Args:
        image_size: center-crop the images to this height and width and encode them again; None: their bytes stay.
        format: where re-encoded: png (lossless), jpg or webp.
        quality: of jpg and webp, 1 to 100.
    """

    suffixes: ClassVar = IMAGE_SUFFIXES
    needs_caption: ClassVar = True

    name: str = "captioned_image"
    image_size: int | None = None
    format: Format = "jpg"
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
    """A folder of `x.mp4` (`VIDEO_SUFFIXES`), some with `x.txt` or `x.json`, see `CaptionedFiles`; their bytes stay."""

    suffixes: ClassVar = VIDEO_SUFFIXES
    needs_caption: ClassVar = False

    name: str = "video"
    most: ClassVar = 100

    def media(self, path: Path) -> dict[str, bytes]:
        data = read_file(path)
        probe_video(data, suffix_of(path))
        return {suffix_of(path): data}


@dataclass(frozen=True, kw_only=True)
class CaptionedClips(Clips):
    """`Clips`, of which those without a caption are rejected."""

    needs_caption: ClassVar = True


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(folder))


def _val(asked: int | None, files: int) -> int:
    """How many of so many files are drawn for the split "val"."""
    number = min(1000, max(1, files // 10)) if asked is None else asked
    if not 1 <= number < files:
        many = f"root has {files} file{'s' * (files != 1)}"
        if asked is None:
            raise UserError(f"{many}: at least two are needed, one to train from and one to hold out")
        raise UserError(f"source.val={asked} must be in 1 to {files - 1}: {many}")
    return number


def list_files(folder: Path, suffixes: Sequence[str] | None = None) -> list[str]:
    """The paths within `folder`, sorted, of all files with one of the suffixes (in any case), however deep.

    Links are followed, yet no folder is entered twice, so that loops end. What is hidden (".name") is passed over, and
    what archivers and file managers add (`is_clutter`).

    Args:
        suffixes: None: all.

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
        names = [name for name in names if suffixes is None or suffix_of(name) in suffixes]
        paths += [path for name in names if not is_clutter(path := (within / name).as_posix())]
    return sorted(paths)


def _of_suffixes(paths: Sequence[str], suffixes: Sequence[str], part: str) -> tuple[list[str], list[Rejected]]:
    """(Paths with one of these, the others); `part` stands before them in `Rejected.item`."""
    own = [path for path in paths if suffix_of(path) in suffixes]
    others = [path for path in paths if suffix_of(path) not in suffixes]
    return own, [Rejected(part + path, f"{Reason.OTHER_KIND.value}: {_kind(path)}") for path in others]


def _kind(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "without a suffix"


def _none_of(suffixes: Sequence[str], found: Sequence[str]) -> str:
    """That there are none with these suffixes, and what there is in their place."""
    kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(map(_kind, found)).most_common(8))
    return f"holds no files *.{{{','.join(suffixes[:4])}}} or the like" + (f"; it has {kinds}" if kinds else "")


def _beside(folder: Path) -> list[Rejected]:
    """What lies beside train/ and val/, by its name alone."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(folder))
    names = [name for name in names if name not in ("train/", "val/") and not is_clutter(name.rstrip("/"))]
    return [Rejected(name, Reason.OTHER_PLACE.value) for name in names]


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


def encode(image: Image.Image, format: Format, quality: int) -> bytes:
    """Pixels alone: color profiles and the like, which readers pass over, are left out."""
    image.info.clear()
    options = {"png": {"format": "PNG"}, "webp": {"format": "WEBP", "quality": quality}}
    options["jpg"] = {"format": "JPEG", "quality": quality, "subsampling": 0}
    data = io.BytesIO()
    image.save(data, **options[format])
    return data.getvalue()


def check_encoding(image_size: int, format: Format, quality: int) -> None:
    """Raises a UserError where `encode` could not make such images."""
    check_count("source.image_size", image_size, least=MIN_SIDE, most=4096)
    check_count("source.quality", quality, most=100)
    if format not in get_args(Format):
        raise UserError(f"source.format={format} must be one of {', '.join(get_args(Format))}")


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


def deal(splits: dict[str, list], shard_size: int | None, seed: int, *, most: int = 1000) -> dict[str, list[tuple]]:
    """Each split shuffled, in shards that are all about as large, of `shard_size` samples at most; None: of `most`, and
    in `STREAMS` shards at least, where there are as many samples."""
    if shard_size is not None:
        check_count("source.shard_size", shard_size)
    shards = {}
    for split, items in splits.items():
        items = sorted(items)
        random.Random(f"order/{split}/{seed}").shuffle(items)
        number = -(-len(items) // (shard_size or most))
        number = max(number, min(STREAMS, len(items))) if shard_size is None else number
        shards[split] = [tuple(items[i::number]) for i in range(number)]
    return shards


def _classes(folder: Path, part: str) -> list[str]:
    """Sorted names of the class folders in a part of the folder."""
    try:
        with os.scandir(folder / part) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"root={folder}: {part} cannot be read ({error.strerror})") from None
    if not classes:
        raise UserError(
            f"root={folder}: {part or 'it'} has no class folders: move each image to {part}<class>/"
            + (", under the class names of train/ (ImageNet's are in its development kit)" if part == "val/" else "")
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
