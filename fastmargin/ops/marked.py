"""Losses that tell the pass behind them which rows are confident."""

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
    """The losses (B,), which on the way back tell :func:`row_stats` what 1 - p_y of each row was.

    ``miss`` (B,), whatever the upstream gradient, becomes the gradient of ``mark``, the last entry
    of :class:`fastmargin.spec.RowStats`. An upstream gradient alone cannot tell a confident row
    from one that weighs little.
    """
    return _marked(loss, mark, miss)
