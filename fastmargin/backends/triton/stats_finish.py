"""Sums the results of the forward pass's splits, in a fixed order; target cosine in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.configs import block_of, slope_power
from fastmargin.backends.triton.launch import on_device
from fastmargin.backends.triton.stats_merge import Partials
from fastmargin.backends.triton.tile import LN2, target_cosine
from fastmargin.spec import HardRule


@triton.jit(do_not_specialize=["B", "C", "rows_w", "class_start", "splits"])
def stats_finish_kernel(
    p_x,  # (B, D) contiguous unit rows
    p_w,  # (rows_w, D) strided centres
    p_index,  # (C,) int64, their rows that are columns of the pass, if INDEXED
    p_label,  # (B,) int64
    p_sum,  # (splits, B)
    p_shift,  # (splits, B), if ONLINE
    p_max,  # (splits, B)
    p_partial,  # (splits, B, D), if WANT_PULL
    p_lse,  # (B,) out
    p_cos,  # (B,) out
    p_max_out,  # (B,) out
    p_pull,  # (B, D) out, if WANT_PULL
    B,
    C,
    rows_w,
    class_start,
    stride_wc,
    stride_wd,
    splits,
    slope_unit,
    INDEXED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WANT_PULL: tl.constexpr,
    ONLINE: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < splits
    o_part = o_s.to(tl.int64) * B + i_b
    b_part = tl.load(p_sum + o_part, mask=m_s, other=0.0)
    b_shift = 0.0
    if ONLINE:
        b_shifts = tl.load(p_shift + o_part, mask=m_s, other=float("-inf"))
        b_shift = tl.max(b_shifts, 0)
        b_part *= tl.exp2(b_shifts - b_shift)
    b_total = tl.sum(b_part, 0)
    # a row without a negative has the sum 0; a NaN must not pass for one
    m_none = b_total == 0.0
    b_safe = tl.where(m_none, 1.0, b_total)
    b_lse = tl.where(m_none, float("-inf"), tl.log(b_safe) + b_shift * LN2)
    tl.store(p_lse + i_b, b_lse)
    b_max = tl.load(p_max + o_part, mask=m_s, other=float("-inf"))
    tl.store(p_max_out + i_b, tl.max(b_max, 0))

    b_label = tl.load(p_label + i_b) - class_start
    b_cos = target_cosine(
        p_x,
        p_w,
        p_index,
        i_b,
        b_label,
        C,
        rows_w,
        stride_wc,
        stride_wd,
        D,
        BLOCK_D,
        INDEXED,
    )
    tl.store(p_cos + i_b, b_cos)

    if WANT_PULL:
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_pull = tl.zeros([BLOCK_D], tl.float32)
        for i_s in range(0, splits):
            o_row = (i_b - i_b + i_s) * B + i_b  # int64
            b_row = tl.load(p_partial + o_row * D + o_d, mask=m_d, other=0.0)
            if ONLINE:
                b_row *= tl.exp2(tl.load(p_shift + o_row) - b_shift)
            b_pull += b_row
        tl.store(p_pull + i_b * D + o_d, b_pull / (b_safe * slope_unit), mask=m_d)


def constants(d: int, indexed: bool, splits: int, want_pull: bool, online: bool) -> dict:
    """Compile-time arguments."""
    return {
        "INDEXED": indexed,
        "D": d,
        "BLOCK_D": block_of(d),
        "BLOCK_S": triton.next_power_of_2(splits),
        "WANT_PULL": want_pull,
        "ONLINE": online,
        "num_warps": 4,
    }


def stats_finish(
    x_hat: Tensor,
    weight: Tensor,
    index: Tensor | None,
    labels: Tensor,
    class_start: int,
    partials: Partials,
    hard: HardRule | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``lse_neg``, ``cos_y``, ``max_neg`` (B,) and ``pull`` (B, D), or (0, D) without partials.

    Args:
        x_hat: (B, D) contiguous.
        weight: (C, D).
        index: (K,) contiguous, or None.
        labels: (B,) contiguous.
        class_start: global id of ``weight[0]``.
        partials: results of the splits.
        hard: rule for hard negatives; the numerators were divided by its :func:`slope_power`.
    """
    b, d = x_hat.shape
    sums, shifts, numerators = partials.sums, partials.shifts, partials.numerators
    lse, cos_y, max_neg = (torch.empty_like(x_hat[:, 0]) for _ in range(3))
    pull = torch.empty_like(x_hat) if numerators is not None else x_hat.new_empty((0, d))
    fixed = constants(
        d, index is not None, sums.shape[0], numerators is not None, shifts is not None
    )
    with on_device(x_hat):
        stats_finish_kernel[(b,)](
            x_hat,
            weight,
            index,
            labels,
            sums,
            shifts,
            partials.maxima,
            numerators,
            lse,
            cos_y,
            max_neg,
            pull,
            b,
            weight.shape[0] if index is None else index.shape[0],
            weight.shape[0],
            class_start,
            weight.stride(0),
            weight.stride(1),
            sums.shape[0],
            1 / slope_power(hard),
            **fixed,
        )
    return lse, cos_y, max_neg, pull
