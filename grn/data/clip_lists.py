"""A JSON-lines file of clips as a source of shards: each line a part of a video, and its caption; nothing is trusted.

`{"video_path": "a/b.mp4", "begin_frame_id": 48, "end_frame_id": 144, "fps": 24, "caption": "..."}`: frames are counted
at `fps` from the beginning of the video, the last is not part of the clip (`grn.data.clips.read_section`).
"""

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path

from grn.data.clips import probe_video, read_section
from grn.data.cutting import cut_video
from grn.data.folders import CaptionedClips, Clips, deal, encode_caption, read_file, suffix_of, worker_count
from grn.data.samples import VIDEO_SUFFIXES, Reason, Skip, read_caption, read_metadata
from grn.data.shards import Rejected, write_shards
from grn.data.streaming import MAX_ENTRY_BYTES
from grn.errors import UserError

MAX_LINE_BYTES = MAX_ENTRY_BYTES["json"]  # as what is written of it must be read again
MAX_SOURCE_BYTES = 16 * 2**30  # of a video that parts are cut out of: it is mapped, not read
CLOCK = 90_000  # ticks a second: MPEG's, in which the common frame rates and milliseconds are whole
MAX_FRAME_ID = 2**40  # what `read_section` takes


def video_source(
    *, root: str | None, captioned: bool, heldout: int | str, videos: str | None = None, **others: object
) -> "Clips | ClipList":
    """The source for a folder of videos, or for a JSON-lines file of parts of videos.

    Args:
        root: the folder (`Clips`), or the file (`ClipList`).
        captioned: whether clips need a caption.
        heldout: how many clips are drawn for the split "heldout"; or, with a JSON-lines file, another one of these.
        videos: with a JSON-lines file, the folder that holds the videos.
        others: as the sources have them.

    Raises:
        UserError: `heldout` or `videos` is for a JSON-lines file, and `root` is a folder.
    """
    if root is not None and os.path.isfile(Path(root).expanduser()):
        return ClipList(root=root, captioned=captioned, heldout=heldout, videos=videos, **others)
    for key, is_for_list in {"heldout": isinstance(heldout, str), "videos": videos is not None}.items():
        if is_for_list:
            raise UserError(f"source.{key} names a file or folder beside a JSON-lines file, but root={root} is none")
    return (CaptionedClips if captioned else Clips)(root=root, heldout=heldout, **others)


@dataclass(frozen=True, order=True)
class Line:
    """Where a line stands: the path of its file, its number (from 1), the bytes before it and its own."""

    file: str
    number: int
    start: int
    size: int


