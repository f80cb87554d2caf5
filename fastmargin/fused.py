"""The loss of a softmax margin with a kernel form as one autograd function.

The same values as the separate operators (``functional.py``) with fewer launches: eight on the
Triton backend from embeddings to both gradients, including the one by which autograd starts the
backward; more where the centres are staged in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmargin import ops
from fastmargin.columns import Pass
from fastmargin.first_order import first_order
from fastmargin.spec import GradientFactors, MarginForm, NormEma, SoftmaxLoss


@dataclass(frozen=True)
class Step:
    """Arguments of the loss besides its tensors, as in ``interface.Backend.softmax_loss``."""

    task: Pass
    num_classes: int
    form: MarginForm
    ema: NormEma | None
    reduction: str
    want_pull: bool


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, step: Step):
        (column,) = step.task.columns
        made = ops.softmax_loss(
            x,
            weight,
            labels,
            column.labels,
            step.num_classes,
            step.form,
            step.ema,
            step.reduction,
            step.want_pull,
            **step.task.options(column),
        )
        ctx.step, ctx.x_dtype = step, x.dtype
        ctx.save_for_backward(weight, column.index, column.labels, *made.tensors())
        ctx.set_materialize_grads(False)
        figures = made.valid, made.cos_y, made.max_neg, made.norm, made.margin
        if step.reduction != "none":
            figures = made.rows, *figures
        ctx.mark_non_differentiable(made.x_hat, *figures)
        return made.rows if step.reduction == "none" else made.loss, made.x_hat, *figures

    @staticmethod
    @first_order
    def backward(ctx, d_loss, *_):
        if d_loss is None:
            return None, None, None, None
        weight, index, columns, *made = ctx.saved_tensors
        task, (want_x, want_weight, *_) = ctx.step.task, ctx.needs_input_grad
        made = SoftmaxLoss(*made)
        class_start, scale = task.columns[0].class_start, ctx.step.form.scale
        d_x, d_lse, d_cos, kept = ops.softmax_loss_backward(
            d_loss,
            made,
            weight,
            index,
            columns,
            class_start,
            scale,
            ctx.x_dtype,
            want_x,
            want_weight,
            task.classes.row_tolerance,
            task.precision,
            task.backend,
        )
        d_weight = None
        if want_weight:
            found = GradientFactors(
                d_lse=d_lse,
                d_cos=d_cos,
                x_hat=made.x_hat,
                labels=columns,
                lse_neg=made.lse_neg,
                scale=scale,
                index=index,
                class_start=class_start,
                precision=task.precision,
                backend=task.backend,
                skip_zero_rows=task.classes.row_tolerance > 0,
                sparse_grad=task.classes.sparse_grad,
                kept=kept,
            )
            d_weight = ops.gradient_or_factors(weight, found, ctx.next_functions[1][0])
        return d_x if want_x else None, d_weight, None, None


def softmax_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_classes: int,
    form: MarginForm,
    ema: NormEma | None,
    reduction: str,
    task: Pass,
) -> tuple[Tensor, ...]:
    """The reduced loss; then, without gradient, the unit embeddings (B, D) and the tensors of
    :class:`fastmargin.functional.LossRows`.

    Differentiable once, in ``x`` (B, D) and ``weight`` (C, D). ``ema`` is advanced in place. The
    other arguments are those of :meth:`fastmargin.backends.interface.Backend.softmax_loss`;
    ``task`` has one part.
    """
    want_pull = torch.is_grad_enabled() and x.requires_grad
    step = Step(task, num_classes, form, ema, reduction, want_pull)
    loss, x_hat, *figures = _SoftmaxLoss.apply(x, weight, labels, step)
    rows = (loss.detach(),) if reduction == "none" else ()
    return loss, x_hat, *rows, *figures
