"""The operators: schema, fake and autograd of each, in ``torch.ops.fastmargin``.

This is the only file that registers operators for users. Records of :mod:`fastmargin.spec` are
taken apart here, since a schema holds only tensors and numbers, and put together again for the
backend. Shapes and meanings stand in :mod:`fastmargin.backends.interface`.

Every backward is an operator without a derivative of its own, so that a second-order gradient is
an error and not a wrong number.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from fastmargin import backends
from fastmargin.backends import row_gradients
from fastmargin.backends.interface import Backend
from fastmargin.norms import compute_dtype
from fastmargin.rows import inside
from fastmargin.spec import HardRule, MarginForm, NormEma, RowStats, SoftmaxLoss

__all__ = [
    "check_backend",
    "margin_rows",
    "marked",
    "permutation",
    "row_prologue",
    "row_prologue_backward",
    "row_stats",
    "row_stats_backward",
    "row_stats_backward_x",
    "row_topk",
    "row_topk_backward",
    "softmax_loss",
    "softmax_loss_backward",
    "spread_rows",
    "target_cosine",
]


def _op(name: str, schema: str, mutates: tuple[str, ...] = ()):
    """Registers the decorated function, and keeps autocast out of the products inside it."""

    def register(function):
        @functools.wraps(function)
        def without_autocast(first, *rest):
            with torch.autocast(first.device.type, enabled=False):
                return function(first, *rest)

        define = torch.library.custom_op(f"fastmargin::{name}", mutates_args=mutates, schema=schema)
        return define(without_autocast)

    return register


def _backend(requested: str, x: Tensor, precision: str = "auto", k: int = 1) -> Backend:
    return backends.select(requested, x.device, x.dtype, precision, x.shape[1], k)


def check_backend(x: Tensor, precision: str, backend: str, k: int = 1) -> None:
    """Raises :class:`fastmargin.backends.BackendError` where the operators would, for (B, D) x."""
    dtype = compute_dtype(x.dtype)
    backends.select(backend, x.device, dtype, precision, x.shape[1], k)


def _check_index(index: Tensor | None, weight: Tensor) -> None:
    """Raises TypeError or ValueError unless ``index`` is None or (K,) int64 beside ``weight``."""
    if index is None:
        return
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}: use index.long()")
    if index.dim() != 1:
        raise ValueError(f"index must have shape (K,), got {tuple(index.shape)}")
    if index.device != weight.device:
        raise ValueError(f"index is on {index.device}, weight on {weight.device}: move one of them")


@torch.no_grad()
def target_cosine(
    x_hat: Tensor,
    weight: Tensor,
    labels: Tensor,
    class_start: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """(B,) cosine with the own centre, 0 where it is not in the pass; no gradient.

    For the rules on negatives that need it before the pass over the centres. ``index`` as in
    :func:`row_stats`.
    """
    _check_index(index, weight)
    own, _ = row_gradients.own_rows(weight, row_gradients.row_numbers(labels - class_start, index))
    return (x_hat * own.to(x_hat.dtype)).sum(1)


# ---- gradients of rows --------------------------------------------------------------------------


@_op("spread_rows", "(Tensor rows, Tensor index, Tensor weight, bool distinct) -> Tensor")
def _spread_rows(rows, index, weight, distinct):
    count, width = weight.shape
    # one row more, which is cut off, takes what belongs nowhere
    spread = torch.zeros((count + 1, width), dtype=rows.dtype, device=rows.device)
    target = torch.where(inside(index, count), index, count)
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
        known = inside(index, count)
        # not simply row 0: an optimiser moves the rows that are listed, by momentum or decay
        some = torch.where(known, index, 0).amax()
        index = torch.where(
            known, index, torch.where(inside(~index, count) & (index < -1), ~index, some)
        )
    return torch.sparse_coo_tensor(
        index[None], rows.to(weight.dtype), weight.shape, check_invariants=False
    )


# ---- row_prologue -------------------------------------------------------------------------------


@_op(
    "row_prologue",
    "(Tensor x, Tensor? labels, Tensor? ema_mean, Tensor? ema_std, float[] ema_params, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _row_prologue(x, labels, ema_mean, ema_std, ema_params, backend):
    ema = None if ema_mean is None else NormEma(ema_mean, ema_std, *ema_params)
    outputs = _backend(backend, x).row_prologue(x, labels, ema)
    return outputs if ema else (*outputs[:2], outputs[0].new_empty(0), outputs[0].new_empty(0))


@_row_prologue.register_fake
def _(x, labels, ema_mean, ema_std, ema_params, backend):
    statistic = (0 if ema_mean is None else 1,)
    shapes = x.shape, x.shape[:1], statistic, statistic
    return tuple(x.new_empty(shape, dtype=compute_dtype(x.dtype)) for shape in shapes)


def _row_prologue_setup(ctx, inputs, output):
    ctx.x_dtype = inputs[0].dtype
    ctx.save_for_backward(output[0], output[1])
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)


@_op(
    "row_prologue_backward", "(Tensor d_x_hat, Tensor? d_norm, Tensor x_hat, Tensor norm) -> Tensor"
)
def row_prologue_backward(d_x_hat, d_norm, x_hat, norm):
    return row_gradients.through_norm(d_x_hat, d_norm, x_hat, norm)


@row_prologue_backward.register_fake
def _(d_x_hat, d_norm, x_hat, norm):
    return x_hat.new_empty(x_hat.shape)


def _row_prologue_autograd(ctx, d_x_hat, d_norm, _mean, _std):
    x_hat, norm = ctx.saved_tensors
    if d_x_hat is None:
        d_x_hat = torch.zeros_like(x_hat)
    d_x = row_prologue_backward(d_x_hat.contiguous(), d_norm, x_hat, norm)
    return d_x.to(ctx.x_dtype), None, None, None, None, None


_row_prologue.register_autograd(_row_prologue_autograd, setup_context=_row_prologue_setup)


def row_prologue(
    x: Tensor, labels: Tensor | None, ema: NormEma | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit rows (B, D), norms (B,), and the norm statistics (1,), (1,) after this batch.

    The statistics are empty, (0,), without ``ema``. A row with label < 0 may hold anything: it is
    a zero row of norm 0 without a gradient. With labels None, and no ``ema``, none is.

    Differentiable in ``x`` through the first two. A row of norm below 1e-12 gives a zero row and
    a zero gradient (``F.normalize`` would give 1e12 times the upstream one).
    """
    if ema is None:
        return _row_prologue(x, labels, None, None, [], backend)
    params = [ema.alpha, ema.low, ema.high]
    return _row_prologue(x, labels, ema.mean, ema.std, params, backend)


