"""Sources of shards: JSON-lines files of images or clips with captions, as the authors' training reads; untrusted.

`{"image_path": "a/b.jpg", "long_caption": "...", "text": "..."}`: an image. `{"video_path": "a/b.mp4",
"begin_frame_id": 48, "end_frame_id": 144, "fps": 24, "caption": "..."}`: a part of a video; frames are counted at `fps`
from its beginning, the last is not part of the clip (`grn.data.clips.read_section`).

The caption is a text, or several by kind: `"caption": [{"type": "short", "content": "..."}, ...]`, or `KIND_caption`,
where `text` stands for a short one. `key.json` has each as `KIND_caption`, `key.txt` the longest kind there is.
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

from grn.data.clips import read_section
from grn.data.prepare.folders import (
    CaptionedClips,
    CaptionedImages,
    Clips,
    Format,
    deal,
    encode_caption,
    read_file,
    suffix_of,
    worker_count,
)
from grn.data.prepare.partial import Rejected
from grn.data.prepare.source import Source
from grn.data.samples import read_caption, read_metadata
from grn.data.stream.streaming import MAX_ENTRY_BYTES
from grn.media.cutting import cut_suffix, cut_video
from grn.media.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from grn.media.skips import Reason, Skip
from grn.media.video import probe_video
from grn.runtime.errors import UserError

MAX_LINE_BYTES = MAX_ENTRY_BYTES["json"]  # as what is written of it must be read again
MAX_SOURCE_BYTES = 16 * 2**30  # of a video that parts are cut out of: it is mapped, not read
CLOCK = 90_000  # ticks a second: MPEG's, in which the common frame rates and milliseconds are whole
MAX_FRAME_ID = 2**40  # what `read_section` takes


KINDS = ("long", "medium", "short")  # of captions; the first that there is goes to key.txt
_KIND = re.compile(r"[a-z][a-z0-9_]{0,31}")


def video_source(
    *, root: str | None, captioned: bool, val: int | str | None, folder: str | None = None, **others: Any
) -> "Clips | ClipList":
    """The source for a folder of videos, or for a JSON-lines file of parts of videos.

    Args:
        root: the folder (`Clips`), or the file (`ClipList`).
        captioned: whether clips need a caption.
        val: how many clips are drawn for the split "val"; or, with a JSON-lines file, another one of these.
        folder: with a JSON-lines file, the folder that holds the videos.
        others: as the sources have them.

    Raises:
        UserError: `val` or `folder` is for a JSON-lines file, and `root` is a folder.
    """
    if _is_list(root):
        return ClipList(root=root, captioned=captioned, val=val, folder=folder, **others)
    return (CaptionedClips if captioned else Clips)(root=root, val=_number(val, folder, root), **others)


def image_source(
    *, root: str | None, val: int | str | None, folder: str | None = None, **others: Any
) -> "CaptionedImages | ImageList":
    """Likewise of captioned images."""
    if _is_list(root):
        return ImageList(root=root, val=val, folder=folder, **others)
    return CaptionedImages(root=root, val=_number(val, folder, root), **others)


def _is_list(root: str | None) -> TypeGuard[str]:
    return root is not None and os.path.isfile(Path(root).expanduser())


def _number(val: int | str | None, folder: str | None, root: str | None) -> int | None:
    """`val`, of a source that is no JSON-lines file."""
    if isinstance(val, str) or folder is not None:
        key = "val" if isinstance(val, str) else "folder"
        raise UserError(f"source.{key} names a file or folder beside a JSON-lines file, but root={root} is none")
    return val


@dataclass(frozen=True, order=True)
class Line:
    """Where a line stands: the path of its file, its number (from 1), the bytes before it and its own."""

    file: str
    number: int
    start: int
    size: int


@dataclass(frozen=True, kw_only=True)
class ClipList(Source):
    """Parts of videos, one a line, as samples `<number of the line>.{mp4,txt,json}`.

    A part is cut out of its video without encoding anew, from the keyframe before it on and without sound; `key.json`
    has all the line has, with `begin_frame_id`, `end_frame_id` and `fps` of the part within what is cut out. A line
    without the first two is the whole video, as it is. Lines that cannot be used are rejected, with the reason.

    Args:
        root: the JSON-lines file.
        folder: that holds the videos, none of which may lie outside (links within it are followed, as its owner set
            them); `video_path` is relative to it, or absolute. None: the folder of the file.
        name: of the data set.
        captioned: whether lines without a caption are rejected.
        val: how many lines the split "val" has at least: whole videos are drawn for it until it has them; or
            the path of another JSON-lines file, which is that split; None: one in ten, at most 1000.
        shard_size: samples a shard, at most; None: as `grn.data.prepare.folders.deal` has it.
        seed: of the draw and of the order.
        num_workers: processes; None: one per CPU, 0: none but this.
    """

    path_key: ClassVar[str] = "video_path"
    most: ClassVar[int] = Clips.most

    root: str
    name: str
    folder: str | None = None
    captioned: bool = True
    val: int | str | None = None
    shard_size: int | None = None
    seed: int = 0
    num_workers: int | None = None

    def content(self) -> dict[str, Any]:
        folder = _absolute(self.root if self.folder is None else self.folder)
        folder = folder.parent if self.folder is None else folder
        if not folder.is_dir():
            raise UserError(f"source.folder={self.folder} is not a folder: give the folder of the files")
        splits, digest = self._splits(folder)
        parameters = asdict(self) | {"root": str(_absolute(self.root)), "folder": str(folder), "lines": digest}
        del parameters["num_workers"], parameters["name"]
        return {
            "parameters": parameters,
            "shards": deal(splits, self.shard_size, self.seed, most=self.most),
            "write": partial(self._samples, folder),
            "facts": self.facts(),
            "num_workers": worker_count(self.num_workers),
        }

    def facts(self) -> dict[str, object]:
        """For the manifest."""
        return {}

    def _splits(self, folder: Path) -> tuple[dict[str, list[Line]], str]:
        """The lines of each split, and a digest of the files."""
        lines, digest = list_lines("root", self.root)
        if isinstance(self.val, str):
            val, other = list_lines("source.val", self.val)
            return {"train": lines, "val": val}, f"{digest} {other}"
        asked = min(1000, max(1, len(lines) // 10)) if self.val is None else self.val
        if not 1 <= asked < len(lines):
            raise UserError(
                f"source.val={asked} must be in 1 to {len(lines) - 1}, as root={self.root} has "
                f"{len(lines)} lines, or be the path of another such file"
            )
        val = set(draw_files(lines, folder, asked, self.seed, self.path_key))
        if len(val) == len(lines):
            raise UserError(
                f"source.val={asked} of the {len(lines)} lines of root={self.root} leaves no file for "
                "training, as the parts of a file stay together: take fewer, or give the path of another such file"
            )
        return {"train": [line for line in lines if line not in val], "val": sorted(val)}, digest

    def _samples(self, folder: Path, lines: Sequence[Line]) -> Iterator[dict | Rejected]:
        for line in lines:
            try:
                yield {"__key__": f"{line.number:09d}"} | self._sample(folder, line)
            except Skip as skip:
                detail = f" ({skip.detail})" if skip.reason is Reason.NO_VIDEO and skip.detail else ""
                yield Rejected(f"{Path(line.file).name}:{line.number}", skip.reason.value + detail)

    def _sample(self, folder: Path, line: Line) -> dict[str, bytes]:
        metadata = read_metadata({"json": read_line(line)})
        kinds = captions_by_kind(metadata)
        if self.captioned and not kinds:
            raise Skip(Reason.NO_CAPTION)
        first = next((kinds[kind] for kind in KINDS if kind in kinds), None) or next(iter(kinds.values()), None)
        texts = {"txt": encode_caption(first)} if first else {}
        metadata |= {f"{kind}_caption": caption for kind, caption in kinds.items() if kind}
        if not isinstance(metadata.get("caption"), str):
            metadata.pop("caption", None)
        media = self._media(path_within(folder, metadata.get(self.path_key)), metadata)
        return media | texts | {"json": _encode(metadata)}

    def _media(self, path: Path, metadata: dict[str, Any]) -> dict[str, bytes]:
        """{suffix: bytes} of a line's file; what `metadata` says of it is made to fit."""
        begin, end = read_section({"json": _encode(metadata)})
        if (suffix := suffix_of(path)) not in VIDEO_SUFFIXES:
            raise Skip(Reason.NO_VIDEO, f"*{path.suffix[:20]}" if path.suffix else "no suffix")
        if (begin, end) == (0, None):
            video = read_file(path)
        else:
            video, start = cut_video(map_file(path), suffix, begin, end, max_bytes=MAX_ENTRY_BYTES[suffix])
            suffix = cut_suffix(suffix)
            metadata |= frame_ids(max(begin - start, Fraction(0)), end and end - start, metadata["fps"])
        probe_video(video, suffix)
        return {suffix: video}


