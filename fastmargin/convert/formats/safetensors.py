"""The file of :meth:`fastmargin.MarginHead.export_centers`: the tensor "centers" (C, D).

The layout is that of safetensors: eight bytes with the length of the header, the header as JSON,
the values. It is read without that package.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmargin.convert.centres import Centres, ConvertError, Format, Reading, Rows, Shard, Writing
from fastmargin.convert.formats import one_file
from fastmargin.export import DTYPES, CentersFile

KEY, METADATA, SUB_CENTERS = "centers", "__metadata__", "sub_centers"
LONGEST_HEADER = 100 << 20


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the offset of the values."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else LONGEST_HEADER
        if 8 + length > min(size, LONGEST_HEADER):
            raise ConvertError(f"{path} is cut short, or no safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ConvertError(f"{path} has no header of safetensors: {error}") from error
    if not isinstance(header, dict):
        raise ConvertError(f"{path} has no header of safetensors")
    return header, 8 + length


def _read(path: Path, reading: Reading) -> Centres:
    header, begin = _header(path)
    words = header.pop(METADATA, None) or {}
    if KEY not in header:
        raise ConvertError(f"{path} has no tensor {KEY!r}, but {', '.join(header) or 'none'}")
    try:
        entry = header[KEY]
        dtype = {name: dtype for dtype, name in DTYPES.items()}[entry["dtype"]]
        num_rows, dim = entry["shape"]
        low, high = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConvertError(f"{path}: {KEY} is no matrix of floats: {header[KEY]}") from error
    if high - low != math.prod((num_rows, dim, dtype.itemsize)) or dim < 1:
        raise ConvertError(f"{path}: {KEY} is damaged: {entry}")
    if begin + high > path.stat().st_size:
        raise ConvertError(f"{path} is cut short: it ends before the last of {num_rows} centres")

    def read(start: int, stop: int) -> Tensor:
        rows = torch.empty((stop - start, dim), dtype=dtype)
        view = memoryview(rows.view(torch.uint8).numpy()).cast("B") if rows.numel() else b""
        with open(path, "rb") as file:
            file.seek(begin + low + start * dim * dtype.itemsize)
            if rows.numel() and file.readinto(view) != len(view):
                raise ConvertError(f"{path} is cut short: it ends before row {stop}")
        return rows

    sub_centers = int(words.get(SUB_CENTERS, reading.sub_centers))
    if reading.sub_centers not in (1, sub_centers):
        raise ConvertError(
            f"{path} has {sub_centers} centres for each class, and --sub-centers says "
            f"{reading.sub_centers}: leave it out"
        )
    one_file.check_number(path, num_rows, Reading(reading.num_classes, sub_centers))
    rows = Rows((Shard(path, num_rows, dim, dtype, read),), num_rows)
    rest = tuple(name for name in header if name != KEY)
    return Centres("safetensors", rows, sub_centers=sub_centers, left_out=rest)


def _write(centres: Centres, path: Path, writing: Writing) -> None:
    rows, more = centres.weight, {}
    if centres.sub_centers > 1:
        more = {SUB_CENTERS: str(centres.sub_centers)}
    file = CentersFile(path, (rows.num_rows, rows.dim), rows.dtype, more)
    try:
        for _, block in rows.blocks():
            file.add(block)
        file.finish()
    finally:
        file.close()


FORMAT = Format(
    "safetensors",
    "a .safetensors file with the tensor centers",
    _read,
    _write,
    sub_centers=True,
)
