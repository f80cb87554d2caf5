"""From the gradient of the loss to that of the embeddings, and to what the centre pass needs.

Everything after the passes over the centres in one launch: the chain through margin, pull, own
centre and normalisation of every row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.configs import block_of
from fastmargin.backends.triton.launch import on_device
from fastmargin.backends.triton.tile import cast, inverse
from fastmargin.spec import SoftmaxLoss


@triton.jit(do_not_specialize=["B", "C", "rows_w", "class_start", "stride_loss"])
def rows_backward_kernel(
    p_d_loss,  # (1,) or (B,) upstream gradient
    p_share,  # (1,) what a row weighs in the loss
    p_by_cos,  # (B,) slopes of the loss of a row
    p_by_lse,  # (B,) equal to 1 - p_y
    p_by_norm,  # (B,)
    p_x_hat,  # (B, D) contiguous
    p_norm,  # (B,)
    p_pull,  # (B, D) contiguous
    p_w,  # (rows_w, D) strided centres
    p_index,  # (C,) int64, their rows that are columns of the pass, if INDEXED
    p_label,  # (B,) int64 columns of the pass
    p_d_x,  # (B, D) contiguous, out
    p_d_lse,  # (B,) out, if WANT_W; 0 where by_lse <= tolerance
    p_d_cos,  # (B,) out, as p_d_lse
    B,
    C,
    rows_w,
    class_start,
    stride_wc,
    stride_wd,
    stride_loss,
    scale,
    tolerance,
    WANT_X: tl.constexpr,
    WANT_W: tl.constexpr,
    INDEXED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_b = o_b < B
    b_upstream = tl.load(p_d_loss + o_b * stride_loss, mask=m_b, other=0.0) * tl.load(p_share)
    b_miss = tl.load(p_by_lse + o_b, mask=m_b, other=0.0)
    b_d_lse = b_upstream * b_miss
    b_d_cos = b_upstream * tl.load(p_by_cos + o_b, mask=m_b, other=0.0)
    if WANT_W:
        m_drop = b_miss <= tolerance
        tl.store(p_d_lse + o_b, tl.where(m_drop, 0.0, b_d_lse), mask=m_b)
        tl.store(p_d_cos + o_b, tl.where(m_drop, 0.0, b_d_cos), mask=m_b)
    if WANT_X:
        b_d_norm = b_upstream * tl.load(p_by_norm + o_b, mask=m_b, other=0.0)
        o_d = tl.arange(0, BLOCK_D).to(tl.int64)
        m_d = (o_d < D)[None, :]
        m_tile = m_b[:, None] & m_d
        o_tile = o_b[:, None] * D + o_d[None, :]
        b_row = tl.load(p_label + o_b, mask=m_b, other=-1) - class_start
        m_here = (b_row >= 0) & (b_row < C)
        if INDEXED:
            b_row = tl.load(p_index + tl.where(m_here, b_row, 0), mask=m_here, other=-1)
            m_here = (b_row >= 0) & (b_row < rows_w)
        p_own = p_w + tl.where(m_here, b_row, 0)[:, None] * stride_wc + o_d[None, :] * stride_wd
        b_own = tl.load(p_own, mask=m_here[:, None] & m_d, other=0.0).to(tl.float32)
        b_own *= inverse(tl.sqrt_rn(tl.sum(b_own * b_own, 1)))[:, None]
        b_pull = tl.load(p_pull + o_tile, mask=m_tile, other=0.0)
        b_d_x = (b_d_lse * scale)[:, None] * b_pull + b_d_cos[:, None] * b_own
        b_x_hat = tl.load(p_x_hat + o_tile, mask=m_tile, other=0.0)
        b_radial = tl.sum(b_d_x * b_x_hat, 1)
        b_inverse = inverse(tl.load(p_norm + o_b, mask=m_b, other=0.0))
        b_d_x = (b_d_x - b_radial[:, None] * b_x_hat) * b_inverse[:, None]
        b_d_x += b_d_norm[:, None] * b_x_hat
        tl.store(p_d_x + o_tile, cast(b_d_x, p_d_x.dtype.element_ty), mask=m_tile)


def constants(d: int, indexed: bool, want_x: bool, want_w: bool) -> dict:
    """Compile-time arguments."""
    block_d = block_of(d)
    return {
        "WANT_X": want_x,
        "WANT_W": want_w,
        "INDEXED": indexed,
        "D": d,
        "BLOCK_R": max(1, min(16, 2048 // block_d)),
        "BLOCK_D": block_d,
        "num_warps": 4,
    }


def rows_backward(
    d_loss: Tensor,
    made: SoftmaxLoss,
    weight: Tensor,
    index: Tensor | None,
    columns: Tensor,
    class_start: int,
    scale: float,
    x_dtype: torch.dtype,
    want_x: bool,
    want_weight: bool,
    row_tolerance: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradient (B, D) of the embeddings; of ``lse_neg`` and ``cos_y`` (B,), for the centre pass.

    What is not wanted is None. The last two are 0 in rows with 1 - p_y up to ``row_tolerance``.

    Args:
        d_loss: () or (B,), any stride, fp32.
        made: what the forward pass left.
        weight: (C, D).
        index: (K,) contiguous, or None.
        columns: (B,) contiguous, int64.
    """
    b, d = made.x_hat.shape
    d_x = torch.empty((b, d), dtype=x_dtype, device=weight.device) if want_x else None
    d_lse, d_cos = (torch.empty_like(made.norm) if want_weight else None for _ in range(2))
    fixed = constants(d, index is not None, want_x, want_weight)
    with on_device(weight):
        rows_backward_kernel[(triton.cdiv(b, fixed["BLOCK_R"]),)](
            d_loss,
            made.share,
            made.by_cos,
            made.by_lse,
            made.by_norm,
            made.x_hat,
            made.norm,
            made.pull,
            weight,
            index,
            columns,
            d_x,
            d_lse,
            d_cos,
            b,
            weight.shape[0] if index is None else index.shape[0],
            weight.shape[0],
            class_start,
            weight.stride(0),
            weight.stride(1),
            d_loss.stride(0) if d_loss.dim() else 0,
            float(scale),
            float(row_tolerance),
            **fixed,
        )
    return d_x, d_lse, d_cos
