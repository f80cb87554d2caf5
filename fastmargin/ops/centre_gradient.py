"""The centre pass: the gradient of the centres from batch-sized factors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin import factors
from fastmargin.ops.registration import STATS_ARGS, backend_for, op
from fastmargin.ops.spread_rows import spread_rows
from fastmargin.spec import GradientFactors


@op(
    "row_stats_backward",
    f"(Tensor d_lse, Tensor d_cos, {STATS_ARGS}, Tensor lse_neg, bool skip_zero_rows,"
    " Tensor[] kept, str precision, str backend) -> Tensor",
)
def row_stats_backward(d_lse, d_cos, x_hat, weight, *settings):
    part = GradientFactors.build(d_lse, d_cos, x_hat, settings)
    return backend_for(part.backend, x_hat, part.precision).row_stats_backward(weight, part)


@row_stats_backward.register_fake
def _(d_lse, d_cos, x_hat, weight, index, *_):
    rows = weight.shape[0] if index is None else index.shape[0]
    return torch.empty((rows, weight.shape[1]), dtype=weight.dtype, device=weight.device)


def centre_rows(weight: Tensor, found: GradientFactors) -> Tensor:
    """The gradient of the centres in the pass, (C, D) or (K, D), in the dtype of ``weight``."""
    return row_stats_backward(found.d_lse, found.d_cos, found.x_hat, weight, *found.settings())


def centre_gradient(weight: Tensor, found: GradientFactors) -> Tensor:
    """Gradient of ``weight`` (C, D) from its factors; dense or sparse, see :func:`spread_rows`."""
    return spread_rows(centre_rows(weight, found), found.index, weight, found.sparse_grad)


def gradient_or_factors(
    weight: Tensor, found: GradientFactors, node: torch.autograd.graph.Node | None
) -> Tensor | None:
    """The gradient of ``weight``; or stores its factors for a fused optimiser and returns None.

    node: as in :func:`fastmargin.factors.wanted`.
    """
    if factors.wanted(weight, node):
        factors.add(weight, found)
        return None
    return centre_gradient(weight, found)
