"""pytorch-metric-learning: the state_dict of a loss, ``W`` (D, C).

For SubCenterArcFaceLoss (D, C * K), with the K sub-centres of a class adjacent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fastmargin.convert import files
from fastmargin.convert.centres import Centres, Format, Reading, Writing
from fastmargin.convert.formats import one_file

KEY = "W"


def _weight(content: Any) -> Tensor:
    return content[KEY]


def _read(path: Path, reading: Reading) -> Centres:
    content = files.load(path)
    files.entry(path, content, KEY)
    weight = one_file.rows(path, content, _weight, reading, transposed=True)
    rest = tuple(key for key in content if key != KEY)
    return Centres("pml", weight, sub_centers=reading.sub_centers, left_out=rest)


def _write(centres: Centres, path: Path, writing: Writing) -> None:
    files.save(path, {KEY: one_file.columns(centres.weight)})


FORMAT = Format(
    "pml",
    "state_dict of a loss with W",
    _read,
    _write,
    recognises=lambda content: isinstance(content, dict) and KEY in content,
    sub_centers=True,
)
