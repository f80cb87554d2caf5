"""Classifiers in one file per process: which file has which classes, and whether all are there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastmargin.convert.centres import ConvertError, Rows, Shard

Split = Callable[[int, int], list[int]]
"""``split(num_classes, world_size)``: rows of every rank."""


def even(num_classes: int, world_size: int) -> list[int]:
    """C // W, and one more for the first C % W ranks: insightface, KappaFace."""
    share, more = divmod(num_classes, world_size)
    return [share + (rank < more) for rank in range(world_size)]


def padded(num_classes: int, world_size: int) -> list[int]:
    """ceil(C / W) for all, with pad rows after the last class: CVLface."""
    return [-(-num_classes // world_size)] * world_size


def numbered(folder: Path, name: str) -> list[Path]:
    """The files of ranks 0, 1, ... in a folder, by their name with ``{}`` for the rank.

    Raises:
        ConvertError: a rank is missing, or there twice, or there is none.
    """
    before, after = map(re.escape, name.split("{}"))
    files: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if found := re.fullmatch(rf"{before}(\d+){after}", path.name):
            rank = int(found[1])
            if rank in files:
                raise ConvertError(
                    f"{folder}: {files[rank].name} and {path.name} are both of rank {rank}: "
                    "remove one"
                )
            files[rank] = path
    if not files:
        raise ConvertError(f"{folder} has no {name.format('{rank}')}")
    missing = [name.format(rank) for rank in range(max(files)) if rank not in files]
    if missing:
        raise ConvertError(
            f"{folder}: {', '.join(missing)} missing of the ranks 0 to {max(files)}: put the "
            "shards of all processes there"
        )
    return [files[rank] for rank in range(len(files))]


def joined(
    shards: Sequence[Shard], split: Split, num_classes: int | None, pads: bool = False
) -> Rows:
    """Shards in the order of their ranks, after every check that is possible.

    num_classes: the number that there must be; None: as many as the rows.

    Raises:
        ConvertError: other widths, dtypes or numbers of rows than the rule says, or a copy.
    """
    _check_alike(shards)
    rows = sum(shard.num_rows for shard in shards)
    if rows == 0:
        raise ConvertError(f"{shards[0].path} and the {len(shards) - 1} others have no rows")
    alike = len({shard.num_rows for shard in shards}) == 1
    if pads and alike and len(shards) > 1 and num_classes is None:
        raise ConvertError(
            f"{shards[0].path.parent}: {len(shards)} shards with {rows} rows, which may be "
            f"{rows - len(shards) + 1} to {rows} classes and pad rows: give --num-classes "
            "(num_classes), as in the configuration of the data set"
        )
    num_classes = rows if num_classes is None else num_classes
    expected = split(num_classes, len(shards))
    if rows != sum(expected):
        raise ConvertError(
            f"{shards[0].path.parent}: the {len(shards)} shards have {rows} rows, and "
            f"{num_classes} classes would be {sum(expected)}: the shards after "
            f"{shards[-1].path.name} are missing, others are of another run, or num_classes is "
            "wrong"
        )
    wrong = [
        f"{shard.path.name} has {shard.num_rows} rows instead of {count}"
        for shard, count in zip(shards, expected, strict=True)
        if shard.num_rows != count
    ]
    if wrong:
        raise ConvertError(
            f"{shards[0].path.parent}: by its rule for {num_classes} classes in {len(shards)} "
            f"shards, {'; '.join(wrong)}: shards are swapped, missing, or of another run"
        )
    check_no_copies(shards)
    return Rows(tuple(shards), num_classes)


def _check_alike(shards: Sequence[Shard]) -> None:
    first = shards[0]
    for shard in shards[1:]:
        if shard.dim != first.dim:
            raise ConvertError(
                f"{shard.path} has centres of {shard.dim} columns, {first.path.name} of "
                f"{first.dim}: they are of different runs"
            )
        if shard.dtype != first.dtype:
            raise ConvertError(
                f"{shard.path} has centres of {shard.dtype}, {first.path.name} of {first.dtype}: "
                "save them in one dtype"
            )


def check_no_copies(shards: Sequence[Shard]) -> None:
    """Raises ConvertError if two shards have the same rows; zeros, as in pad rows, may repeat."""
    seen: dict[tuple, Shard] = {}
    for shard in shards:
        if not shard.num_rows:
            continue
        ends = (shard.read(0, 1), shard.read(shard.num_rows - 1, shard.num_rows))
        key = (shard.num_rows, *(end.view(torch.uint8).numpy().tobytes() for end in ends))
        other = seen.setdefault(key, shard)
        if other is not shard and _same(shard, other):
            raise ConvertError(
                f"{shard.path} has the same rows as {other.path.name}: one is a copy of the other"
            )


def _same(a: Shard, b: Shard) -> bool:
    some = False
    for low in range(0, a.num_rows, a.block):
        high = min(low + a.block, a.num_rows)
        rows = a.read(low, high)
        if not torch.equal(rows.view(torch.uint8), b.read(low, high).view(torch.uint8)):
            return False
        some = some or bool(rows.any())
    return some


def same_rows(name: str, rows: Rows, weight: Rows) -> Rows:
    """A momentum buffer, shard by shard of the shapes of the centres."""
    for part, own in zip(rows.shards, weight.shards, strict=True):
        if (part.num_rows, part.dim) != (own.num_rows, own.dim):
            raise ConvertError(
                f"{part.path}: the {name} is {(part.num_rows, part.dim)}, the centres of "
                f"{own.path.name} {(own.num_rows, own.dim)}: they are of different runs"
            )
    return rows
