"""Shards for tests, written entry by entry."""

import io
import tarfile


def write_tar(path, entries):
    """(name, bytes) by (name, bytes); returns the path as a url."""
    with tarfile.open(path, "w") as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_labels(path, labels):
    """Of {key: label}, `key.cls` by `key.cls`."""
    return write_tar(path, [(f"{key}.cls", label) for key, label in labels.items()])
