"""The data of a conversion: class centres, read in blocks, and what belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

BLOCK_BYTES = 32 << 20
"""Bytes of rows that are in memory at a time."""
STATISTICS = ("batch_mean", "batch_std")
"""Buffers of AdaFace, shape (1,)."""


class ConvertError(ValueError):
    """Invalid source or destination; the message names the file and the fix."""


@dataclass(frozen=True)
class Shard:
    """Consecutive rows (num_rows, dim) that lie in one file.

    read: ``read(start, stop)`` returns rows (stop - start, dim), a contiguous copy. The file is
    reopened each time, so that no page of it stays mapped.
    """

    path: Path
    num_rows: int
    dim: int
    dtype: torch.dtype
    read: Callable[[int, int], Tensor] = field(repr=False, compare=False)

    @property
    def block(self) -> int:
        """Number of rows in :data:`BLOCK_BYTES`, at least one."""
        return max(1, BLOCK_BYTES // (self.dim * self.dtype.itemsize))


def _nobody(rows: int) -> None:
    pass


@dataclass(frozen=True)
class Rows:
    """The first ``num_rows`` rows of consecutive shards; the rest are padding rows.

    tick: called with the number of rows after each read.
    """

    shards: tuple[Shard, ...]
    num_rows: int
    tick: Callable[[int], None] = field(default=_nobody, repr=False, compare=False)

    @property
    def dim(self) -> int:
        return self.shards[0].dim

    @property
    def dtype(self) -> torch.dtype:
        return self.shards[0].dtype

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.dim * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Tensor:
        """Rows (stop - start, dim), a copy."""
        parts, first = [], 0
        for shard in self.shards:
            low, high = max(start, first), min(stop, first + shard.num_rows)
            if low < high:
                parts.append(shard.read(low - first, high - first))
            first += shard.num_rows
        if not parts:
            return torch.empty((0, self.dim), dtype=self.dtype)
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        self.tick(len(rows))
        return rows

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The rows from ``start`` to ``stop`` in blocks, each with the index of its first row."""
        stop, step = self.num_rows if stop is None else stop, self.shards[0].block
        for low in range(start, stop, step):
            yield low, self.read(low, min(low + step, stop))

    def into(self, target: Tensor, start: int = 0) -> Tensor:
        """Fills ``target`` (n, dim), of any strides, with the rows from ``start`` on."""
        for low, block in self.blocks(start, start + len(target)):
            target[low - start : low - start + len(block)] = block
        return target

    def tensor(self, start: int, stop: int) -> Tensor:
        """As :meth:`read`, for any number; needs memory for these rows and one block."""
        return self.into(torch.empty((stop - start, self.dim), dtype=self.dtype), start)


@dataclass(frozen=True)
class Backbone:
    """The network that a source has besides the centres.

    load: returns its state_dict.
    """

    num_tensors: int
    load: Callable[[], dict[str, Tensor]] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Centres:
    """A classifier in files; none of its large tensors is in memory.

    format: name of the code base. weight: (C * sub_centers, D), the sub-centres of a class
    consecutive. momentum: SGD's buffer of the same rows. statistics: AdaFace's running
    ``batch_mean`` and ``batch_std``, (1,). left_out: descriptions of what else the source has.
    """

    format: str
    weight: Rows
    momentum: Rows | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)
    sub_centers: int = 1
    backbone: Backbone | None = None
    left_out: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return self.weight.num_rows // self.sub_centers


@dataclass(frozen=True)
class Reading:
    """What the files of some formats do not record.

    num_classes: without padding rows; checked where a file records it too. sub_centers: rows per
    class. head: name of the object in a fastmargin checkpoint.
    """

    num_classes: int | None = None
    sub_centers: int = 1
    head: str | None = None


@dataclass(frozen=True)
class Writing:
    """How to write.

    world_size: number of shards. margin: the margin whose state goes into a fastmargin checkpoint,
    as in ``fastmargin.AdaFace``; by default AdaFace if the source has its statistics. sampler_seed:
    of a head that samples classes, whose sampler is part of such a checkpoint; None: it does not.
    """

    world_size: int = 1
    margin: str | None = None
    sampler_seed: int | None = None


@dataclass(frozen=True)
class Format:
    """How a code base stores a classifier.

    Args:
        name: as in ``--from`` and ``--to``.
        files: description of the files.
        read: ``read(path, Reading)`` opens a folder or a file and describes it.
        write: ``write(centres, path, Writing)`` writes a folder or a file.
        owns: for a folder format, whether a file name belongs to it; None: it is one file.
        recognises: for a one-file format, whether the result of ``torch.load`` belongs to it.
        momentum, statistics, sub_centers: whether it can hold them.
    """

    name: str
    files: str
    read: Callable[[Path, Reading], Centres]
    write: Callable[[Centres, Path, Writing], None]
    owns: Callable[[str], bool] | None = None
    recognises: Callable[[object], bool] = lambda content: False
    momentum: bool = False
    statistics: bool = False
    sub_centers: bool = False
    sharded: bool = False


def left_out(centres: Centres, target: Format, writing: Writing, backbone: bool) -> list[str]:
    """Descriptions of what the source has and the destination will lack."""
    lost = list(centres.left_out)
    if centres.backbone is not None and not backbone:
        lost.append(f"backbone ({centres.backbone.num_tensors} tensors): --backbone writes it")
    if centres.momentum is not None and not target.momentum:
        lost.append(f"momentum: {target.name} has no place for it beside the centres")
    margin = writing.margin or "adaface"
    if centres.statistics and not (target.statistics and margin == "adaface"):
        whose = f"margin {margin}" if target.statistics else target.name
        lost.append(f"{', '.join(centres.statistics)} of AdaFace: {whose} has none")
    return lost
