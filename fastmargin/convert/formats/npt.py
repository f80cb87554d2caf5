"""NPT-Loss: ``model_epoch_{n}.pth``, whose ``head_fc`` (C, D) is the weight of its Linear.

The backbone under ``weight`` was in DataParallel. The image transforms in the file are not loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fastmargin.convert import files
from fastmargin.convert.centres import Backbone, Centres, ConvertError, Format, Reading, Writing
from fastmargin.convert.formats import one_file

HEAD, BACKBONE = "head_fc", "weight"


def _weight(content: Any) -> Tensor:
    return content[HEAD]


def _backbone(content: Any) -> dict[str, Tensor]:
    return {key.removeprefix("module."): value for key, value in content[BACKBONE].items()}


def _read(path: Path, reading: Reading) -> Centres:
    content = files.load(path)
    files.entry(path, content, HEAD)
    weight = one_file.rows(path, content, _weight, reading)
    classes = content.get("num_classes", weight.num_rows)
    if classes != weight.num_rows:
        raise ConvertError(
            f"{path}: num_classes is {classes}, and {HEAD} has {weight.num_rows} rows"
        )
    backbone = None
    if content.get(BACKBONE):
        backbone = Backbone(len(content[BACKBONE]), lambda: _backbone(files.load(path)))
    rest = tuple(key for key in content if key not in (HEAD, BACKBONE, "num_classes"))
    return Centres("npt", weight, backbone=backbone, left_out=rest)


def _write(centres: Centres, path: Path, writing: Writing) -> None:
    rows = centres.weight.tensor(0, centres.num_classes)
    files.save(path, {HEAD: rows, "num_classes": centres.num_classes})


FORMAT = Format(
    "npt",
    "model_epoch_{n}.pth with head_fc",
    _read,
    _write,
    recognises=lambda content: isinstance(content, dict) and HEAD in content,
)
