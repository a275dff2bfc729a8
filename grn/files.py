"""Files are written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Lets `write` fill a temporary file beside `path` (its folder is made), then renames it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # mkstemp would make the file private to its owner; files on a cluster are shared.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        write(temporary)
        os.replace(temporary, path)
    return path


def write_folder(path: Path, write: Callable[[Path], object]) -> Path:
    """Lets `write` fill a temporary folder beside `path`, then renames it to `path`; what was there is replaced."""

    def fill(temporary: Path) -> None:
        temporary.mkdir()
        write(temporary)
        if path.is_dir():
            os.replace(path, temporary.with_name("earlier"))  # goes with the temporary files

    return write_atomically(path, fill)


def write_text(path: Path, text: str) -> Path:
    """Writes UTF-8 text atomically."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: object) -> Path:
    """Writes indented JSON atomically."""
    return write_text(path, json.dumps(content, indent=2) + "\n")
