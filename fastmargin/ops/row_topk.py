"""The nearest negatives of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin.ops.registration import backend_for, check_index, op
from fastmargin.ops.spread_rows import spread_rows


@op(
    "row_topk",
    "(Tensor x_hat, Tensor weight, Tensor? index, Tensor labels, int k, int class_start,"
    " bool sparse_grad, str precision, str backend) -> (Tensor, Tensor, Tensor)",
)
def _row_topk(x_hat, weight, index, labels, k, class_start, sparse_grad, precision, backend):
    return backend_for(backend, x_hat, precision, k).row_topk(
        x_hat, weight, index, labels, k, class_start, precision
    )


@_row_topk.register_fake
def _(x_hat, weight, index, labels, k, *_):
    shape = (x_hat.shape[0], k)
    return (
        x_hat.new_empty(shape),
        x_hat.new_empty(shape, dtype=torch.int64),
        x_hat.new_empty(shape[:1]),
    )


def _row_topk_setup(ctx, inputs, output):
    x_hat, weight, index, labels, _, class_start, sparse_grad, _, backend = inputs
    ctx.save_for_backward(x_hat, weight, index, labels, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.class_start, ctx.sparse_grad, ctx.backend = class_start, sparse_grad, backend


@op(
    "row_topk_backward",
    "(Tensor d_top, Tensor d_cos, Tensor x_hat, Tensor weight, Tensor? index, Tensor labels,"
    " Tensor nearest, int class_start, str backend) -> (Tensor, Tensor, Tensor)",
)
def row_topk_backward(d_top, d_cos, x_hat, weight, index, labels, nearest, class_start, backend):
    chosen = backend_for(backend, x_hat, k=nearest.shape[1])
    return chosen.row_topk_backward(
        d_top, d_cos, x_hat, weight, index, labels, nearest, class_start
    )


@row_topk_backward.register_fake
def _(d_top, d_cos, x_hat, weight, index, labels, nearest, *_):
    count = nearest.shape[0] * (nearest.shape[1] + 1)
    rows = x_hat.new_empty((count, x_hat.shape[1]))
    return x_hat.new_empty(x_hat.shape), rows, nearest.new_empty(count)


def _row_topk_autograd(ctx, d_top, _nearest, d_cos):
    x_hat, weight, index, labels, nearest = ctx.saved_tensors
    rest = (None,) * 7
    if d_top is None and d_cos is None:
        return None, None, *rest
    d_top = x_hat.new_zeros(nearest.shape) if d_top is None else d_top
    d_cos = x_hat.new_zeros(labels.shape) if d_cos is None else d_cos
    d_x_hat, rows, touched = row_topk_backward(
        d_top, d_cos, x_hat, weight, index, labels, nearest, ctx.class_start, ctx.backend
    )
    d_weight = None
    if ctx.needs_input_grad[1]:
        d_weight = spread_rows(rows, touched, weight, ctx.sparse_grad, distinct=False)
    return d_x_hat if ctx.needs_input_grad[0] else None, d_weight, *rest


_row_topk.register_autograd(_row_topk_autograd, setup_context=_row_topk_setup)


def row_topk(
    x_hat: Tensor,
    weight: Tensor,
    labels: Tensor,
    k: int,
    class_start: int = 0,
    precision: str = "auto",
    backend: str = "auto",
    index: Tensor | None = None,
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest negatives of each row: cosines (B, k), indices (B, k), ``cos_y`` (B,).

    Differentiable in ``x_hat`` and ``weight`` through both cosines. Ties and rows with fewer
    negatives: see :meth:`fastmargin.backends.interface.Backend.row_topk`. ``index`` as in
    :func:`row_stats`; the returned indices are then positions in it. With ``sparse_grad`` the
    gradient of ``weight`` has B * (k + 1) entries (:func:`spread_rows`); not under
    ``torch.compile``.

    Raises:
        TypeError, ValueError: index is not (K,) int64 on the device of ``weight``.
    """
    check_index(index, weight)
    return _row_topk(x_hat, weight, index, labels, k, class_start, sparse_grad, precision, backend)
