"""Calls the compiled per-row operators with outputs allocated here."""

from __future__ import annotations

from torch import Tensor

from fastmargin.norms import compute_dtype
from fastmargin.spec import MarginForm, NormEma


def row_prologue(op, x: Tensor, labels: Tensor | None, ema: NormEma | None, *extra):
    """``op``: ``cpu_row_prologue`` or ``cuda_row_prologue``; ``extra``: its further arguments."""
    dtype = compute_dtype(x.dtype)
    x_hat = x.new_empty(x.shape, dtype=dtype)
    norm = x.new_empty(x.shape[:1], dtype=dtype)
    mean, std = x.new_empty(1, dtype=dtype), x.new_empty(1, dtype=dtype)
    state = (None, None, [])
    if ema is not None:
        state = ema.mean.to(dtype), ema.std.to(dtype), [ema.alpha, ema.low, ema.high]
    labels = None if labels is None else labels.contiguous()
    op(x, labels, *state, x_hat, norm, mean, std, *extra)
    return x_hat, norm, mean, std


def margin_rows(
    op, cos_y: Tensor, lse_neg: Tensor, norm: Tensor, labels: Tensor, form: MarginForm, *extra
):
    """``op``: ``cpu_margin_rows`` or ``cuda_margin_rows``; ``extra``: its further arguments."""
    outputs = [cos_y.new_empty(cos_y.shape) for _ in range(5)]
    state = (None if t is None else t.to(cos_y.dtype) for t in (form.mean, form.std, form.table))
    inputs = cos_y, lse_neg, norm, labels.contiguous(), form.params(), form.codes()
    op(*inputs, *state, *outputs, *extra)
    return tuple(outputs)
