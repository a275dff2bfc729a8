"""Tells JPEG files without an end marker from truncated ones.

Decoders fill up what is missing with gray and say nothing. So the file is decoded with several endings: where all of
its picture is there, none of them shows.
"""

import io
import re
import struct

from PIL import Image

END = b"\xff\xd9"
RESTARTS = [b"\xff" + bytes([marker]) for marker in range(0xD0, 0xD8)]
# What would be taken for the rest of the picture: any bits, and the markers that some decoders wait for before them.
BITS = [b"\x55" * 64, b"\xaa" * 64, bytes((7 + 67 * number + number**2) % 251 for number in range(64))]
FILLERS = [*BITS, *(b"".join(restart + bits for restart in RESTARTS * 2) for bits in BITS)]
FRAMES = {0xC0, 0xC1, 0xC2}  # markers of Huffman-coded frames: baseline, extended, progressive
SCAN = 0xDA
NEXT_MARKER = re.compile(
    rb"\xff[^\x00\xd0-\xd7\xff]"
)  # behind a scan's data, where FF 00 is a byte and D0.. restart it


def has_end(data: bytes) -> bool:
    """Whether there is an end marker behind the last scan: in a scan's data, neither marker can occur."""
    return data.rfind(END) > data.rfind(bytes([0xFF, SCAN]))


def completed(data: bytes) -> bytes | None:
    """The file with its end marker; None where its picture is not all there."""
    data = data[:-1] if data.endswith(b"\xff") else data  # half a marker
    if not _has_all_scans(data):
        return None
    try:
        picture = _picture(data + END)
        whole = all(_picture(data + filler + END) == picture for filler in FILLERS)
    except Exception:  # what Pillow raises on broken files has no common base
        return None
    return data + END if whole else None


def _picture(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data), formats=("JPEG",)).tobytes()


def _has_all_scans(data: bytes) -> bool:
    """Whether there are scans of every coefficient of every component, to its last bit."""
    missing: set[tuple[int, int]] = set()  # (component, coefficient)
    place = 2
    try:
        while place < len(data):
            _, marker, size = struct.unpack_from(">BBH", data, place)
            content, place = data[place + 4 : place + 2 + size], place + 2 + size
            if marker in FRAMES:
                missing = {(content[6 + 3 * i], k) for i in range(content[5]) for k in range(64)}
            if marker == SCAN:
                components = [content[1 + 2 * i] for i in range(content[0])]
                first, last, bits = content[1 + 2 * len(components) :][:3]
                if bits % 16 == 0:
                    missing -= {(component, k) for component in components for k in range(first, last + 1)}
                if (following := NEXT_MARKER.search(data, place)) is None:
                    return not missing
                place = following.start()
    except (struct.error, IndexError, ValueError):
        return False
    return not missing
