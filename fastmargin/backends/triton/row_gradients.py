"""Gradients of per-row operations, one launch each; the arithmetic of ``row_gradients.py``.

For losses composed of operators; in the fused step ``rows_backward.py`` does both in one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.configs import block_of
from fastmargin.backends.triton.launch import on_device
from fastmargin.backends.triton.own_rows import own_centres
from fastmargin.backends.triton.tile import cast, inverse


@triton.jit(do_not_specialize=["B", "C", "rows_w", "class_start"])
def through_stats_kernel(
    p_d_lse,  # (B,) upstream gradients
    p_d_cos,  # (B,)
    p_pull,  # (B, D) contiguous
    p_w,  # (rows_w, D) strided centres
    p_index,  # (C,) int64, their rows that are columns of the pass, if INDEXED
    p_label,  # (B,) int64
    p_d_x_hat,  # (B, D) contiguous, out
    B,
    C,
    rows_w,
    class_start,
    stride_wc,
    stride_wd,
    scale,
    INDEXED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_b = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_b = o_b < B
    _, b_own, _ = own_centres(
        p_w,
        p_index,
        p_label,
        o_b,
        m_b,
        o_d.to(tl.int64),
        C,
        rows_w,
        class_start,
        stride_wc,
        stride_wd,
        D,
        INDEXED,
    )
    b_d_lse = tl.load(p_d_lse + o_b, mask=m_b, other=0.0)
    b_d_cos = tl.load(p_d_cos + o_b, mask=m_b, other=0.0)
    m_tile = m_b[:, None] & (o_d < D)[None, :]
    o_tile = o_b.to(tl.int64)[:, None] * D + o_d[None, :]
    b_pull = tl.load(p_pull + o_tile, mask=m_tile, other=0.0)
    b_d_x_hat = (b_d_lse * scale)[:, None] * b_pull + b_d_cos[:, None] * b_own
    tl.store(p_d_x_hat + o_tile, b_d_x_hat, mask=m_tile)


@triton.jit(do_not_specialize=["B"])
def through_norm_kernel(
    p_d_x_hat,  # (B, D) contiguous
    p_d_norm,  # (B,) or None
    p_x_hat,  # (B, D) contiguous
    p_norm,  # (B,)
    p_d_x,  # (B, D) contiguous, out
    B,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_b = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_b = o_b < B
    m_tile = m_b[:, None] & (o_d < D)[None, :]
    o_tile = o_b.to(tl.int64)[:, None] * D + o_d[None, :]
    b_d_x_hat = tl.load(p_d_x_hat + o_tile, mask=m_tile, other=0.0)
    b_x_hat = tl.load(p_x_hat + o_tile, mask=m_tile, other=0.0)
    b_radial = tl.sum(b_d_x_hat * b_x_hat, 1)
    b_inverse = inverse(tl.load(p_norm + o_b, mask=m_b, other=0.0))
    b_d_x = (b_d_x_hat - b_radial[:, None] * b_x_hat) * b_inverse[:, None]
    if p_d_norm is not None:
        b_d_x += tl.load(p_d_norm + o_b, mask=m_b, other=0.0)[:, None] * b_x_hat
    tl.store(p_d_x + o_tile, cast(b_d_x, p_d_x.dtype.element_ty), mask=m_tile)


def constants(d: int) -> dict:
    """Compile-time arguments."""
    block_d = block_of(d)
    return {
        "D": d,
        "BLOCK_R": max(1, min(16, 1024 // block_d)),
        "BLOCK_D": block_d,
        "num_warps": 4,
    }


def through_stats(
    d_lse: Tensor,
    d_cos: Tensor,
    pull: Tensor,
    weight: Tensor,
    index: Tensor | None,
    labels: Tensor,
    scale: float,
    class_start: int,
) -> Tensor:
    """Gradient (B, D) of the unit rows.

    Args:
        d_lse, d_cos: (B,) contiguous, fp32.
        pull: (B, D) contiguous, fp32.
        weight: (C, D).
        index: (K,) contiguous, or None.
        labels: (B,) contiguous, int64.
    """
    b, d = pull.shape
    d_x_hat = torch.empty_like(pull)
    fixed = constants(d)
    if b:
        with on_device(pull):
            through_stats_kernel[(triton.cdiv(b, fixed["BLOCK_R"]),)](
                d_lse,
                d_cos,
                pull,
                weight,
                index,
                labels,
                d_x_hat,
                b,
                weight.shape[0] if index is None else index.shape[0],
                weight.shape[0],
                class_start,
                weight.stride(0),
                weight.stride(1),
                float(scale),
                INDEXED=index is not None,
                **fixed,
            )
    return d_x_hat


def through_norm(
    d_x_hat: Tensor, d_norm: Tensor | None, x_hat: Tensor, norm: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient (B, D) of the embeddings, in ``dtype``.

    Args:
        d_x_hat, x_hat: (B, D) contiguous, fp32.
        d_norm, norm: (B,) contiguous, fp32; the first may be None.
    """
    b, d = x_hat.shape
    d_x = torch.empty_like(x_hat, dtype=dtype)
    fixed = constants(d)
    if b:
        with on_device(x_hat):
            through_norm_kernel[(triton.cdiv(b, fixed["BLOCK_R"]),)](
                d_x_hat, d_norm, x_hat, norm, d_x, b, **fixed
            )
    return d_x
