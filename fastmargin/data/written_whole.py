"""Files that get their name when they are complete, or never."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class WholeFile:
    """A file under a temporary name next to its own, until :meth:`keep`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        # a leftover of a killed process may have the same number, as in containers
        self.file = open(self.temporary, "wb")

    def sync(self) -> None:
        """Flushes everything to the disk and closes the file."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def keep(self) -> None:
        """Gives the file its own name."""
        os.replace(self.temporary, self.path)

    def drop(self) -> None:
        """Removes the file."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write; after an error, the previous file is unchanged."""
    whole = WholeFile(path)
    try:
        yield whole.file
        whole.sync()
        whole.keep()
    except BaseException:
        whole.drop()
        raise
