"""The gradient of all centres from the gradients of some of their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin.ops.registration import op


@op("spread_rows", "(Tensor rows, Tensor index, Tensor weight, bool distinct) -> Tensor")
def _spread_rows(rows, index, weight, distinct):
    count, width = weight.shape
    # one row more, which is cut off, takes what belongs nowhere
    spread = torch.zeros((count + 1, width), dtype=rows.dtype, device=rows.device)
    target = index.clamp(-1, count) % (count + 1)
    if distinct:
        spread.index_copy_(0, target, rows)
    else:
        # index_put_ sorts the indices on a GPU, so the order of the sum is fixed
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
        rows: (K, D), zero at empty places; (C, D) without an index.
        index: (K,) int64 rows of ``weight``, an empty place wherever it is outside ``[0, C)``.
        weight: (C, D).
        sparse_grad: False for a dense (C, D). True for a sparse COO tensor of that size, not
            coalesced, with one sparse dimension and K entries, as ``nn.Embedding(sparse=True)``
            has it; the zeros of an empty place then belong to some row that takes part. Where none
            in ``index`` does, an empty place names one as its complement, ``~row``.
        distinct: whether no row is in ``index`` twice. Otherwise a dense result adds up its parts
            in a fixed order.
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
        row = index ^ (index >> 63)  # the complement of what is negative
        known = (row < count) & (index != -1)
        # not simply row 0: an optimiser moves the rows that are listed, by momentum or decay
        index = torch.where(known, row, torch.where(known, row, 0).amax())
    return torch.sparse_coo_tensor(
        index[None], rows.to(weight.dtype), weight.shape, check_invariants=False
    )