@dataclass(frozen=True, kw_only=True)
class ImageList(ClipList):
    """Images, one a line, as samples `<number of the line>.{jpg,txt,json}`; of `image_path`, as `ClipList` otherwise.

    Args:
        image_size, format, quality: as `CaptionedImages` has them.
    """

    path_key: ClassVar = "image_path"
    most: ClassVar = CaptionedImages.most

    image_size: int | None = None
    format: Format = "jpg"
    quality: int = 95

    @property
    def _images(self) -> CaptionedImages:
        return CaptionedImages(image_size=self.image_size, format=self.format, quality=self.quality)

    def facts(self) -> dict[str, object]:
        return self._images.facts()

    def _media(self, path: Path, metadata: dict[str, Any]) -> dict[str, bytes]:
        if suffix_of(path) not in IMAGE_SUFFIXES:
            raise Skip(Reason.NO_IMAGE)
        return self._images.media(path)


def captions_by_kind(metadata: Mapping[str, object]) -> dict[str, str]:
    """The captions of a line, stripped, that are not empty; "" is the kind of one without.

    Raises:
        Skip: one that is not of text, or of no kind that a key can be named after.
    """
    given = metadata.get("caption")
    found: dict[str, object] = {}
    if isinstance(given, list):
        for one in given:
            kind = one.get("type") if isinstance(one, dict) else None
            if not isinstance(kind, str) or not _KIND.fullmatch(kind) or kind in found:
                raise Skip(Reason.BAD_CAPTION)
            found[kind] = one.get("content")
    elif given is not None:
        found[""] = given
    for kind in KINDS:
        if (own := metadata.get(f"{kind}_caption")) is not None:
            found[kind] = own
    if (short := metadata.get("text")) is not None:
        found.setdefault("short", short)
    captions = {kind: read_caption({}, {"caption": caption}) for kind, caption in found.items()}
    return {kind: caption for kind, caption in captions.items() if caption}


