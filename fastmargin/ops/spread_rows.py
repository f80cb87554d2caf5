"""Scatters the gradients of some centres into the gradient of all."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin.ops.registration import op


@op("spread_rows", "(Tensor rows, Tensor index, Tensor weight, bool distinct) -> Tensor")
def _spread_rows(rows, index, weight, distinct):
    count, width = weight.shape
    # one extra row, cut off at the end, takes the padding slots
    spread = torch.zeros((count + 1, width), dtype=rows.dtype, device=rows.device)
    target = index.clamp(-1, count) % (count + 1)
    if distinct:
        spread.index_copy_(0, target, rows)
    else:
        # index_put_ sorts the indices on a GPU, so sums are deterministic
        spread.index_put_((target,), rows, accumulate=True)
    return spread[:count].to(weight.dtype)


@_spread_rows.register_fake
def _(rows, index, weight, distinct):
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def spread_rows(
    rows: Tensor,
    index: Tensor | None,
    weight: Tensor,
    sparse_grad: bool = False,
    distinct: bool = True,
) -> Tensor:
    """Gradient of ``weight`` from the gradients of some of its rows.

    Args:
        rows: (K, D), zero in padding slots; (C, D) without an index.
        index: (K,) int64 rows of ``weight``; entries outside ``[0, C)`` are padding slots.
        weight: (C, D).
        sparse_grad: False for a dense (C, D). True for an uncoalesced sparse COO tensor of that
            size with one sparse dimension and K entries, as from ``nn.Embedding(sparse=True)``;
            the zeros of padding slots are assigned to some row that takes part. If ``index``
            contains none, a padding slot holds the complement ``~row`` of one.
        distinct: whether ``index`` has no duplicates. If not, a dense result sums them in a fixed
            order.
    """
    if not sparse_grad:
        if index is None:
            return rows.to(weight.dtype)
        return _spread_rows(rows, index, weight, distinct)
    count = weight.shape[0]
    if index is None:
        index = torch.arange(count, device=weight.device)
    elif count == 0 or index.shape[0] == 0:
        index, rows = index[:0], rows[:0]
    else:
        row = index ^ (index >> 63)  # the complement if negative
        known = (row < count) & (index != -1)
        # not simply row 0: an optimiser applies momentum and decay to the listed rows
        index = torch.where(known, row, torch.where(known, row, 0).amax())
    return torch.sparse_coo_tensor(
        index[None], rows.to(weight.dtype), weight.shape, check_invariants=False
    )
