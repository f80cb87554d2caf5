"""The hinge loss on the nearest negatives, reduced."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin import backends
from fastmargin.ops.registration import op
from fastmargin.spec import HingeForm


@op(
    "hinge_loss",
    "(Tensor cos_y, Tensor nearest, Tensor labels, int num_classes, float scale, float delta,"
    " bool zero_slot, str reduction, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _hinge_loss(cos_y, nearest, labels, num_classes, scale, delta, zero_slot, reduction, backend):
    form = HingeForm(scale, delta, zero_slot)
    chosen = backends.select(backend, cos_y.device, cos_y.dtype, k=nearest.shape[1])
    rows = cos_y.contiguous(), nearest.contiguous(), labels.contiguous()
    return chosen.hinge_loss(*rows, num_classes, form, reduction)


@_hinge_loss.register_fake
def _(cos_y, nearest, labels, num_classes, scale, delta, zero_slot, reduction, backend):
    rows = cos_y.shape
    valid = torch.empty_like(labels, dtype=torch.bool)
    loss = cos_y.new_empty((0,) if reduction == "none" else ())
    slopes = cos_y.new_empty(rows), nearest.new_empty(nearest.shape)
    return loss, cos_y.new_empty(rows), valid, *slopes


def _hinge_loss_setup(ctx, inputs, output):
    loss, rows, *rest = output
    ctx.save_for_backward(*output[-2:])
    ctx.none = inputs[-2] == "none"
    ctx.mark_non_differentiable(loss if ctx.none else rows, *rest)
    ctx.set_materialize_grads(False)


@op("hinge_loss_backward", "(Tensor d_loss, Tensor by_cos, Tensor by_nearest) -> (Tensor, Tensor)")
def _hinge_loss_backward(d_loss, by_cos, by_nearest):
    return d_loss * by_cos, d_loss[..., None] * by_nearest


@_hinge_loss_backward.register_fake
def _(d_loss, by_cos, by_nearest):
    return by_cos.new_empty(by_cos.shape), by_nearest.new_empty(by_nearest.shape)


def _hinge_loss_autograd(ctx, d_loss, d_rows, *_):
    upstream = d_rows if ctx.none else d_loss
    if upstream is None:
        return (None,) * 9
    return *_hinge_loss_backward(upstream, *ctx.saved_tensors), *(None,) * 7


_hinge_loss.register_autograd(_hinge_loss_autograd, setup_context=_hinge_loss_setup)


def hinge_loss(
    cos_y: Tensor,
    nearest: Tensor,
    labels: Tensor,
    num_classes: int,
    form: HingeForm,
    reduction: str,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced loss, () or (B,) for "none"; the loss of each row (B,); valid rows (B,) bool.

    Differentiable in ``cos_y`` (B,) and ``nearest`` (B, k) from :func:`row_topk`, through the first
    result only. See :meth:`fastmargin.backends.interface.Backend.hinge_loss`.
    """
    about = num_classes, form.scale, form.delta, form.zero_slot, reduction, backend
    loss, rows, valid, _, _ = _hinge_loss(cos_y, nearest, labels, *about)
    return rows if reduction == "none" else loss, rows.detach(), valid
