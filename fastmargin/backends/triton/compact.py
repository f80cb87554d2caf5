"""Moves rows with a nonzero gradient to the front, so that the centre pass can stop after them.

Their number stays on the device. Every program counts for itself how many come before its rows, so
programs do not communicate, and the order of the batch is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.configs import block_of
from fastmargin.backends.triton.launch import on_device
from fastmargin.backends.triton.own_rows import store_nothing
from fastmargin.backends.triton.tuned import MOST_TILE_ROWS

COUNTED_AT_ONCE = 1024


@triton.jit
def _has_gradient(p_level, o_b, B):
    return tl.load(p_level + o_b, mask=o_b < B, other=float("inf")) != float("inf")


@triton.jit(do_not_specialize=["B"])
def compact_kernel(
    p_level,  # (B',) of own_rows.py
    p_code,  # (B',) int32, of own_rows.py
    p_lse,  # (B,), if HAS_HARD
    p_threshold,  # (B,), if HAS_HARD
    p_x,  # (B, D) contiguous
    p_count,  # (1,) int32, out: how many rows have one
    p_level_out,  # as above, out: only the first rows are written, and a block that follows
    p_code_out,
    p_lse_out,
    p_threshold_out,
    p_x_out,
    B,
    HAS_HARD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    ZEROS: tl.constexpr,
):
    i_r = tl.program_id(0)
    first = i_r * BLOCK_R
    b_before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, first, BLOCK):
        o_before = start + tl.arange(0, BLOCK)
        m_before = _has_gradient(p_level, o_before, B) & (o_before < first)
        b_before += m_before.to(tl.int32)
    before = tl.sum(b_before, 0)
    o_b = first + tl.arange(0, BLOCK_R)
    m_b = _has_gradient(p_level, o_b, B)
    b_own = m_b.to(tl.int32)
    o_out = (before + tl.cumsum(b_own, 0) - b_own).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    if i_r == tl.num_programs(0) - 1:
        count = before + tl.sum(b_own, 0)
        tl.store(p_count, count)
        store_nothing(p_level_out, p_code_out, count, B, ZEROS)
        # the pass reads whole blocks of rows, and multiplies those that follow by 0
        for start in range(0, ZEROS, BLOCK_R):
            o_zero = count + start + tl.arange(0, BLOCK_R)
            m_zero = (o_zero < B)[:, None] & (o_d < D)[None, :]
            p_zero = p_x_out + o_zero.to(tl.int64)[:, None] * D + o_d[None, :]
            tl.store(p_zero, tl.zeros([BLOCK_R, BLOCK_D], p_x_out.dtype.element_ty), mask=m_zero)
    tl.store(p_level_out + o_out, tl.load(p_level + o_b, mask=m_b), mask=m_b)
    tl.store(p_code_out + o_out, tl.load(p_code + o_b, mask=m_b), mask=m_b)
    if HAS_HARD:
        tl.store(p_lse_out + o_out, tl.load(p_lse + o_b, mask=m_b), mask=m_b)
        tl.store(p_threshold_out + o_out, tl.load(p_threshold + o_b, mask=m_b), mask=m_b)
    m_tile = m_b[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_b.to(tl.int64)[:, None] * D + o_d[None, :], mask=m_tile)
    tl.store(p_x_out + o_out[:, None] * D + o_d[None, :], b_x, mask=m_tile)


def constants(d: int, has_hard: bool) -> dict:
    """Compile-time arguments."""
    block_d = block_of(d)
    return {
        "HAS_HARD": has_hard,
        "D": d,
        "BLOCK_R": max(2, min(16, 4096 // block_d)),
        "BLOCK_D": block_d,
        "BLOCK": COUNTED_AT_ONCE,
        "ZEROS": MOST_TILE_ROWS,
        "num_warps": 4,
    }


def compact(
    level: Tensor, code: Tensor, lse: Tensor | None, threshold: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """The number of rows with a nonzero gradient, (1,) int32, then the arguments, those rows first.

    The rest is not written, except one block of rows without effect, whose ``x`` is 0.

    Args:
        level, code: (B',) of :class:`OwnRows`.
        lse, threshold: (B,) contiguous, fp32, with a hard rule.
        x: (B, D') contiguous.
    """
    b, d = x.shape
    count = torch.empty(1, dtype=torch.int32, device=x.device)
    given = level, code, lse, threshold, x
    moved = [None if tensor is None else torch.empty_like(tensor) for tensor in given]
    fixed = constants(d, threshold is not None)
    with on_device(x):
        compact_kernel[(triton.cdiv(b, fixed["BLOCK_R"]),)](*given, count, *moved, b, **fixed)
    return count, *moved
