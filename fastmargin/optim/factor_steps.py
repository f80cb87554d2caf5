"""Preparing steps from the factors of gradients (:mod:`fastmargin.factors`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastmargin import factors, ops
from fastmargin.spec import GradientFactors


def merged(found: Sequence[GradientFactors]) -> GradientFactors | None:
    """Several passes over all centres as one, if they differ only in their rows; else None."""
    first, *others = found
    if not others:
        return first
    for one in found:
        if one.index is not None or one.hard is not None or _kind(one) != _kind(first):
            return None
    names = ("d_lse", "d_cos", "x_hat", "labels", "lse_neg")
    rows = {name: torch.cat([getattr(one, name) for one in found]) for name in names}
    skip = any(one.skip_zero_rows for one in found)
    return replace(first, skip_zero_rows=skip, kept=(), **rows)


def _kind(one: GradientFactors) -> tuple:
    """What passes must have in common to be merged."""
    return one.class_start, one.scale, one.precision, one.backend, one.x_hat.dtype


def formed(parameter: Tensor, found: Sequence[GradientFactors], grad: Tensor | None) -> Tensor:
    """The gradient from factors and ``grad``, added up as backward passes would have."""
    for one in found:
        part = ops.centre_gradient(parameter.detach(), one)
        if grad is None:
            grad = part
        else:
            # torch adds a sparse tensor to a dense one only
            grad = part + grad if grad.is_sparse and not part.is_sparse else grad + part
    return grad


def unscale(optimizer: Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Unscales gradients and factors before a step; returns whether to take the step.

    A GradScaler leaves its scale in ``optimizer.grad_scale``, None after ``unscale_``, and in
    ``optimizer.found_inf`` the number of non-finite values. Like the scaler itself, this waits for
    that number. Without a scaler there is neither. If no step is to be taken, the factors are
    dropped.

    Raises:
        RuntimeError: a parameter was written to since its factors were stored, they were stored for
            another optimiser, or they cannot be divided by the scale.
    """
    found_inf, scale = (getattr(optimizer, name, None) for name in ("found_inf", "grad_scale"))
    waiting = [parameter for parameter in parameters if factors.pending(parameter)]
    problem = None
    if waiting and not optimizer.fused:
        problem = (
            "another optimiser, made with fused=True, has a parameter of this one, so that its "
            "gradient is not formed: drop that optimiser, or make it with fused=False"
        )
    elif any(map(factors.changed, waiting)):
        problem = (
            "a parameter was written to between backward() and step(), and with fused=True its "
            "gradient is formed in step(): write to it after the step, or call zero_grad() first"
        )
    elif waiting and found_inf is not None and scale is None:
        problem = (
            "scaler.unscale_() divides gradients, and with fused=True there is none before the "
            "step: leave unscale_ out, scaler.step() does without, or use fused=False"
        )
    if problem is not None:
        # the scaler removes these only after a step, and they would affect the next one
        for name in ("found_inf", "grad_scale"):
            optimizer.__dict__.pop(name, None)
        raise RuntimeError(problem)
    if found_inf is None:
        return True
    if found_inf or any(map(_not_finite, waiting)):
        for parameter in waiting:
            factors.clear(parameter)
        return False
    if scale is not None:
        inverse = scale.double().reciprocal().float()
        for grad in (parameter.grad for parameter in parameters if parameter.grad is not None):
            (grad._values() if grad.is_sparse else grad).mul_(inverse.to(grad.device))
        for parameter in waiting:
            by = inverse.to(parameter.device)
            for one in factors.take(parameter):
                divided = replace(one, d_lse=one.d_lse * by, d_cos=one.d_cos * by, kept=())
                factors.add(parameter, divided)
    return True


def _not_finite(parameter: Tensor) -> bool:
    """Whether the factors would give a gradient that is not finite."""
    found = factors.pending(parameter)
    # lse_neg is -inf in a row without negatives
    parts = [part for one in found for part in (one.d_lse, one.d_cos, one.x_hat)]
    return not torch.stack([part.isfinite().all() for part in parts]).all()
