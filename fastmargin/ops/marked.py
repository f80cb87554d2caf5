"""Passes each row's 1 - p_y back to the centre pass, which may skip confident rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin.ops.registration import op


@op("marked", "(Tensor loss, Tensor mark, Tensor miss) -> Tensor")
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
    """The losses (B,) unchanged; backward passes ``miss``, 1 - p_y (B,), to :func:`row_stats`.

    ``miss`` becomes the gradient of ``mark`` of :class:`fastmargin.spec.RowStats`, whatever the
    upstream gradient, which alone cannot distinguish a confident row from one with a small weight.
    """
    return _marked(loss, mark, miss)
