"""Class centres in any ``torch.save`` file, under a key that the caller names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fastmargin.convert import files
from fastmargin.convert.centres import Centres, ConvertError, Reading
from fastmargin.convert.formats import one_file


def find(content: Any, key: str) -> Tensor | None:
    """The tensor under ``key``: an entry of a dict, or ``outer.inner`` through dicts in it.

    Keys may have dots themselves, as those of a ``state_dict``.
    """
    if not isinstance(content, dict):
        return None
    value = content.get(key)
    if isinstance(value, Tensor):
        return value
    for name, inner in content.items():
        if isinstance(name, str) and key.startswith(f"{name}."):
            found = find(inner, key[len(name) + 1 :])
            if found is not None:
                return found
    return None


def matrices(content: Any) -> list[str]:
    """Keys of all two-dimensional tensors, with their shapes, the largest first."""
    found: list[tuple[int, str]] = []

    def collect(content: Any, prefix: str) -> None:
        if not isinstance(content, dict):
            return
        for name, value in content.items():
            if not isinstance(name, str):
                continue
            if isinstance(value, Tensor) and value.dim() == 2:
                found.append((-value.numel(), f"{prefix}{name} {tuple(value.shape)}"))
            else:
                collect(value, f"{prefix}{name}.")

    collect(content, "")
    return [text for _, text in sorted(found)]


def read(path: Path, reading: Reading, key: str, transposed: bool = False) -> Centres:
    """Centres (C * sub_centers, D), or (D, C * sub_centers) where ``transposed``.

    Raises:
        ConvertError: there is no such matrix; says which there are.
    """
    if not path.is_file():
        raise ConvertError(f"{path} is no file: a key names a matrix in one torch.save file")
    content = files.load(path)
    matrix = find(content, key)
    if matrix is None or matrix.dim() != 2:
        there = ", ".join(matrices(content)[:5]) or "none"
        raise ConvertError(f"{path} has no matrix {key!r}; the largest are: {there}")
    weight = one_file.rows(path, content, lambda it: find(it, key), reading, transposed)
    return Centres(f"key {key}", weight, sub_centers=reading.sub_centers)
