"""Gradients of per-row operations in plain PyTorch; derived in docs/math.md."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin.norms import compute_dtype, inverse_norm
from fastmargin.rows import take


def row_numbers(columns: Tensor, index: Tensor | None) -> Tensor:
    """The rows of ``weight`` of ``columns`` of the pass; out of range where there is none."""
    return columns if index is None else take(index, columns, -1)


def own_rows(weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """These centres as unit rows, and their inverse norms; zero for rows out of range."""
    centres = take(weight, rows, 0)
    centres = centres.to(compute_dtype(weight.dtype))
    inv = inverse_norm(centres)
    return centres * inv, inv


def through_norm(d_x_hat: Tensor, d_norm: Tensor | None, x_hat: Tensor, norm: Tensor) -> Tensor:
    """Gradient (B, D) of the embeddings from those of their unit rows (B, D) and norms (B,)."""
    radial = (d_x_hat * x_hat).sum(1, keepdim=True)
    d_x = (d_x_hat - radial * x_hat) * inverse_norm(norm[:, None])
    return d_x if d_norm is None else d_x + d_norm[:, None] * x_hat


def through_stats(
    d_lse: Tensor,
    d_cos: Tensor,
    pull: Tensor,
    weight: Tensor,
    index: Tensor | None,
    columns: Tensor,
    scale: float,
    class_start: int,
) -> Tensor:
    """Gradient (B, D) of the unit rows from those of ``lse_neg`` (B,) and ``cos_y`` (B,)."""
    own, _ = own_rows(weight, row_numbers(columns - class_start, index))
    return (d_lse * scale)[:, None] * pull + d_cos[:, None] * own.to(pull.dtype)


def without_confident(
    d_lse: Tensor, d_cos: Tensor, miss: Tensor | None, row_tolerance: float
) -> tuple[Tensor, Tensor]:
    """Both (B,), set to 0 in rows whose ``miss``, 1 - p_y, is at most the tolerance."""
    if miss is None or row_tolerance == 0:
        return d_lse, d_cos
    drop = miss <= row_tolerance
    return torch.where(drop, 0, d_lse), torch.where(drop, 0, d_cos)
