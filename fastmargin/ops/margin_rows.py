"""Margin and loss of each row."""

from __future__ import annotations

from torch import Tensor

from fastmargin import backends
from fastmargin.ops.registration import check_table, op
from fastmargin.spec import MarginForm


@op(
    "margin_rows",
    "(Tensor cos_y, Tensor lse_neg, Tensor norm, Tensor labels, float[] params, int[] codes,"
    " Tensor? mean, Tensor? std, Tensor? table, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _margin_rows(cos_y, lse_neg, norm, labels, params, codes, mean, std, table, backend):
    table = None if table is None else table.contiguous()
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
    ctx.set_materialize_grads(False)


@op(
    "margin_rows_backward",
    "(Tensor d_loss, Tensor by_cos, Tensor by_lse, Tensor by_norm) -> (Tensor, Tensor, Tensor)",
)
def _margin_rows_backward(d_loss, by_cos, by_lse, by_norm):
    return d_loss * by_cos, d_loss * by_lse, d_loss * by_norm


@_margin_rows_backward.register_fake
def _(d_loss, by_cos, by_lse, by_norm):
    return tuple(part.new_empty(part.shape) for part in (by_cos, by_lse, by_norm))


def _margin_rows_autograd(ctx, d_loss, *_):
    if d_loss is None:
        return (None,) * 10
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
    """Loss of each row and the margin ``cos_y - psi`` (cosine units), each (B,).

    ``loss_i = -log sigmoid(s * psi_i - lse_neg_i)``, differentiable in the first three arguments.

    Raises:
        ValueError: a form with source "row" has no table, or one of another length.
    """
    check_table(form, labels)
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