# ---- row_stats ----------------------------------------------------------------------------------

_STATS_ARGS = (
    "Tensor x_hat, Tensor weight, Tensor? index, Tensor labels, float scale,"
    " Tensor? hard_threshold, Tensor? hard_coefficients, float hard_bound, int class_start"
)


def _hard(threshold, coefficients, bound: float) -> HardRule | None:
    return None if threshold is None else HardRule(threshold, coefficients, bound)


@_op(
    "row_stats",
    f"({_STATS_ARGS}, bool want_pull, bool sparse_grad, float row_tolerance, str precision,"
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
    stats = _backend(backend, x_hat, precision).row_stats(
        x_hat,
        weight,
        index,
        labels,
        scale,
        _hard(hard_threshold, hard_coefficients, hard_bound),
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


@_op(
    "row_stats_backward",
    f"(Tensor d_lse, Tensor d_cos, Tensor? miss, {_STATS_ARGS}, Tensor lse_neg,"
    " float row_tolerance, str precision, str backend) -> Tensor",
)
def row_stats_backward(
    d_lse,
    d_cos,
    miss,
    x_hat,
    weight,
    index,
    labels,
    scale,
    hard_threshold,
    hard_coefficients,
    hard_bound,
    class_start,
    lse_neg,
    row_tolerance,
    precision,
    backend,
):
    d_lse, d_cos = row_gradients.without_confident(d_lse, d_cos, miss, row_tolerance)
    return _backend(backend, x_hat, precision).row_stats_backward(
        d_lse.contiguous(),
        d_cos.contiguous(),
        x_hat,
        weight,
        index,
        labels,
        lse_neg,
        scale,
        _hard(hard_threshold, hard_coefficients, hard_bound),
        class_start,
        precision,
        miss is not None and row_tolerance > 0,
    )


@row_stats_backward.register_fake
def _(d_lse, d_cos, miss, x_hat, weight, index, *_):
    rows = weight.shape[0] if index is None else index.shape[0]
    return torch.empty((rows, weight.shape[1]), dtype=weight.dtype, device=weight.device)


@_op(
    "row_stats_backward_x",
    "(Tensor d_lse, Tensor d_cos, Tensor pull, Tensor weight, Tensor? index, Tensor labels,"
    " float scale, int class_start) -> Tensor",
)
def row_stats_backward_x(d_lse, d_cos, pull, weight, index, labels, scale, class_start):
    return row_gradients.through_stats(
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
        d_x_hat = row_stats_backward_x(
            d_lse, d_cos, pull, weight, index, labels, scale, class_start
        )
    if ctx.needs_input_grad[1]:
        rows = row_stats_backward(
            d_lse,
            d_cos,
            miss,
            x_hat,
            weight,
            index,
            labels,
            scale,
            threshold,
            coefficients,
            bound,
            class_start,
            lse_neg,
            *settings,
        )
        d_weight = spread_rows(rows, index, weight, ctx.sparse_grad)
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
    """The heavy pass: log-sum-exp over the negatives, target and hardest negative cosine.

    Args:
        x_hat: (B, D) unit rows from :func:`row_prologue`, float32 or float64.
        weight: (C, D) raw centres, any strides, any float dtype.
        labels: (B,) int64 global class ids; -1 for a row without a class. With an index,
            ``labels - class_start`` counts its places.
        scale: s.
        hard: rule for hard negatives.
        class_start: global id of ``weight[0]``.
        precision: operand type of the products, one of ``spec.PRECISIONS``.
        backend: "auto" or a backend's name.
        index: (K,) int64 rows of ``weight`` that take part, distinct, in any order, -1 at an empty
            place; None for all rows.
        sparse_grad: give ``weight`` a sparse gradient (:func:`spread_rows`), so that nothing of
            size (C, D) is made; not under ``torch.compile``.
        want_pull: form ``pull``, which a gradient of ``x_hat`` needs; default: where it is wanted.
        row_tolerance: leave rows with 1 - p_y up to it out of the gradient of ``weight``; they are
            known where the loss went through :func:`marked`.

    Differentiable in ``x_hat`` and ``weight`` through ``lse_neg`` and ``cos_y``.

    Raises:
        TypeError, ValueError: index is not as above.
    """
    _check_index(index, weight)
    rule = (None, None, 1.0)
    if hard is not None:
        rule = hard.threshold, hard.coefficients, float(hard.bound)
    if want_pull is None:
        want_pull = torch.is_grad_enabled() and x_hat.requires_grad
    return RowStats(
        *_row_stats(
            x_hat,
            weight,
            index,
            labels,
            float(scale),
            *rule,
            class_start,
            want_pull,
            sparse_grad,
            float(row_tolerance),
            precision,
            backend,
        )
    )


@_op("marked", "(Tensor loss, Tensor mark, Tensor miss) -> Tensor")
def _marked(loss, mark, miss):
    return loss.clone()


@_marked.register_fake
def _(loss, mark, miss):
    return torch.empty_like(loss)


def _marked_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _marked_autograd(ctx, d_loss):
    (miss,) = ctx.saved_tensors
    return d_loss, miss, None


_marked.register_autograd(_marked_autograd, setup_context=_marked_setup)


def marked(loss: Tensor, mark: Tensor, miss: Tensor) -> Tensor:
    """The losses (B,), which on the way back tell :func:`row_stats` what 1 - p_y of each row was.

    ``miss`` (B,), whatever the upstream gradient, becomes the gradient of ``mark``, the last entry
    of :class:`fastmargin.spec.RowStats`. An upstream gradient alone cannot tell a confident row
    from one that weighs little.
    """
    return _marked(loss, mark, miss)


# ---- row_topk -----------------------------------------------------------------------------------


@_op(
    "row_topk",
    "(Tensor x_hat, Tensor weight, Tensor? index, Tensor labels, int k, int class_start,"
    " bool sparse_grad, str precision, str backend) -> (Tensor, Tensor, Tensor)",
)
def _row_topk(x_hat, weight, index, labels, k, class_start, sparse_grad, precision, backend):
    return _backend(backend, x_hat, precision, k).row_topk(
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
    x_hat, weight, index, labels, _, class_start, sparse_grad = inputs[:7]
    ctx.save_for_backward(x_hat, weight, index, labels, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.class_start, ctx.sparse_grad = class_start, sparse_grad


@_op(
    "row_topk_backward",
    "(Tensor d_top, Tensor d_cos, Tensor x_hat, Tensor weight, Tensor? index, Tensor labels,"
    " Tensor nearest, int class_start) -> (Tensor, Tensor, Tensor)",
)
def row_topk_backward(d_top, d_cos, x_hat, weight, index, labels, nearest, class_start):
    # the target is one more column; only B * (k + 1) centres take part
    columns = torch.cat([nearest, (labels - class_start)[:, None]], dim=1)
    touched = row_gradients.row_numbers(columns, index)
    centres, inv = (t.to(x_hat.dtype) for t in row_gradients.own_rows(weight, touched))
    known = inside(touched, weight.shape[0])
    upstream = torch.where(known, torch.cat([d_top, d_cos[:, None]], dim=1), 0)[..., None]
    d_x_hat = (upstream * centres).sum(1)
    rows = upstream * x_hat[:, None, :]
    rows = (rows - (rows * centres).sum(-1, keepdim=True) * centres) * inv
    return d_x_hat, rows.flatten(0, 1), torch.where(known, touched, -1).flatten()


@row_topk_backward.register_fake
def _(d_top, d_cos, x_hat, weight, index, labels, nearest, class_start):
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
        d_top, d_cos, x_hat, weight, index, labels, nearest, ctx.class_start
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
    """The k nearest negatives of every row: cosines (B, k), indices (B, k), ``cos_y`` (B,).

    Differentiable in ``x_hat`` and ``weight`` through both cosines; see
    :meth:`fastmargin.backends.interface.Backend.row_topk` for ties and short rows. ``index`` as in
    :func:`row_stats`; the indices returned then count its places. With ``sparse_grad`` the gradient
    of ``weight`` has B * (k + 1) entries (:func:`spread_rows`); not under ``torch.compile``.
    """
    _check_index(index, weight)
    return _row_topk(x_hat, weight, index, labels, k, class_start, sparse_grad, precision, backend)


# ---- margin_rows --------------------------------------------------------------------------------


@_op(
    "margin_rows",
    "(Tensor cos_y, Tensor lse_neg, Tensor norm, Tensor labels, float[] params, int[] codes,"
    " Tensor? mean, Tensor? std, Tensor? table, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _margin_rows(cos_y, lse_neg, norm, labels, params, codes, mean, std, table, backend):
    form = MarginForm.build(params, codes, mean, std, table)
    return backends.select(backend, cos_y.device, cos_y.dtype).margin_rows(
        cos_y.contiguous(), lse_neg.contiguous(), norm.contiguous(), labels, form
    )


@_margin_rows.register_fake
def _(cos_y, *_):
    return tuple(cos_y.new_empty(cos_y.shape) for _ in range(5))


def _margin_rows_setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:4])
    ctx.mark_non_differentiable(*output[1:])


@_op(
    "margin_rows_backward",
    "(Tensor d_loss, Tensor by_cos, Tensor by_lse, Tensor by_norm) -> (Tensor, Tensor, Tensor)",
)
def _margin_rows_backward(d_loss, by_cos, by_lse, by_norm):
    return d_loss * by_cos, d_loss * by_lse, d_loss * by_norm


@_margin_rows_backward.register_fake
def _(d_loss, by_cos, by_lse, by_norm):
    return tuple(part.new_empty(part.shape) for part in (by_cos, by_lse, by_norm))


def _margin_rows_autograd(ctx, d_loss, *_):
    return *_margin_rows_backward(d_loss, *ctx.saved_tensors), *(None,) * 7


_margin_rows.register_autograd(_margin_rows_autograd, setup_context=_margin_rows_setup)


def margin_rows(
    cos_y: Tensor,
    lse_neg: Tensor,
    norm: Tensor,
    labels: Tensor,
    form: MarginForm,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Loss of every row and the margin ``cos_y - psi`` (cosine units), each (B,).

    ``loss_i = -log sigmoid(s * psi_i - lse_neg_i)``; differentiable in the first three arguments.
    """
    loss, _, _, _, margin = _margin_rows(
        cos_y,
        lse_neg,
        norm,
        labels,
        form.params(),
        form.codes(),
        form.mean,
        form.std,
        form.table,
        backend,
    )
    return loss, margin


# ---- softmax_loss -------------------------------------------------------------------------------

_LOSS_PARTS = tuple(field.name for field in dataclasses.fields(SoftmaxLoss))


@_op(
    "softmax_loss",
    "(Tensor x, Tensor weight, Tensor? index, Tensor labels, Tensor columns, int class_start,"
    " int num_classes, float[] params, int[] codes, Tensor(a!)? mean, Tensor(b!)? std,"
    " Tensor? table, float[] ema_params, str reduction, bool want_pull, str precision, str backend)"
    f" -> ({', '.join(['Tensor'] * len(_LOSS_PARTS))})",
    mutates=("mean", "std"),
)
def _softmax_loss(
    x,
    weight,
    index,
    labels,
    columns,
    class_start,
    num_classes,
    params,
    codes,
    mean,
    std,
    table,
    ema_params,
    reduction,
    want_pull,
    precision,
    backend,
):
    form = MarginForm.build(params, codes, mean, std, table)
    ema = NormEma(mean, std, *ema_params) if ema_params else None
    return (
        _backend(backend, x, precision)
        .softmax_loss(
            x,
            weight,
            index,
            labels,
            columns,
            class_start,
            num_classes,
            form,
            ema,
            reduction,
            want_pull,
            precision,
        )
        .tensors()
    )


def softmax_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    columns: Tensor,
    num_classes: int,
    form: MarginForm,
    ema: NormEma | None,
    reduction: str,
    want_pull: bool,
    class_start: int = 0,
    precision: str = "auto",
    backend: str = "auto",
    index: Tensor | None = None,
) -> SoftmaxLoss:
    """All of a forward pass in one operator, without a derivative: :mod:`fastmargin.fused` has it.

    The arguments are those of :meth:`fastmargin.backends.interface.Backend.softmax_loss`. In eager
    mode it spares the launches between the operators above; compiled, they are fused anyway.
    """
    _check_index(index, weight)
    return SoftmaxLoss(
        *_softmax_loss(
            x,
            weight,
            index,
            labels,
            columns,
            class_start,
            num_classes,
            form.params(),
            form.codes(),
            form.mean,
            form.std,
            form.table,
            [] if ema is None else [ema.alpha, ema.low, ema.high],
            reduction,
            want_pull,
            precision,
            backend,
        )
    )


@_softmax_loss.register_fake
def _(x, weight, index, labels, *rest):
    reduction, want_pull = rest[-4:-2]
    dtype, (b, d) = compute_dtype(x.dtype), x.shape
    shapes = dict.fromkeys(_LOSS_PARTS, (b,)) | {
        "loss": (0,) if reduction == "none" else (),
        "share": (1,),
        "x_hat": (b, d),
        "operand": (0,),
        "pull": (b if want_pull else 0, d),
    }
    made = {name: x.new_empty(shape, dtype=dtype) for name, shape in shapes.items()}
    return tuple((made | {"valid": x.new_empty((b,), dtype=torch.bool)}).values())


@_op(
    "softmax_loss_backward",
    "(Tensor d_loss, Tensor[] made, Tensor weight, Tensor? index, Tensor columns, int class_start,"
    " float scale, ScalarType x_dtype, bool want_x, bool want_weight, float row_tolerance,"
    " str precision, str backend) -> (Tensor, Tensor)",
)
def _softmax_loss_backward(d_loss, made, weight, *rest):
    made = SoftmaxLoss(*made)
    *rest, precision, backend = rest
    chosen = _backend(backend, made.x_hat, precision)
    found = chosen.softmax_loss_backward(d_loss, made, weight, *rest, precision)
    return tuple(weight.new_empty(0) if part is None else part for part in found)


@_softmax_loss_backward.register_fake
def _(d_loss, made, weight, index, columns, start, scale, x_dtype, want_x, want_weight, *_):
    rows = weight.shape[0] if index is None else index.shape[0]
    of_weight = (rows, weight.shape[1]) if want_weight else (0,)
    d_x = weight.new_empty(0)
    if want_x:
        d_x = weight.new_empty((columns.shape[0], weight.shape[1]), dtype=x_dtype)
    return d_x, weight.new_empty(of_weight)


def softmax_loss_backward(
    d_loss: Tensor,
    made: SoftmaxLoss,
    weight: Tensor,
    index: Tensor | None,
    columns: Tensor,
    class_start: int,
    scale: float,
    x_dtype: torch.dtype,
    want_x: bool,
    want_weight: bool,
    row_tolerance: float,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """See :meth:`fastmargin.backends.interface.Backend.softmax_loss_backward`; (0,) for None."""
    return _softmax_loss_backward(
        d_loss,
        made.tensors(),
        weight,
        index,
        columns,
        class_start,
        scale,
        x_dtype,
        want_x,
        want_weight,
        row_tolerance,
        precision,
        backend,
    )


# ---- permutation --------------------------------------------------------------------------------

MAX_PERMUTATION = 2**60


@_op("permutation", "(Tensor key, int size, int count, str backend) -> Tensor")
def _permutation(key, size, count, backend):
    chosen = backends.select(backend, key.device, torch.float32)
    return chosen.permutation(key, size, count)


@_permutation.register_fake
def _(key, size, count, backend):
    return key.new_empty((count,))


def permutation(key: Tensor, size: int, count: int, backend: str = "auto") -> Tensor:
    """The first ``count`` numbers of a pseudo-random permutation of range(size), (count,) int64.

    Distinct, the same on every backend, and in O(count) whatever the size. No host
    synchronisation, but for the reference backend on a GPU.

    Args:
        key: (2,) int64; chooses the permutation.
        size: up to 2**60.
        count: at most ``size``.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: a size or the key out of range.
    """
    if key.dtype != torch.int64 or key.shape != (2,):
        raise ValueError(
            f"key must be (2,) int64, got {tuple(key.shape)} {key.dtype}: use torch.tensor([a, b])"
        )
    if not 0 <= size <= MAX_PERMUTATION:
        raise ValueError(f"size must be in [0, 2**60], got {size}")
    if not 0 <= count <= size:
        raise ValueError(f"count must be in [0, size={size}], got {count}: there are no more")
    return _permutation(key, size, count, backend)
