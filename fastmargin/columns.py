"""The columns of the softmax: which centres take part in a step, and parts of them added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmargin.sampling import Sample
from fastmargin.spec import RowStats


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
        first = torch.where(positive, sample.index, -1)[: sample.column.shape[0]]
        rest = torch.where(positive, -1, sample.index)
        foreign = torch.full_like(labels, -1)
        return [
            Columns(labels, index=first),
            Columns(foreign, index=rest, log_weight=log_weight),
        ]


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
    )
