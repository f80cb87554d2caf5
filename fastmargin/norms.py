"""Norms: the dtype they are computed in, their inverse, and mergeable running statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin.spec import NormEma

NORM_FLOOR = 1e-12
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes allowed for class centres and optimiser state."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inverse_norm(rows: Tensor) -> Tensor:
    """1 / ||row|| over the last axis, which is kept; 0 with zero gradient for norms up to 1e-12."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    known = norm > NORM_FLOOR
    # dividing by 0 would give NaN gradients even in the branch not taken
    return torch.where(known, 1 / torch.where(known, norm, 1), 0)


def unit(rows: Tensor) -> Tensor:
    """Rows scaled to unit length, in their own dtype; computed in float32 or float64."""
    wide = rows.to(compute_dtype(rows.dtype))
    return (wide * inverse_norm(wide)).to(rows.dtype)


def moments(norm: Tensor, labels: Tensor, ema: NormEma) -> Tensor:
    """(3,): count, mean and sum of squared deviations of the clipped norms of rows with label >= 0.

    NaN norms are left out, since one would stay in the running statistics forever.
    """
    norm = norm.detach()
    valid = (labels >= 0) & ~norm.isnan()
    n = valid.sum().to(norm.dtype)
    clipped = norm.clamp(ema.low, ema.high)
    mean = torch.where(valid, clipped, 0).sum() / n.clamp_min(1)
    deviation = torch.where(valid, (clipped - mean) ** 2, 0).sum()
    return torch.stack([n, mean, deviation])


def advance(ema: NormEma, parts: Tensor) -> tuple[Tensor, Tensor]:
    """The running mean (1,) and unbiased standard deviation (1,) after this batch.

    parts: (R, 3) :func:`moments` of R disjoint parts of the batch, one per process. The mean needs
    one row, the standard deviation two; with fewer the old value stays.
    """
    n_part, mean_part, deviation_part = parts.unbind(1)
    n = n_part.sum()
    mean = (n_part * mean_part).sum() / n.clamp_min(1)
    deviation = (deviation_part + n_part * (mean_part - mean) ** 2).sum()
    std = (deviation / (n - 1).clamp_min(1)).sqrt()
    old_mean, old_std = ema.mean.to(parts.dtype), ema.std.to(parts.dtype)
    return (
        torch.where(n >= 1, torch.lerp(old_mean, mean, ema.alpha), old_mean),
        torch.where(n >= 2, torch.lerp(old_std, std, ema.alpha), old_std),
    )
