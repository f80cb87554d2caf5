"""Common parts of the one-file formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmargin.convert import files
from fastmargin.convert.centres import ConvertError, Reading, Rows


def rows(
    path: Path,
    content: Any,
    tensor_of: Callable[[Any], Tensor],
    reading: Reading,
    transposed: bool = False,
) -> Rows:
    """All rows of a file.

    Raises:
        ConvertError: their number is not ``num_classes * sub_centers``.
    """
    shard = files.shard(path, content, tensor_of, transposed)
    check_number(path, shard.num_rows, reading)
    return Rows((shard,), shard.num_rows)


def check_number(path: Path, num_rows: int, reading: Reading) -> None:
    if num_rows == 0 or num_rows % reading.sub_centers:
        raise ConvertError(
            f"{path} has {num_rows} centres, which are no whole number of classes with "
            f"{reading.sub_centers} centres each: see to --sub-centers"
        )
    if reading.num_classes not in (None, num_rows // reading.sub_centers):
        raise ConvertError(
            f"{path} has {num_rows // reading.sub_centers} classes, and num_classes is "
            f"{reading.num_classes}: leave it out, or see to the file"
        )


def columns(rows: Rows) -> Tensor:
    """(D, rows), the layout of code bases that compute ``x @ kernel``."""
    made = torch.empty((rows.dim, rows.num_rows), dtype=rows.dtype)
    rows.into(made.t())
    return made
