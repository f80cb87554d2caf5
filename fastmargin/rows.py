"""Rows of a tensor by an index that may have padding slots."""

from __future__ import annotations

import torch
from torch import Tensor


def inside(index: Tensor, count: int) -> Tensor:
    """Which entries of ``index`` are in ``[0, count)``; the others are padding slots."""
    return (index >= 0) & (index < count)


def take(values: Tensor, index: Tensor, fill: float) -> Tensor:
    """``values[index]`` with ``fill`` in the padding slots.

    values: (N, ...). index: int64 of any shape. The result has ``index.shape + values.shape[1:]``.
    """
    if values.shape[0] == 0:
        return values.new_full((*index.shape, *values.shape[1:]), fill)
    known = inside(index, values.shape[0])
    taken = values[torch.where(known, index, 0)]
    return torch.where(known.reshape(*index.shape, *[1] * (values.dim() - 1)), taken, fill)


def stand_ins(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For writing to the rows ``index`` (K,), K >= 1, without synchronising on a mask.

    Returns ``place`` (K,), the slot itself, or for a padding slot one that holds a row, so that
    the same values are written twice; and a bool scalar: whether any slot holds a row.
    """
    known = inside(index, count)
    place = torch.arange(index.shape[0], device=index.device)
    return torch.where(known, place, known.int().argmax()), known.any()
