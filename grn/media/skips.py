"""Why a sample cannot be used, and what is noted of one that can."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum


class Reason(Enum):
    """Why a sample, or the rest of a shard, was skipped; the value is what people read."""

    BROKEN_SHARD = "shard broken or truncated"
    UNREACHABLE_SHARD = "shard cannot be reached"
    OVERSIZE_ENTRY = "entry too large"
    DUPLICATE_ENTRY = "entry twice in a shard"
    UNDECODABLE_SAMPLE = "sample cannot be decoded"
    UNREADABLE_FILE = "file cannot be read"
    OTHER_KIND = "other kind of file"
    OTHER_PLACE = "not in a folder that is read"
    LONE_CAPTION = "caption of no file"
    NO_IMAGE = "no image"
    UNDECODABLE_IMAGE = "image cannot be decoded"
    UNKNOWN_RANGE = "image of numbers whose range is not known"
    TOO_MANY_PIXELS = "too many pixels"
    IMAGE_SIZE = "image of another size"
    TOO_SMALL = "image too small"
    TOO_NARROW = "image too long or too tall"
    TOO_MANY_TOKENS = "more tokens than a pack has"
    LARGE_SHARE = "more of a pack than data.max_share"
    NO_VIDEO = "no video"
    NO_PATH = "no image_path or video_path"
    OUTSIDE_FOLDER = "image_path or video_path leads out of the folder"
    UNDECODABLE_VIDEO = "video cannot be decoded"
    CUT_SHORT = "video ends before its index does"
    UNCUTTABLE_VIDEO = "no part can be cut out of the video"
    BAD_SECTION = "begin_frame_id, end_frame_id and fps tell no part of the video"
    CLIP_TOO_SHORT = "video shorter than the clip"
    TOO_MANY_FRAMES = "too many frames to decode for a clip"
    BAD_METADATA = "metadata is not a JSON object"
    NO_LABEL = "no label"
    BAD_LABEL = "label is not an integer"
    LABEL_OUT_OF_RANGE = "label out of range"
    BAD_CAPTION = "caption is not UTF-8 text"
    NO_CAPTION = "no caption"
    NO_TOKENS = "no tokens"
    BAD_TOKENS = "tokens of another shape"
    NO_FEATURES = "no features of the caption"
    BAD_FEATURES = "features of another shape or type"


class Note(Enum):
    """What is not right about a sample that is used all the same; the value is what people read."""

    NO_END_MARKER = "JPEG without its end marker"
    BAD_PROFILE = "color profile that cannot be used"
    CUT_CAPTION = "caption cut, longer than text_encoder.max_length"


@contextmanager
def noting() -> Iterator[list[Note]]:
    """The notes on what is decoded inside the block, in this thread."""
    notes: list[Note] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def note(it: Note) -> None:
    """For whoever is `noting`."""
    if (notes := _notes.get()) is not None:
        notes.append(it)


class Skip(Exception):
    """The sample at hand is unusable.

    Args:
        detail: for the log.
    """

    def __init__(self, reason: Reason, detail: str = ""):
        super().__init__(reason.value)
        self.reason, self.detail = reason, detail


_notes: ContextVar[list[Note] | None] = ContextVar("notes", default=None)
