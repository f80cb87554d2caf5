"""KappaFace's PartialFC, and insightface's before ``PartialFC_V2``.

Every rank has its rows in ``rank_{rank}_softmax_weight.pt`` and their momentum in
``rank_{rank}_softmax_weight_mom.pt``, each a tensor. Without a momentum file the original resumes
with new centres, so it is always written: zeros, equivalent to none, if the source has none. The
backbone is in ``backbone.pth``.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from fastmargin.convert import files, shards
from fastmargin.convert.centres import Backbone, Centres, ConvertError, Format, Reading, Writing

NAME, MOMENTUM = "rank_{}_softmax_weight.pt", "rank_{}_softmax_weight_mom.pt"


def _itself(content: Tensor) -> Tensor:
    return content


def _rows(paths: list[Path], num_classes: int | None):
    found = [files.shard(path, files.load(path), _itself) for path in paths]
    shards.check_order(found)
    return shards.joined(found, shards.even, num_classes)


def _read(path: Path, reading: Reading) -> Centres:
    paths = shards.numbered(path, NAME)
    rows = _rows(paths, reading.num_classes)
    moments = [path / MOMENTUM.format(rank) for rank in range(len(paths))]
    there = [moment.exists() for moment in moments]
    if any(there) and not all(there):
        raise ConvertError(
            f"{moments[there.index(False)]} is missing, and other ranks have their momentum: put "
            "it there, or take all of them away to do without"
        )
    momentum = None
    if all(there):
        shapes = [files.shard(moment, files.load(moment), _itself) for moment in moments]
        shards.same_rows("momentum", shards.Rows(tuple(shapes), rows.num_rows), rows)
        momentum = shards.joined(shapes, shards.even, None)
    beside = path / "backbone.pth"
    backbone = None
    if beside.exists():
        backbone = Backbone(len(files.load(beside)), lambda: files.load(beside))
    rest = ("state.t7",) if (path / "state.t7").exists() else ()
    return Centres("kappaface", rows, momentum, backbone=backbone, left_out=rest)


def _write(centres: Centres, path: Path, writing: Writing) -> None:
    path.mkdir()
    start, marks = 0, {}
    for rank, count in enumerate(shards.even(centres.num_classes, writing.world_size)):
        rows = centres.weight.tensor(start, start + count)
        files.save(path / NAME.format(rank), rows)
        marks[NAME.format(rank)] = shards.mark(rows)
        del rows
        if centres.momentum is None:
            buffer = torch.zeros((count, centres.weight.dim), dtype=centres.weight.dtype)
        else:
            buffer = centres.momentum.tensor(start, start + count)
        files.save(path / MOMENTUM.format(rank), buffer)
        start += count
    shards.write_order(path, marks)


FORMAT = Format(
    "kappaface",
    "rank_{rank}_softmax_weight.pt, rank_{rank}_softmax_weight_mom.pt",
    _read,
    _write,
    owns=lambda name: re.fullmatch(r"rank_\d+_softmax_weight(_mom)?\.pt", name) is not None,
    momentum=True,
    sharded=True,
)
