"""Rows of a tensor by an index that may have empty places."""

from __future__ import annotations

import torch
from torch import Tensor


def inside(index: Tensor, count: int) -> Tensor:
    """Which entries of ``index`` are one of ``count`` rows; the others are empty places."""
    return (index >= 0) & (index < count)


def take(values: Tensor, index: Tensor, fill: float) -> Tensor:
    """``values[index]`` with ``fill`` at the empty places.

    values: (N, ...). index: int64 of any shape. The result has ``index.shape + values.shape[1:]``.
    """
    if values.shape[0] == 0:
        return values.new_full((*index.shape, *values.shape[1:]), fill)
    known = inside(index, values.shape[0])
    taken = values[torch.where(known, index, 0)]
    return torch.where(known.reshape(*index.shape, *[1] * (values.dim() - 1)), taken, fill)


def stand_ins(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For writing to rows at the places of ``index`` (K,), K >= 1, without waiting for a mask.

    Returns ``place`` (K,), for an empty place another one whose row takes part, so that what is
    taken from there can be written twice; and whether any row takes part, a bool scalar.
    """
    known = inside(index, count)
    place = torch.arange(index.shape[0], device=index.device)
    return torch.where(known, place, known.int().argmax()), known.any()
