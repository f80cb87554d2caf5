"""Which centres take part in a pass, and how they are sharded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmargin.distributed.batch import Batch
from fastmargin.distributed.shard import ClassShard
from fastmargin.sampling import ClassSampler, Sample
from fastmargin.spec import RowStats

GRAD_REDUCES = ("mean", "sum")


@dataclass(frozen=True)
class Columns:
    """Centres that take part in a pass.

    index: (K,) int64 rows of the weight, -1 in a padding slot; None for all rows. labels: (B,)
    int64; ``labels - class_start`` is the position of each row's own centre, in ``index`` or else
    in the weight. log_weight: scalar added to the logits of these centres, or None.
    """

    labels: Tensor
    class_start: int = 0
    index: Tensor | None = None
    log_weight: Tensor | None = None

    @staticmethod
    def of(sample: Sample, rows: slice, log_weight: Tensor | None) -> list[Columns]:
        """The sampled centres; with a ``log_weight`` in two parts, since positives have none.

        rows: which of the labels that the sample was drawn for belong to this pass. log_weight: of
        the negatives.
        """
        labels = sample.column[rows]
        if log_weight is None:
            return [Columns(labels, index=sample.index)]
        place = torch.arange(sample.index.shape[0], device=sample.index.device)
        positive = place < sample.num_positives
        # there are at most as many positives as rows, which keeps the first part short
        # padding slots hold the complement of a row that takes part: see ops.spread_rows
        empty = ~sample.index[:1]
        first = torch.where(positive, sample.index, empty)[: sample.column.shape[0]]
        rest = torch.where(positive | (sample.index < 0), empty, sample.index)
        foreign = torch.full_like(labels, -1)
        return [
            Columns(labels, index=first),
            Columns(foreign, index=rest, log_weight=log_weight),
        ]


@dataclass(frozen=True)
class Classes:
    """Which classes the weight holds and which of them take part in a step; by default all.

    shard: the :class:`fastmargin.distributed.shard.ClassShard` that the weight is, or None for all
    classes. sampler: draws the classes of a training step, or None for all. The other fields are as
    in :class:`fastmargin.MarginHead`.
    """

    shard: ClassShard | None = None
    sampler: ClassSampler | None = None
    sparse_grad: bool = False
    corrected: bool = False
    grad_reduce: str = "mean"
    batch_size: int | None = None
    row_tolerance: float = 0.0

    @property
    def grad_factor(self) -> int:
        """Factor on the embeddings' gradient that undoes DDP's averaging: the number of processes
        for "mean", else 1."""
        if self.shard is None or self.grad_reduce == "sum":
            return 1
        return self.shard.ranks * self.shard.num_replicas


@dataclass(frozen=True)
class Pass:
    """Settings of a pass over the centres.

    columns: disjoint parts of this process's centres; the first one contains the targets.
    batch: layout of the gathered rows with ``classes.shard``, else None.
    """

    columns: Sequence[Columns]
    classes: Classes
    batch: Batch | None
    precision: str
    backend: str

    def options(self, column: Columns) -> dict:
        """Arguments of the operators of :mod:`fastmargin.ops` for one part."""
        return {
            "class_start": column.class_start,
            "precision": self.precision,
            "backend": self.backend,
            "index": column.index,
        }


def merge(parts: Sequence[RowStats], columns: Sequence[Columns]) -> RowStats:
    """Merges the statistics of disjoint parts of the centres; differentiable.

    The first part contains the targets and has no ``log_weight``.
    """
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([
        part.lse_neg if column.log_weight is None else part.lse_neg + column.log_weight
        for part, column in zip(parts, columns, strict=True)
    ])  # fmt: skip
    top = lse.detach().amax(0)
    top = torch.where(top == -torch.inf, 0, top)
    shares = (lse - top).exp()
    total = shares.sum(0)
    some = total > 0
    safe = torch.where(some, total, 1)
    pull = parts[0].pull
    if pull.shape[0]:
        pull = sum(
            (share / safe)[:, None] * part.pull for share, part in zip(shares, parts, strict=True)
        )
    return RowStats(
        torch.where(some, safe.log() + top, -torch.inf),
        parts[0].cos_y,
        torch.stack([part.max_neg for part in parts]).amax(0),
        pull,
        sum(part.mark for part in parts) if parts[0].mark is not None else None,
    )
