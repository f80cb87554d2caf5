"""Per-row inputs of the centre pass, besides the unit rows.

A row contributes ``d_cos (x_hat - cos_y w_hat) / ||w||`` to the gradient of its own centre, in
fp32. The program of the first row of a class sums over all rows of that class, in order, so there
is one writer and the sum is deterministic.

The weight of its contribution to the other centres is ``g = d_lse s p``, which the pass recomputes
as ``+-2^(s c log2(e) - level)`` with ``level = lse log2(e) - log2(|d_lse| s)``, one number per row
instead of two. Another holds the sign and the own column, which is skipped:
``code = 2 column + (g < 0)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.configs import block_of
from fastmargin.backends.triton.launch import on_device
from fastmargin.backends.triton.tile import LOG2E, inverse
from fastmargin.backends.triton.tuned import MOST_TILE_ROWS
from fastmargin.spec import GradientFactors

BLOCK_OF_ROWS: tl.constexpr = tl.constexpr(MOST_TILE_ROWS)
NO_ROW: tl.constexpr = tl.constexpr(2**31 - 1)
SCANNED_AT_ONCE = 128


@dataclass(frozen=True)
class OwnRows:
    """own: (B, D) fp32, in the first row of every class; level: (B',) fp32; code: (B',) int32.

    B' is B rounded up to whole tiles of any size, so that the pass's loop needs no masks. Rows past
    B have no effect.
    """

    own: Tensor
    level: Tensor
    code: Tensor

    @staticmethod
    def empty(x_hat: Tensor) -> OwnRows:
        """Uninitialised, for unit rows (B, D)."""
        rows = triton.cdiv(x_hat.shape[0], MOST_TILE_ROWS) * MOST_TILE_ROWS
        level = x_hat.new_empty(rows, dtype=torch.float32)
        own = torch.empty_like(x_hat, dtype=torch.float32)
        return OwnRows(own, level, torch.empty_like(level, dtype=torch.int32))


@triton.jit
def store_nothing(p_level, p_code, first, B, BLOCK: tl.constexpr):
    """``level`` and ``code`` of the BLOCK rows from ``first`` on that do nothing to any centre."""
    o_b = first + tl.arange(0, BLOCK)
    m_b = o_b < tl.cdiv(B, BLOCK) * BLOCK
    tl.store(p_level + o_b, float("inf"), mask=m_b)
    tl.store(p_code + o_b, -2, mask=m_b)


@triton.jit
def store_level(p_level, p_code, o_b, m_b, b_lse, b_d_lse, b_column, scale, B):
    """``level`` and ``code`` of rows; inf where a row does nothing to others."""
    if tl.program_id(0) == 0:
        store_nothing(p_level, p_code, B, B, BLOCK_OF_ROWS)
    m_none = (b_d_lse == 0.0) | (b_lse == float("-inf"))
    b_size = tl.where(m_none, 1.0, tl.abs(b_d_lse) * scale)
    b_level = tl.where(m_none, 0.0, b_lse) * LOG2E - tl.log2(b_size)
    tl.store(p_level + o_b, tl.where(m_none, float("inf"), b_level), mask=m_b)
    b_code = 2 * b_column.to(tl.int32) + (b_d_lse < 0.0).to(tl.int32)
    tl.store(p_code + o_b, b_code, mask=m_b)


@triton.jit
def cos_gradient(
    p_d_loss, p_share, p_by_cos, p_by_lse, o_b, m_b, stride_loss, tolerance, GIVEN: tl.constexpr
):
    """Upstream gradient of ``cos_y`` of rows; ``p_by_cos`` is just that, if GIVEN."""
    b_d_cos = tl.load(p_by_cos + o_b, mask=m_b, other=0.0)
    if not GIVEN:
        b_upstream = tl.load(p_d_loss + o_b * stride_loss, mask=m_b, other=0.0)
        b_d_cos *= b_upstream * tl.load(p_share)
        b_miss = tl.load(p_by_lse + o_b, mask=m_b, other=0.0)
        b_d_cos = tl.where(b_miss <= tolerance, 0.0, b_d_cos)
    return b_d_cos


@triton.jit
def own_centres(
    p_w,
    p_index,
    p_label,
    o_b,
    m_b,
    o_d,
    C,
    rows_w,
    class_start,
    stride_wc,
    stride_wd,
    D: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Columns (R,) of the own centres, -1 elsewhere; unit rows (R, BLOCK_D); 1 / norm (R,)."""
    b_column = tl.load(p_label + o_b, mask=m_b, other=-1) - class_start
    m_here = (b_column >= 0) & (b_column < C)
    b_row = b_column
    if INDEXED:
        b_row = tl.load(p_index + tl.where(m_here, b_column, 0), mask=m_here, other=-1)
        m_here = (b_row >= 0) & (b_row < rows_w)
    p_own = p_w + tl.where(m_here, b_row, 0)[:, None] * stride_wc + o_d[None, :] * stride_wd
    b_w = tl.load(p_own, mask=m_here[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
    b_inverse = inverse(tl.sqrt_rn(tl.sum(b_w * b_w, 1)))
    return tl.where(m_here, b_column, -1), b_w * b_inverse[:, None], b_inverse


@triton.jit
def store_own(
    p_own,
    p_d_loss,
    p_share,
    p_by_cos,
    p_by_lse,
    p_x_hat,
    p_label,
    o_b,
    b_column,
    b_w,
    b_inverse,
    o_d,
    B,
    class_start,
    stride_loss,
    tolerance,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCANNED: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Stores (B, D) at those of the rows ``o_b`` that are the first of their class."""
    b_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_first = tl.zeros([ROWS], tl.int32) + NO_ROW
    for start in range(0, B, SCANNED):
        o_other = start + tl.arange(0, SCANNED)
        b_other = tl.load(p_label + o_other, mask=o_other < B, other=-1) - class_start
        m_same = (b_other[None, :] == b_column[:, None]) & (b_column >= 0)[:, None]
        b_same = tl.where(m_same, o_other[None, :], NO_ROW)
        b_next = tl.min(b_same, 1)
        b_first = tl.minimum(b_first, b_next)
        m_more = (b_next < NO_ROW) & (b_first == o_b)
        while tl.max(m_more.to(tl.int32), 0) > 0:
            o_next = tl.where(m_more, b_next, 0).to(tl.int64)
            b_d_cos = cos_gradient(
                p_d_loss, p_share, p_by_cos, p_by_lse, o_next, m_more, stride_loss, tolerance, GIVEN
            )
            p_x = p_x_hat + o_next[:, None] * D + o_d[None, :]
            b_x = tl.load(p_x, mask=m_more[:, None] & (o_d < D)[None, :], other=0.0)
            b_x = b_x.to(tl.float32)
            b_sum += b_d_cos[:, None] * (b_x - tl.sum(b_x * b_w, 1)[:, None] * b_w)
            b_same = tl.where(b_same == b_next[:, None], NO_ROW, b_same)
            b_next = tl.min(b_same, 1)
            m_more = m_more & (b_next < NO_ROW)
    p_tile = p_own + o_b.to(tl.int64)[:, None] * D + o_d[None, :]
    m_tile = (b_first == o_b)[:, None] & (o_d < D)[None, :]
    tl.store(p_tile, b_sum * b_inverse[:, None], mask=m_tile)


@triton.jit(do_not_specialize=["B", "C", "rows_w", "class_start"])
def own_rows_kernel(
    p_d_lse,  # (B,) upstream gradients
    p_d_cos,  # (B,)
    p_lse,  # (B,) lse_neg
    p_x_hat,  # (B, D) contiguous
    p_w,  # (rows_w, D) strided centres
    p_index,  # (C,) int64, their rows that are columns of the pass, if INDEXED
    p_label,  # (B,) int64
    p_own,  # (B, D) contiguous, out
    p_level,  # (B',) out
    p_code,  # (B',) int32, out
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
    SCANNED: tl.constexpr,
):
    o_b = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_b = o_b < B
    b_column, b_w, b_inverse = own_centres(
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
    b_lse = tl.load(p_lse + o_b, mask=m_b, other=0.0)
    b_d_lse = tl.load(p_d_lse + o_b, mask=m_b, other=0.0)
    store_level(p_level, p_code, o_b, m_b, b_lse, b_d_lse, b_column, scale, B)
    store_own(
        p_own,
        None,
        None,
        p_d_cos,
        None,
        p_x_hat,
        p_label,
        o_b,
        b_column,
        b_w,
        b_inverse,
        o_d,
        B,
        class_start,
        0,
        0.0,
        D,
        BLOCK_R,
        BLOCK_D,
        SCANNED,
        True,
    )


def constants(d: int, indexed: bool) -> dict:
    """Compile-time arguments."""
    block_d = block_of(d)
    return {
        "INDEXED": indexed,
        "D": d,
        "BLOCK_R": max(1, min(4, 1024 // block_d)),
        "BLOCK_D": block_d,
        "SCANNED": SCANNED_AT_ONCE,
        "num_warps": 4,
    }


def own_rows(weight: Tensor, part: GradientFactors) -> OwnRows:
    """Per-row inputs of the centre pass for a batch.

    Args:
        weight: (C, D).
        part: tensors contiguous, float ones fp32.
    """
    (b, d), index = part.x_hat.shape, part.index
    made = OwnRows.empty(part.x_hat)
    fixed = constants(d, index is not None)
    with on_device(part.x_hat):
        own_rows_kernel[(triton.cdiv(b, fixed["BLOCK_R"]),)](
            part.d_lse,
            part.d_cos,
            part.lse_neg,
            part.x_hat,
            weight,
            index,
            part.labels,
            made.own,
            made.level,
            made.code,
            b,
            weight.shape[0] if index is None else index.shape[0],
            weight.shape[0],
            part.class_start,
            weight.stride(0),
            weight.stride(1),
            float(part.scale),
            **fixed,
        )
    return made
