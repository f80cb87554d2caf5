"""What a conversion carries: class centres, read piece by piece, and what goes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

BLOCK_BYTES = 32 << 20
"""Of rows that are in memory at a time."""
STATISTICS = ("batch_mean", "batch_std")
"""Buffers of AdaFace, shape (1,)."""


class ConvertError(ValueError):
    """The source or the destination does not do; the message names the file and the remedy."""


@dataclass(frozen=True)
class Shard:
    """Consecutive rows (num_rows, dim) that lie in one file.

    read: ``read(start, stop)`` gives rows (stop - start, dim), contiguous and in memory of their
    own. The file is opened anew each time, so that no page of it stays mapped.
    """

    path: Path
    num_rows: int
    dim: int
    dtype: torch.dtype
    read: Callable[[int, int], Tensor] = field(repr=False, compare=False)

    @property
    def block(self) -> int:
        """Rows that make up :data:`BLOCK_BYTES`, one at least."""
        return max(1, BLOCK_BYTES // (self.dim * self.dtype.itemsize))


def _nobody(rows: int) -> None:
    pass


@dataclass(frozen=True)
class Rows:
    """The first ``num_rows`` rows of shards that follow one another; the rest are pad rows.

    tick: told the number of rows after each reading.
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
        """Rows (stop - start, dim), in memory of their own."""
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
        """The rows from ``start`` to ``stop`` in blocks, each with the place of its first row."""
        stop, step = self.num_rows if stop is None else stop, self.shards[0].block
        for low in range(start, stop, step):
            yield low, self.read(low, min(low + step, stop))

    def into(self, target: Tensor, start: int = 0) -> Tensor:
        """Fills ``target`` (n, dim), of any strides, with the rows from ``start`` on."""
        for low, block in self.blocks(start, start + len(target)):
            target[low - start : low - start + len(block)] = block
        return target

    def tensor(self, start: int, stop: int) -> Tensor:
        """The same as :meth:`read`, however many; memory for these rows and a block."""
        return self.into(torch.empty((stop - start, self.dim), dtype=self.dtype), start)


@dataclass(frozen=True)
class Backbone:
    """The network that a source has beside the centres.

    load: gives its state_dict.
    """

    num_tensors: int
    load: Callable[[], dict[str, Tensor]] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Centres:
    """A classifier as it lies in files; nothing of its size is in memory.

    format: name of the code base. weight: (C * sub_centers, D), the sub-centres of a class one
    after the other. momentum: SGD's buffer of the same rows. statistics: AdaFace's running
    ``batch_mean`` and ``batch_std``, (1,). left_out: what else the source has, in words.
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
    """What the files of some formats do not tell.

    num_classes: without pad rows; compared where a file tells it, too. sub_centers: rows of each
    class. head: name of the object in a checkpoint of fastmargin.
    """

    num_classes: int | None = None
    sub_centers: int = 1
    head: str | None = None


@dataclass(frozen=True)
class Writing:
    """How to write.

    world_size: number of processes that will share out the classes. margin: whose state goes into
    a checkpoint of fastmargin, as in ``fastmargin.AdaFace``; by default AdaFace where there are
    its statistics. sampler_seed: of a head that samples classes, whose sampler is part of such a
    checkpoint; None: one that does not.
    """

    world_size: int = 1
    margin: str | None = None
    sampler_seed: int | None = None


@dataclass(frozen=True)
class Format:
    """How a code base keeps a classifier.

    Args:
        name: as in ``--from`` and ``--to``.
        files: the files, in words.
        read: ``read(path, Reading)`` looks at a folder or a file and describes it.
        write: ``write(centres, path, Writing)`` makes a folder or a file.
        owns: of a format in a folder, whether a name in it is its own; None: it is one file.
        recognises: of a format in one file, whether this content of ``torch.load`` is its own.
        momentum, statistics, sub_centers: whether it has a place for them.
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
    """What the source has and the destination will not, in words."""
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