@dataclass(frozen=True, kw_only=True)
class ClipList:
    """Parts of videos, one a line, as samples `<number of the line>.{mp4,txt,json}`.

    A part is cut out of its video without encoding anew, from the keyframe before it on and without sound; `key.json`
    has all the line has, with `begin_frame_id`, `end_frame_id` and `fps` of the part within what is cut out. A line
    without the first two is the whole video, as it is. Lines that cannot be used are rejected, with the reason.

    Args:
        root: the JSON-lines file.
        videos: the folder that holds the videos, none of which may lie outside (links within it are followed, as its
            owner set them); `video_path` is relative to it, or absolute. None: the folder of the file.
        name: of the data set.
        captioned: whether lines without a caption are rejected.
        heldout: how many lines the split "heldout" has at least: whole videos are drawn for it until it has them; or
            the path of another JSON-lines file, which is that split.
        shard_size: samples a shard, at most.
        seed: of the draw and of the order.
        num_workers: processes; None: one per CPU, 0: none but this.
    """

    root: str
    name: str
    videos: str | None = None
    captioned: bool = True
    heldout: int | str = 100
    shard_size: int = 100
    seed: int = 0
    num_workers: int | None = None

    def write(self, root: str | os.PathLike, *, overwrite: bool = False, rank: int = 0, world_size: int = 1) -> bool:
        """Writes the shards and the manifest to `root`, see `grn.data.shards.write_shards`.

        Returns:
            Whether this process had a part in it.

        Raises:
            UserError: a key is out of range, a file or folder is not there, or `root` holds something else.
        """
        folder = _absolute(self.root if self.videos is None else self.videos)
        folder = folder.parent if self.videos is None else folder
        if not folder.is_dir():
            raise UserError(f"source.videos={self.videos} is not a folder: give the one that holds the videos")
        splits, digest = self._splits(folder)
        parameters = asdict(self) | {"root": str(_absolute(self.root)), "videos": str(folder), "lines": digest}
        del parameters["num_workers"], parameters["name"]
        return write_shards(
            root,
            name=self.name,
            parameters=parameters,
            shards=deal(splits, self.shard_size, self.seed),
            write=partial(self._samples, folder),
            facts={},
            num_workers=worker_count(self.num_workers),
            overwrite=overwrite,
            rank=rank,
            world_size=world_size,
        )

    def _splits(self, folder: Path) -> tuple[dict[str, list[Line]], str]:
        """The lines of each split, and a digest of the files."""
        lines, digest = list_lines("root", self.root)
        if isinstance(self.heldout, str):
            heldout, other = list_lines("source.heldout", self.heldout)
            return {"train": lines, "heldout": heldout}, f"{digest} {other}"
        if not 1 <= self.heldout < len(lines):
            raise UserError(
                f"source.heldout={self.heldout} must lie in 1 to {len(lines) - 1}, as root={self.root} has "
                f"{len(lines)} lines, or be the path of another such file"
            )
        heldout = set(draw_videos(lines, folder, self.heldout, self.seed))
        if len(heldout) == len(lines):
            raise UserError(
                f"source.heldout={self.heldout} of the {len(lines)} lines of root={self.root} leaves no video for "
                "training, as the parts of a video stay together: take fewer, or give the path of another such file"
            )
        return {"train": [line for line in lines if line not in heldout], "heldout": sorted(heldout)}, digest

    def _samples(self, folder: Path, lines: Sequence[Line]) -> Iterator[dict | Rejected]:
        for line in lines:
            try:
                yield {"__key__": f"{line.number:09d}"} | self._sample(folder, line)
            except Skip as skip:
                yield Rejected(f"{Path(line.file).name}:{line.number}", skip.reason.value)

    def _sample(self, folder: Path, line: Line) -> dict[str, bytes]:
        raw = {"json": read_line(line)}
        metadata = read_metadata(raw)
        caption = read_caption(raw, metadata)
        if self.captioned and not caption:
            raise Skip(Reason.NO_CAPTION)
        texts = {"txt": encode_caption(caption)} if caption else {}
        begin, end = read_section(raw)
        path = path_within(folder, metadata.get("video_path"))
        if (suffix := suffix_of(path)) not in VIDEO_SUFFIXES:
            raise Skip(Reason.NO_VIDEO)
        if (begin, end) == (0, None):
            video = read_file(path)
        else:
            video, start = cut_video(map_file(path), suffix, begin, end, max_bytes=MAX_ENTRY_BYTES[suffix])
            metadata |= frame_ids(max(begin - start, Fraction(0)), end and end - start, metadata["fps"])
        probe_video(video, suffix)
        return {suffix: video} | texts | {"json": _encode(metadata)}


def draw_videos(lines: Sequence[Line], folder: Path, count: int, seed: int) -> list[Line]:
    """All lines of videos that are drawn until there are `count` lines; a line that has no video is one of its own."""
    videos: dict[str | int, list[Line]] = {}
    for line in lines:
        path = video_of(line)
        videos.setdefault(line.number if path is None else os.path.normpath(folder / path), []).append(line)
    order = list(videos.values())
    random.Random(f"heldout/{seed}").shuffle(order)
    drawn = []
    for parts in order:
        if len(drawn) >= count:
            break
        drawn += parts
    return drawn


def list_lines(key: str, path: str) -> tuple[list[Line], str]:
    """(Every line of a file that is not blank, SHA-256 of the file); in memory there is a mebibyte of it at a time.

    Args:
        key: the config key of `path`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    lines, start, number, digest = [], 0, 0, hashlib.sha256()
    try:
        if not os.path.isfile(path := _absolute(path)):
            raise UserError(f"{key}: no file {path}; give a JSON-lines file of clips")
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
        raise UserError(f'{key}: {path} has no lines; one a clip is needed: {{"video_path": "a.mp4", "caption": ...}}')
    return lines, digest.hexdigest()[:16]


def video_of(line: Line) -> str | None:
    """Its video_path; None where there is none, for which the line will be rejected."""
    try:
        path = read_metadata({"json": read_line(line)}).get("video_path")
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


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))
