"""Backward passes that have no derivative of their own, and say so where one is asked for."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def first_order(backward):
    """For the ``backward`` of an autograd.Function: a gradient through its gradients is an error.

    torch's ``once_differentiable`` makes it one where the incoming gradient is part of a graph.
    That of a loss is not, it is 1, and a penalty on the gradients would be left out in silence.
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
