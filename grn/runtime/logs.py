"""Log format and log file of commands."""

import logging
import os
from io import TextIOWrapper
from pathlib import Path

from grn.runtime.secrets import cut_line


class Formatter(logging.Formatter):
    """Lines without what gives access to data (`grn.runtime.secrets`); stacks of frames stay as they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return cut_line(super().formatMessage(record))


class LogFile(logging.FileHandler):
    """Appends to a file of the run, and never to what a link in its place leads to: that link is replaced.

    A run folder may be somebody else's, and whatever stands in it is named by them.
    """

    def _open(self) -> TextIOWrapper:
        if os.path.islink(self.baseFilename):
            Path(self.baseFilename).unlink()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        return open(os.open(self.baseFilename, flags, 0o666), "a", encoding="utf-8")
