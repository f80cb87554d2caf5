"""``torch.save`` files, read without trusting them, and written atomically."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmargin.convert.centres import ConvertError, Shard


class StandIn:
    """Placeholder for an object that is not needed; it runs nothing."""

    def __init__(self, *_, **__) -> None:
        pass

    def __setstate__(self, _) -> None:
        pass


# the image transforms that NPT's training script puts into its checkpoints
TRANSFORMS = ("Compose", "CenterCrop", "Normalize", "RandomHorizontalFlip", "Resize", "ToTensor")
# Lightning before 1.5 has classes of callbacks for keys
CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
STAND_INS = [
    *((StandIn, f"torchvision.transforms.transforms.{name}") for name in TRANSFORMS),
    (StandIn, CALLBACK),
]
AGAIN = "copy it again from where it came"


def load(path: Path, allowed: tuple[type, ...] = ()) -> Any:
    """What ``torch.save`` wrote; tensors are memory-mapped, on the host.

    Only tensors, plain values and ``allowed`` classes are read.

    Raises:
        ConvertError: it is truncated, from before torch 1.6, not such a file, or holds more.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        begins = file.read(4) == b"PK\x03\x04"
    if not begins:
        raise ConvertError(
            f"{path} is empty, or no file that torch.save writes since torch 1.6: if it is older, "
            "load and save it again where you trust it"
        )
    if not zipfile.is_zipfile(path):  # the directory is at the end
        raise ConvertError(f"{path} is cut short: {AGAIN}")
    try:
        with torch.serialization.safe_globals([*allowed, *STAND_INS]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ConvertError(
            f"{path} holds more than tensors and plain values ({_needs(path)}), which could run "
            "code when it is loaded: where you trust it, load it and save what is needed again"
        ) from error
    except (RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConvertError(f"{path} is damaged ({reason}): {AGAIN}") from error


def _needs(path: Path) -> str:
    try:
        with torch.serialization.safe_globals(STAND_INS):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # only for the error message
        names = []
    return ", ".join(names[:5]) or "its pickle uses what weights_only does not allow"


def entry(path: Path, content: Any, *keys) -> Any:
    """``content[key][key]...``; a missing key is an error that names the file."""
    for i, key in enumerate(keys):
        if not isinstance(content, dict) or key not in content:
            name = ".".join(map(str, keys[: i + 1]))
            raise ConvertError(f"{path} has no {name!r}: it is no file of this format")
        content = content[key]
    return content


OPENINGS = 16
"""For a block of columns: the system maps more than is read, up to the whole file at once."""


def shard(
    path: Path, content: Any, tensor_of: Callable[[Any], Tensor], transposed: bool = False
) -> Shard:
    """Rows in a file of ``torch.save``.

    content: of the file. tensor_of: returns its tensor, (rows, D), or (D, rows) if transposed.

    Raises:
        ConvertError: it is not a floating-point matrix.
    """
    tensor = tensor_of(content)
    is_matrix = isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.layout == torch.strided
    if not is_matrix or not tensor.is_floating_point():
        what = f"a {type(tensor).__name__}"
        if isinstance(tensor, Tensor):
            what = f"of shape {tuple(tensor.shape)} and {tensor.dtype}"
        raise ConvertError(f"{path}: the centres are {what}, expected a matrix of floats")
    num_rows, dim = reversed(tensor.shape) if transposed else tensor.shape
    if dim == 0:
        raise ConvertError(f"{path}: the centres have no columns")
    dtype = tensor.dtype

    def read(start: int, stop: int) -> Tensor:
        rows = torch.empty((stop - start, dim), dtype=dtype)
        if not transposed:
            return rows.copy_(tensor_of(load(path)).detach()[start:stop])
        step = -(-dim // OPENINGS)
        for low in range(0, dim, step):
            part = tensor_of(load(path)).detach()[low : low + step, start:stop]
            rows[:, low : low + step] = part.t()
        return rows

    return Shard(path, num_rows, dim, dtype, read)


def save(path: Path, content: Any) -> None:
    """``torch.save``, synchronised to the disk when it returns."""
    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary paths that replace ``paths`` at the end, all or none of them.

    After an error nothing has changed.
    """
    new = [path.with_name(f".{path.name}.{os.getpid()}.new") for path in paths]
    old = [path.with_name(f".{path.name}.{os.getpid()}.old") for path in paths]
    moves: list[tuple[Path, Path]] = []
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        try:
            for path, fresh, aside in zip(paths, new, old, strict=True):
                for source, target in ((path, aside), (fresh, path)):
                    if os.path.lexists(source):
                        os.rename(source, target)
                        moves.append((source, target))
        except BaseException:
            for source, target in reversed(moves):
                os.rename(target, source)
            raise
        for aside in old:
            remove(aside)
    finally:
        for fresh in new:
            remove(fresh)
