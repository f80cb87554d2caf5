"""The folder of a checkpoint: versions, and a small file that names the current one.

::

    path/current              the name of a version
    path/version-0000000007/  .metadata, *.distcp: what torch.distributed.checkpoint writes
                              structure.pt: everything that is not a tensor

A version is complete before ``current`` names it, so ``current`` always names a complete one.
Others are left from unfinished saves and replaced versions.
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
    """The folder of the current version; None without any."""
    try:
        name = (path / CURRENT).read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not _VERSION.fullmatch(name):
        raise ValueError(f"{path / CURRENT} does not name a version: {path} is no checkpoint")
    return path / name


def new_version(path: Path) -> Path:
    """Creates the folder of a new version, and removes all but the current one."""
    path.mkdir(parents=True, exist_ok=True)
    # not the name of a leftover version: another process may still write there
    number = max((int(_VERSION.fullmatch(old.name)[1]) for old in _versions(path)), default=0)
    version = path / f"version-{number + 1:010d}"
    version.mkdir()
    _remove_others(path, [current_version(path), version])
    return version


def make_current(version: Path) -> None:
    """Makes this version, which is complete, the current one."""
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
            # what cannot be removed now does no harm; the next save tries again
            shutil.rmtree(version, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    """Makes the file names in a folder durable against power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
