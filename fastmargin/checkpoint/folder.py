"""The folder of a checkpoint: versions, and a small file that names the one that counts.

::

    path/current              the name of a version
    path/version-0000000007/  .metadata, *.distcp: what torch.distributed.checkpoint writes
                              structure.pt: everything that is not a tensor

A version is written whole before ``current`` names it, so at any moment ``current`` names a whole
one. Others are what is left of unfinished saves and of versions that were replaced.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

CURRENT = "current"
STRUCTURE = "structure.pt"
_VERSION = re.compile(r"version-(\d{10})")


def current_version(path: Path) -> Path | None:
    """The folder of the version that counts; None without any."""
    try:
        name = (path / CURRENT).read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not _VERSION.fullmatch(name):
        raise ValueError(f"{path / CURRENT} does not name a version: {path} is no checkpoint")
    return path / name


def new_version(path: Path) -> Path:
    """Makes the folder of a version to write, and removes those that do not count."""
    path.mkdir(parents=True, exist_ok=True)
    current = current_version(path)
    number = 0 if current is None else int(_VERSION.fullmatch(current.name)[1])
    # a name that was never used: a process of an earlier, unfinished save may still write there
    number = max([number, *(int(_VERSION.fullmatch(old.name)[1]) for old in _versions(path))])
    version = path / f"version-{number + 1:010d}"
    version.mkdir()
    _remove_others(path, [current, version])
    return version


def make_current(version: Path) -> None:
    """From here on this version, which is whole, is the one that counts."""
    path = version.parent
    _sync_folder(version)
    temporary = path / f"{CURRENT}.new"
    with open(temporary, "w") as file:
        file.write(version.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path)
    os.replace(temporary, path / CURRENT)
    _sync_folder(path)
    _remove_others(path, [version])


def _versions(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if _VERSION.fullmatch(entry.name)]


def _remove_others(path: Path, kept: list[Path | None]) -> None:
    for version in _versions(path):
        if version not in kept:
            # what cannot be removed now does no harm, and is tried again in the next save
            shutil.rmtree(version, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    """Makes the names in a folder last through a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
