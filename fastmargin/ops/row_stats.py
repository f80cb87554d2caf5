"""The forward pass over all centres, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin.backends import row_gradients
from fastmargin.ops.centre_gradient import gradient_or_factors
from fastmargin.ops.registration import STATS_ARGS, backend_for, check_index, op
from fastmargin.spec import GradientFactors, HardRule, RowStats


@torch.no_grad()
def target_cosine(
    x_hat: Tensor,
    weight: Tensor,
    labels: Tensor,
    class_start: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """(B,) cosine with the own centre, 0 if it is not in the pass; without gradient.

    For hard-negative rules, which need it before the pass. ``index`` as in :func:`row_stats`.
    """
    check_index(index, weight)
    own, _ = row_gradients.own_rows(weight, row_gradients.row_numbers(labels - class_start, index))
    return (x_hat * own.to(x_hat.dtype)).sum(1)


@op(
    "row_stats",
    f"({STATS_ARGS}, bool want_pull, bool sparse_grad, float row_tolerance, str precision,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _row_stats(
    x_hat,
    weight,
    index,
    labels,
    scale,
    hard_threshold,
    hard_coefficients,
    hard_bound,
    class_start,
    want_pull,
    sparse_grad,
    row_tolerance,
    precision,
    backend,
):
    stats = backend_for(backend, x_hat, precision).row_stats(
        x_hat,
        weight,
        index,
        labels,
        scale,
        HardRule.build(hard_threshold, hard_coefficients, hard_bound),
        class_start,
        want_pull,
        precision,
    )
    mark = x_hat.new_zeros(x_hat.shape[0] if row_tolerance > 0 else 0)
    return stats.lse_neg, stats.cos_y, stats.max_neg, stats.pull, mark


@_row_stats.register_fake
def _(x_hat, weight, index, labels, scale, threshold, coefficients, bound, start, want_pull, *rest):
    rows = x_hat.shape[:1]
    pull = x_hat.new_empty(x_hat.shape if want_pull else (0, x_hat.shape[1]))
    mark = x_hat.new_empty(rows if rest[1] > 0 else (0,))
    return x_hat.new_empty(rows), x_hat.new_empty(rows), x_hat.new_empty(rows), pull, mark


@op(
    "row_stats_backward_x",
    "(Tensor d_lse, Tensor d_cos, Tensor pull, Tensor weight, Tensor? index, Tensor labels,"
    " float scale, int class_start, str backend) -> Tensor",
)
def row_stats_backward_x(d_lse, d_cos, pull, weight, index, labels, scale, class_start, backend):
    return backend_for(backend, pull).row_stats_backward_x(
        d_lse, d_cos, pull, weight, index, labels, scale, class_start
    )


@row_stats_backward_x.register_fake
def _(d_lse, d_cos, pull, *_):
    return pull.new_empty(pull.shape)


def _row_stats_setup(ctx, inputs, output):
    x_hat, weight, index, labels, scale, threshold, coefficients, bound, class_start = inputs[:9]
    lse_neg, _, max_neg, pull, _ = output
    ctx.save_for_backward(x_hat, weight, index, labels, threshold, coefficients, lse_neg, pull)
    ctx.mark_non_differentiable(max_neg, pull)
    ctx.set_materialize_grads(False)
    ctx.has_pull, ctx.sparse_grad, *rest = inputs[9:]
    ctx.rest = scale, bound, class_start, *rest


def _row_stats_autograd(ctx, d_lse, d_cos, _max_neg, _pull, miss):
    x_hat, weight, index, labels, threshold, coefficients, lse_neg, pull = ctx.saved_tensors
    scale, bound, class_start, *settings = ctx.rest
    rest = (None,) * 12
    if d_lse is None and d_cos is None:
        return None, None, *rest
    zero = torch.zeros_like(lse_neg)
    d_lse = zero if d_lse is None else d_lse
    d_cos = zero if d_cos is None else d_cos
    d_x_hat = d_weight = None
    if ctx.needs_input_grad[0]:
        if not ctx.has_pull:
            raise RuntimeError("row_stats: a gradient of x_hat needs want_pull=True in the forward")
        about = scale, class_start, settings[-1]
        d_x_hat = row_stats_backward_x(d_lse, d_cos, pull, weight, index, labels, *about)
    if ctx.needs_input_grad[1]:
        row_tolerance, precision, backend = settings
        d_lse, d_cos = row_gradients.without_confident(d_lse, d_cos, miss, row_tolerance)
        part = GradientFactors(
            d_lse=d_lse,
            d_cos=d_cos,
            x_hat=x_hat,
            labels=labels,
            lse_neg=lse_neg,
            scale=scale,
            index=index,
            class_start=class_start,
            hard=HardRule.build(threshold, coefficients, bound),
            precision=precision,
            backend=backend,
            skip_zero_rows=miss is not None and row_tolerance > 0,
            sparse_grad=ctx.sparse_grad,
        )
        d_weight = gradient_or_factors(weight, part, ctx.next_functions[1][0])
    return d_x_hat, d_weight, *rest


_row_stats.register_autograd(_row_stats_autograd, setup_context=_row_stats_setup)


def row_stats(
    x_hat: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float,
    hard: HardRule | None = None,
    class_start: int = 0,
    precision: str = "auto",
    backend: str = "auto",
    index: Tensor | None = None,
    sparse_grad: bool = False,
    want_pull: bool | None = None,
    row_tolerance: float = 0.0,
) -> RowStats:
    """Log-sum-exp over the negatives, target cosine and largest negative cosine of each row.

    Args:
        x_hat: (B, D) unit rows from :func:`row_prologue`, float32 or float64.
        weight: (C, D) raw centres, any strides, any float dtype.
        labels: (B,) int64 global class ids; -1 for a row without a class. With an index,
            ``labels - class_start`` are positions in it.
        scale: s.
        hard: rule for hard negatives.
        class_start: global id of ``weight[0]``.
        precision: operand type of the products, one of ``spec.PRECISIONS``.
        backend: "auto" or a backend's name.
        index: (K,) int64 rows of ``weight`` that take part, distinct, in any order, -1 in a padding
            slot; None for all rows.
        sparse_grad: give ``weight`` a sparse gradient (:func:`spread_rows`), without allocating
            (C, D); not under ``torch.compile``.
        want_pull: compute ``pull``, needed for a gradient of ``x_hat``; default: if ``x_hat``
            requires one.
        row_tolerance: leave rows with 1 - p_y up to it out of the gradient of ``weight``; needs a
            loss passed through :func:`marked`.

    Differentiable in ``x_hat`` and ``weight`` through ``lse_neg`` and ``cos_y``.

    Raises:
        TypeError, ValueError: index is not as above.
    """
    check_index(index, weight)
    if want_pull is None:
        want_pull = torch.is_grad_enabled() and x_hat.requires_grad
    return RowStats(
        *_row_stats(
            x_hat,
            weight,
            index,
            labels,
            float(scale),
            *HardRule.split(hard),
            class_start,
            want_pull,
            sparse_grad,
            float(row_tolerance),
            precision,
            backend,
        )
    )
