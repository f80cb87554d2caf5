"""What a pass over the centres is about: which of them take part, and where the others are."""

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

    index: (K,) rows of the weight, -1 in an empty place; None for all of them. labels: (B,) where
    the own centre of each row is, counted from ``class_start``: among the rows of the weight, or
    in ``index``. log_weight: scalar added to the logits of these centres, or None.
    """

    labels: Tensor
    class_start: int = 0
    index: Tensor | None = None
    log_weight: Tensor | None = None

    @staticmethod
    def of(sample: Sample, rows: slice, log_weight: Tensor | None) -> list[Columns]:
        """The sampled centres; with ``log_weight``, of the negatives, they are two parts.

        ``rows`` are those of the labels it was drawn for that the pass is about. Positives are
        always there and keep the weight 1.
        """
        labels = sample.column[rows]
        if log_weight is None:
            return [Columns(labels, index=sample.index)]
        place = torch.arange(sample.index.shape[0], device=sample.index.device)
        positive = place < sample.num_positives
        # no more positives than rows: a short pass, though which places they take is not known here
        # an empty place names a row that takes part, as its complement: see ops.spread_rows
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

    shard: a :class:`fastmargin.distributed.shard.ClassShard`, where the weight is this process's
    part of the classes. sampler: draws those that take part. The others are as in
    :class:`fastmargin.MarginHead`.
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
        """What makes a mean over the processes the sum that is the gradient."""
        if self.shard is None or self.grad_reduce == "sum":
            return 1
        return self.shard.ranks * self.shard.num_replicas


@dataclass(frozen=True)
class Pass:
    """A pass over the centres, besides its tensors.

    columns: disjoint parts of the centres that are here; targets are among the first part's.
    batch: where the rows come from, with ``classes.shard``; else None.
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
    """The statistics of disjoint parts of the centres as one; differentiable.

    Targets are in the first part, whose ``log_weight`` is None.
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
