"""Moves the rows that have a gradient to the front, so that the centre pass may stop after them.

How many there are stays on the device. A program finds out by itself how many come before its
own rows, in integers, so that nothing is shared and the order is that of the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.configs import block_of
from fastmargin.backends.triton.launch import on_device

COUNTED_AT_ONCE = 1024


@triton.jit
def _has_gradient(p_d_lse, p_d_cos, o_b, B):
    b_d_lse = tl.load(p_d_lse + o_b, mask=o_b < B, other=0.0)
    b_d_cos = tl.load(p_d_cos + o_b, mask=o_b < B, other=0.0)
    return (b_d_lse != 0.0) | (b_d_cos != 0.0)


@triton.jit(do_not_specialize=["B"])
def compact_kernel(
    p_d_lse,  # (B,)
    p_d_cos,  # (B,)
    p_lse,  # (B,)
    p_threshold,  # (B,), if HAS_HARD
    p_label,  # (B,) int64
    p_x,  # (B, D) contiguous
    p_count,  # (1,) int32, out: how many rows have a gradient
    p_d_lse_out,  # as above, out: only the first rows are written
    p_d_cos_out,
    p_lse_out,
    p_threshold_out,
    p_label_out,
    p_x_out,
    B,
    HAS_HARD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_r = tl.program_id(0)
    first = i_r * BLOCK_R
    b_before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, first, BLOCK):
        o_before = start + tl.arange(0, BLOCK)
        m_before = _has_gradient(p_d_lse, p_d_cos, o_before, B) & (o_before < first)
        b_before += m_before.to(tl.int32)
    before = tl.sum(b_before, 0)
    o_b = first + tl.arange(0, BLOCK_R)
    m_b = _has_gradient(p_d_lse, p_d_cos, o_b, B)
    b_own = m_b.to(tl.int32)
    o_out = (before + tl.cumsum(b_own, 0) - b_own).to(tl.int64)
    if i_r == tl.num_programs(0) - 1:
        tl.store(p_count, before + tl.sum(b_own, 0))
    tl.store(p_d_lse_out + o_out, tl.load(p_d_lse + o_b, mask=m_b), mask=m_b)
    tl.store(p_d_cos_out + o_out, tl.load(p_d_cos + o_b, mask=m_b), mask=m_b)
    tl.store(p_lse_out + o_out, tl.load(p_lse + o_b, mask=m_b), mask=m_b)
    tl.store(p_label_out + o_out, tl.load(p_label + o_b, mask=m_b), mask=m_b)
    if HAS_HARD:
        tl.store(p_threshold_out + o_out, tl.load(p_threshold + o_b, mask=m_b), mask=m_b)
    o_d = tl.arange(0, BLOCK_D)
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
        "num_warps": 4,
    }


def compact(
    d_lse: Tensor,
    d_cos: Tensor,
    lse_neg: Tensor,
    threshold: Tensor | None,
    labels: Tensor,
    x: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """The number of rows with a gradient (1,) int32, then the arguments with those rows first.

    What follows them is not written.

    Args:
        d_lse, d_cos, lse_neg: (B,) contiguous, fp32.
        threshold: (B,) contiguous, fp32, of a hard rule.
        labels: (B,) contiguous, int64.
        x: (B, D) contiguous.
    """
    b, d = x.shape
    count = torch.empty(1, dtype=torch.int32, device=x.device)
    given = d_lse, d_cos, lse_neg, threshold, labels, x
    moved = tuple(None if tensor is None else torch.empty_like(tensor) for tensor in given)
    fixed = constants(d, threshold is not None)
    with on_device(x):
        compact_kernel[(triton.cdiv(b, fixed["BLOCK_R"]),)](*given, count, *moved, b, **fixed)
    return count, *moved
