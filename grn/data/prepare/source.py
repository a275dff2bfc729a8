"""What sources of shards share."""

import os
from abc import ABC, abstractmethod
from dataclasses import Field, asdict
from typing import Any, ClassVar

from grn.data.prepare.shards import write_shards


class Source(ABC):
    """What `grn.prepare` makes shards of: a dataclass of its config keys, and `name`, the data set's."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # as all dataclasses have
    name: str

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """The arguments of `write_shards` that tell what is written: `shards`, `write`; without `parameters` all keys.

        Raises:
            UserError: a key is out of range, or what is to be read is not there or not as it must be.
        """

    def write(self, root: str | os.PathLike, *, overwrite: bool = False, rank: int = 0, world_size: int = 1) -> bool:
        """Writes the shards and the manifest to `root`, see `grn.data.prepare.shards.write_shards`.

        Returns:
            Whether this process had a part in it.

        Raises:
            UserError: as of `content`, or `root` holds something else.
        """
        content = {"parameters": asdict(self), "facts": {}} | self.content()
        return write_shards(root, name=self.name, overwrite=overwrite, rank=rank, world_size=world_size, **content)
