"""The one exception for what a user can mend: a key, a path, a file, a shape."""


class UserError(Exception):
    """What is wrong and how to mend it, in one line that names the key or the path.

    Entry points print it without a stack of frames (`grn.cli`); everything else that escapes is a bug and keeps its
    traceback. Raised in a DataLoader worker it reaches the main process wrapped in the worker's traceback, of which
    only the last line is kept.
    """

    def __init__(self, message: str):
        if message.startswith("Caught ") and "Original Traceback" in message:
            message = message.strip().rsplit("\n", 1)[-1].partition(": ")[2]
        super().__init__(message)