def draw_files(lines: Sequence[Line], folder: Path, count: int, seed: int, key: str) -> list[Line]:
    """All lines of files that are drawn until there are `count` lines; a line that names none is one of its own.

    Args:
        key: of a line's path.
    """
    files: dict[str | int, list[Line]] = {}
    for line in lines:
        path = path_of(line, key)
        files.setdefault(line.number if path is None else os.path.normpath(folder / path), []).append(line)
    order = list(files.values())
    random.Random(f"heldout/{seed}").shuffle(order)
    drawn = []
    for parts in order:
        if len(drawn) >= count:
            break
        drawn += parts
    return drawn


def list_lines(key: str, path: str | Path) -> tuple[list[Line], str]:
    """(Every line of a file that is not blank, SHA-256 of the file); in memory there is a mebibyte of it at a time.

    Args:
        key: the config key of `path`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    lines, start, number, digest = [], 0, 0, hashlib.sha256()
    try:
        if not os.path.isfile(path := _absolute(path)):
            raise UserError(f"{key}: no file {path}; give a JSON-lines file of images or clips")
        with open(path, "rb") as file:
            while part := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                size, blank = len(part), not part.strip() and len(part) <= MAX_LINE_BYTES
                digest.update(part)
                while part[-1:] != b"\n" and (part := file.readline(MAX_LINE_BYTES)):
                    size += len(part)
                    digest.update(part)
                if not blank:
                    lines.append(Line(str(path), number, start, size))
                start += size
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}") from None
    if not lines:
        raise UserError(f'{key}: {path} has no lines; one a file is needed: {{"video_path": "a.mp4", "caption": ...}}')
    return lines, digest.hexdigest()[:16]


def path_of(line: Line, key: str) -> str | None:
    """Its path; None where there is none, for which the line will be rejected."""
    try:
        path = read_metadata({"json": read_line(line)}).get(key)
    except Skip:
        return None
    return path if isinstance(path, str) and path else None


def read_line(line: Line) -> bytes:
    """Raises:
    Skip: it is longer than `MAX_LINE_BYTES`, or its file is gone.
    """
    if line.size > MAX_LINE_BYTES:
        raise Skip(Reason.OVERSIZE_ENTRY)
    try:
        with open(line.file, "rb") as file:
            file.seek(line.start)
            return file.read(line.size)
    except OSError:
        raise Skip(Reason.UNREADABLE_FILE) from None


def path_within(folder: Path, path: object) -> Path:
    """The path that a line gives, by its letters within `folder`.

    Raises:
        Skip: it is no path, or leads out of the folder.
    """
    try:
        if not isinstance(path, str) or not path or b"\0" in os.fsencode(path):
            raise Skip(Reason.NO_PATH)
    except UnicodeEncodeError:
        raise Skip(Reason.NO_PATH) from None
    path = Path(os.path.normpath(folder / path))
    if not path.is_relative_to(folder):
        raise Skip(Reason.OUTSIDE_FOLDER)
    return path


def map_file(path: Path) -> mmap:
    """The bytes of a file, read as they are asked for; nobody must shorten it meanwhile.

    Raises:
        Skip: it is empty, cannot be read, is no file but a pipe or a device, or larger than `MAX_SOURCE_BYTES`.
    """
    try:
        if not path.is_file():
            raise Skip(Reason.UNREADABLE_FILE)
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_SOURCE_BYTES:
                raise Skip(Reason.OVERSIZE_ENTRY)
            return mmap(file.fileno(), 0, access=ACCESS_READ)
    except (OSError, ValueError):
        raise Skip(Reason.UNREADABLE_FILE) from None


def frame_ids(begin: Fraction, end: Fraction | None, fps: float) -> dict[str, int | float]:
    """{"begin_frame_id", "end_frame_id" (unless None), "fps"} of a part from `begin` to `end`, in seconds.

    Counted at `fps`; where `begin` is then not whole, as the keyframe from which it counts is none of these frames, in
    ticks of `CLOCK` in their place, within half of which these numbers always are.
    """
    if abs(round(begin * Fraction(fps)) / Fraction(fps) - begin) > Fraction(1, 2 * CLOCK):
        fps = CLOCK
    ids = {"begin_frame_id": begin} | ({} if end is None else {"end_frame_id": end})
    return {name: min(round(time * Fraction(fps)), MAX_FRAME_ID) for name, time in ids.items()} | {"fps": fps}


def _encode(metadata: Mapping[str, object]) -> bytes:
    try:
        data = json.dumps(metadata).encode()
    except (ValueError, RecursionError):
        raise Skip(Reason.BAD_METADATA) from None
    if len(data) > MAX_LINE_BYTES:
        raise Skip(Reason.OVERSIZE_ENTRY)
    return data


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))
