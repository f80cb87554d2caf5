"""CVLface: ``classifier_rank{rank}.pt`` in a folder of ``checkpoints``.

PartialFC rounds the number of classes up to a multiple of the number of processes, so the last
rows may be padding; the files do not record how many. New padding rows are zeros, as when CVLface
changes the number of processes. The classifier "fc" has one file, of rank 0.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmargin.convert import files, shards
from fastmargin.convert.centres import (
    STATISTICS,
    Backbone,
    Centres,
    ConvertError,
    Format,
    Reading,
    Writing,
)

NAME = "classifier_rank{}.pt"
PARTIAL_FC, FC = "partial_fc.", "classifier."
BESIDE = ("optimizer.pt", "lr_scheduler.pt", "pipeline.pt")


def _prefix(path: Path, content: Any) -> str:
    for prefix in (PARTIAL_FC, FC):
        if isinstance(content, dict) and f"{prefix}weight" in content:
            return prefix
    raise ConvertError(f"{path} has no '{PARTIAL_FC}weight': it is no file of this format")


def _weight(content: dict[str, Tensor]) -> Tensor:
    return content[f"{_prefix(Path(), content)}weight"]


def _read(path: Path, reading: Reading) -> Centres:
    found, statistics, rest = [], {}, []
    for file in (paths := shards.numbered(path, NAME)):
        content = files.load(file)
        prefix = _prefix(file, content)
        found.append(files.shard(file, content, _weight))
        names = [name for name in STATISTICS if f"{prefix}{name}" in content]
        own = {name: content[f"{prefix}{name}"].clone() for name in names}
        if file is paths[0]:
            statistics = own
            used = {f"{prefix}{name}" for name in ("weight", *STATISTICS)}
            rest = [key for key in content if key not in used]
        elif {name: value.tolist() for name, value in own.items()} != {
            name: value.tolist() for name, value in statistics.items()
        }:
            raise ConvertError(
                f"{file}: AdaFace's statistics are others than in {paths[0].name}: they were "
                "saved at different times"
            )
    shards.check_order(found)
    rows = shards.joined(found, shards.padded, reading.num_classes, pads=True)
    rest += [name for name in BESIDE if (path / name).exists()]
    model, backbone = path / "model.pt", None
    if model.exists():
        backbone = Backbone(len(files.load(model)), lambda: files.load(model))
    return Centres("cvlface", rows, statistics=statistics, backbone=backbone, left_out=tuple(rest))


def _write(centres: Centres, path: Path, writing: Writing) -> None:
    path.mkdir()
    start, classes, marks = 0, centres.num_classes, {}
    for rank, count in enumerate(shards.padded(classes, writing.world_size)):
        rows = torch.zeros((count, centres.weight.dim), dtype=centres.weight.dtype)
        here = max(0, min(count, classes - start))
        centres.weight.into(rows[:here], start)
        state = {f"{PARTIAL_FC}{name}": value for name, value in centres.statistics.items()}
        files.save(path / NAME.format(rank), {f"{PARTIAL_FC}weight": rows, **state})
        marks[NAME.format(rank)] = shards.mark(rows)
        start += count
    shards.write_order(path, marks)


FORMAT = Format(
    "cvlface",
    "classifier_rank{rank}.pt",
    _read,
    _write,
    owns=lambda name: re.fullmatch(r"classifier_rank\d+\.pt", name) is not None,
    statistics=True,
    sharded=True,
)
