"""Classifiers in one file per process: which file has which classes, and whether all are there."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastmargin.convert.centres import ConvertError, Rows, Shard

Split = Callable[[int, int], list[int]]
"""``split(num_classes, world_size)``: rows of every rank."""


def even(num_classes: int, world_size: int) -> list[int]:
    """C // W, and one more for the first C % W ranks: insightface, KappaFace."""
    share, more = divmod(num_classes, world_size)
    return [share + (rank < more) for rank in range(world_size)]


def padded(num_classes: int, world_size: int) -> list[int]:
    """ceil(C / W) for all, with padding rows after the last class: CVLface."""
    return [-(-num_classes // world_size)] * world_size


ORDER = "fastmargin_shards.json"
"""Written next to our shards: which rows each of them has. The other code ignores it."""


def mark(rows: Tensor) -> str:
    """Digest of a shard (n, D), of its size and both ends; "" without rows."""
    if not len(rows):
        return ""
    return _digest(len(rows), rows[:1], rows[-1:])


def _digest(count: int, first: Tensor, last: Tensor) -> str:
    found = hashlib.sha256(str(count).encode())
    for row in (first, last):
        found.update(row.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def write_order(folder: Path, marks: dict[str, str]) -> None:
    """Records the :func:`mark` of every file by name: sizes alone do not reveal a swap."""
    (folder / ORDER).write_text(json.dumps(marks, indent=1) + "\n")


def check_order(shards: Sequence[Shard]) -> None:
    """Compares shards with the record written next to them, if there is one.

    Files overwritten since, as by continued training, are not checked.

    Raises:
        ConvertError: a file has the rows of another one, or one of the set is missing.
    """
    folder = shards[0].path.parent
    file = folder / ORDER
    if not file.exists():
        return
    noted: dict[str, list[str]] = {}  # shards of padding rows are equal
    try:
        for name, found in json.loads(file.read_text()).items():
            noted.setdefault(found, []).append(name)
    except (ValueError, AttributeError, TypeError):
        raise ConvertError(f"{file} is damaged: remove it to do without") from None
    noted.pop("", None)
    own = {}
    for shard in shards:
        if shard.num_rows:
            ends = shard.read(0, 1), shard.read(shard.num_rows - 1, shard.num_rows)
            own[shard.path.name] = _digest(shard.num_rows, *ends)
    for name, found in own.items():
        if name not in noted.get(found, [name]):
            raise ConvertError(
                f"{folder / name} has the rows that {noted[found][0]} was written with: the "
                "shards are swapped or renamed"
            )
    missing = sorted({name for names in noted.values() for name in names} - own.keys())
    if missing and all(found in noted for found in own.values()):
        raise ConvertError(f"{folder}: {', '.join(missing)} missing of what was written there")


def numbered(folder: Path, name: str) -> list[Path]:
    """The files of ranks 0, 1, ... in a folder, by their name with ``{}`` for the rank.

    Raises:
        ConvertError: a rank is missing or duplicated, or there is none.
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
    """Shards in rank order, after all possible checks.

    num_classes: the expected number; None: the number of rows.

    Raises:
        ConvertError: inconsistent widths, dtypes or numbers of rows, or a copy.
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
    """Raises ConvertError if two shards have the same rows; zero (padding) rows may repeat."""
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
    """A momentum buffer, whose shards must have the shapes of the centres'."""
    for part, own in zip(rows.shards, weight.shards, strict=True):
        if (part.num_rows, part.dim) != (own.num_rows, own.dim):
            raise ConvertError(
                f"{part.path}: the {name} is {(part.num_rows, part.dim)}, the centres of "
                f"{own.path.name} {(own.num_rows, own.dim)}: they are of different runs"
            )
    return rows
