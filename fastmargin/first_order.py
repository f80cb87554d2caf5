"""Backward passes that raise when differentiated again."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def first_order(backward):
    """Decorates the ``backward`` of an autograd.Function: differentiating its result raises.

    torch's ``once_differentiable`` raises only if the incoming gradient requires grad. That of a
    loss is a constant 1, so a gradient penalty would silently be ignored.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx, *grads):
        if torch.is_grad_enabled():  # create_graph=True
            grads = [
                each.detach().requires_grad_() if isinstance(each, Tensor) else each
                for each in grads
            ]
        return once(ctx, *grads)

    return run
