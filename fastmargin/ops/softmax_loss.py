"""Forward and backward of the softmax loss as one operator each, for fewer launches."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastmargin.norms import compute_dtype
from fastmargin.ops.registration import backend_for, check_index, check_table, op
from fastmargin.spec import MarginForm, NormEma, SoftmaxLoss

_BACKWARD_PARTS = 6
_LOSS_PARTS = tuple(field.name for field in dataclasses.fields(SoftmaxLoss))


@op(
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
    table = None if table is None else table.contiguous()
    form = MarginForm.build(params, codes, mean, std, table)
    ema = NormEma(mean, std, *ema_params) if ema_params else None
    return (
        backend_for(backend, x, precision)
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
    """The forward pass as one operator; :mod:`fastmargin.fused` defines its gradient.

    The arguments are those of :meth:`fastmargin.backends.interface.Backend.softmax_loss`. Saves
    launches compared with the separate operators in eager mode; torch.compile fuses those anyway.

    Raises:
        TypeError, ValueError: ``index`` or the table of ``form`` does not fit.
    """
    check_index(index, weight)
    check_table(form, labels)
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
        "pull": (b if want_pull else 0, d),
        **dict.fromkeys(("operand", "centres", "inverse"), (0,)),
    }
    made = {name: x.new_empty(shape, dtype=dtype) for name, shape in shapes.items()}
    return tuple((made | {"valid": x.new_empty((b,), dtype=torch.bool)}).values())


@op(
    "softmax_loss_backward",
    "(Tensor d_loss, Tensor[] made, Tensor weight, Tensor? index, Tensor columns, int class_start,"
    " float scale, ScalarType x_dtype, bool want_x, bool want_weight, float row_tolerance,"
    " str precision, str backend)"
    f" -> ({', '.join(['Tensor'] * _BACKWARD_PARTS)})",
)
def _softmax_loss_backward(d_loss, made, weight, *rest):
    made = SoftmaxLoss(*made)
    *rest, precision, backend = rest
    chosen = backend_for(backend, made.x_hat, precision)
    *found, kept = chosen.softmax_loss_backward(d_loss, made, weight, *rest)
    found += kept or [None] * (_BACKWARD_PARTS - 3)
    return tuple(weight.new_empty(0) if part is None else part for part in found)


@_softmax_loss_backward.register_fake
def _(d_loss, made, weight, index, columns, start, scale, x_dtype, want_x, want_weight, *_):
    d_x, *rows = (weight.new_empty(0) for _ in range(_BACKWARD_PARTS))
    if want_x:
        d_x = weight.new_empty((columns.shape[0], weight.shape[1]), dtype=x_dtype)
    if want_weight:
        rows[:2] = (made[0].new_empty(columns.shape) for _ in range(2))
    return d_x, *rows


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
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """See :meth:`fastmargin.backends.interface.Backend.softmax_loss_backward`; (0,) for None.

    The last result is all that the centre pass may reuse, including what the forward pass kept.
    """
    d_x, d_lse, d_cos, *kept = _softmax_loss_backward(
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
    return d_x, d_lse, d_cos, (*made.kept, *kept) if kept[0].numel() else ()
