"""Files that appear under their name when they are complete, or never."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class WholeFile:
    """A file under a temporary name beside its own, until :meth:`keep`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        self.file = open(self.temporary, "xb")

    def sync(self) -> None:
        """Everything written so far is on the disk, and the file closed."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def keep(self) -> None:
        """Under its own name from here on."""
        os.replace(self.temporary, self.path)

    def drop(self) -> None:
        """As if it had never been."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write; an error leaves what was there before."""
    whole = WholeFile(path)
    try:
        yield whole.file
        whole.sync()
        whole.keep()
    except BaseException:
        whole.drop()
        raise
