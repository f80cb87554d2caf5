"""From the gradient of the loss to that of the embeddings and the inputs of the centre pass.

All per-row work of the backward in one launch: the chain rule through margin, pull, own centre and
normalisation of each row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.configs import block_of
from fastmargin.backends.triton.launch import NO_SPILLS, on_device
from fastmargin.backends.triton.own_rows import (
    SCANNED_AT_ONCE,
    OwnRows,
    own_centres,
    store_level,
    store_own,
)
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
    p_lse,  # (B,) lse_neg
    p_own,  # (B, D) out, if WANT_W; see own_rows.py
    p_level,  # (B',) out, as p_own
    p_code,  # (B',) int32, out, as p_own
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
    SCANNED: tl.constexpr,
):
    o_b = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_b = o_b < B
    b_upstream = tl.load(p_d_loss + o_b * stride_loss, mask=m_b, other=0.0) * tl.load(p_share)
    b_miss = tl.load(p_by_lse + o_b, mask=m_b, other=0.0)
    b_d_lse = b_upstream * b_miss
    b_d_cos = b_upstream * tl.load(p_by_cos + o_b, mask=m_b, other=0.0)
    o_d = tl.arange(0, BLOCK_D)
    b_column, b_own, b_own_inverse = own_centres(
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
    if WANT_W:
        m_drop = b_miss <= tolerance
        b_lse = tl.load(p_lse + o_b, mask=m_b, other=0.0)
        b_left = tl.where(m_drop, 0.0, b_d_lse)
        tl.store(p_d_lse + o_b, b_left, mask=m_b)
        store_level(p_level, p_code, o_b, m_b, b_lse, b_left, b_column, scale, B)
        tl.store(p_d_cos + o_b, tl.where(m_drop, 0.0, b_d_cos), mask=m_b)
        store_own(
            p_own,
            p_d_loss,
            p_share,
            p_by_cos,
            p_by_lse,
            p_x_hat,
            p_label,
            o_b,
            b_column,
            b_own,
            b_own_inverse,
            o_d,
            B,
            class_start,
            stride_loss,
            tolerance,
            D,
            BLOCK_R,
            BLOCK_D,
            SCANNED,
            False,
        )
    if WANT_X:
        b_d_norm = b_upstream * tl.load(p_by_norm + o_b, mask=m_b, other=0.0)
        m_tile = m_b[:, None] & (o_d < D)[None, :]
        o_tile = o_b.to(tl.int64)[:, None] * D + o_d[None, :]
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
        "BLOCK_R": max(1, min(16, 1024 // block_d)),
        "BLOCK_D": block_d,
        "SCANNED": SCANNED_AT_ONCE,
        "num_warps": 4,
        **NO_SPILLS,
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
) -> tuple[Tensor | None, ...]:
    """Gradient (B, D) of the embeddings; of ``lse_neg`` and ``cos_y`` (B,); own, level, code.

    The last five are for the centre pass (``own_rows.py``), and leave out rows with 1 - p_y up to
    ``row_tolerance``. What is not wanted is None.

    Args:
        d_loss: () or (B,), any stride, fp32.
        made: results of the forward pass.
        weight: (C, D).
        index: (K,) contiguous, or None.
        columns: (B,) contiguous, int64.
    """
    b, d = made.x_hat.shape
    d_x = torch.empty((b, d), dtype=x_dtype, device=weight.device) if want_x else None
    d_lse, d_cos = (torch.empty_like(made.norm) if want_weight else None for _ in range(2))
    own = OwnRows.empty(made.x_hat) if want_weight else OwnRows(None, None, None)
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
            made.lse_neg,
            own.own,
            own.level,
            own.code,
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
    return d_x, d_lse, d_cos, own.own, own.level, own.code
