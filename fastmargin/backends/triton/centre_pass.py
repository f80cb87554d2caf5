"""The backward pass over the centres: their gradient, through the normalisation.

A program owns BLOCK_C centres and BLOCK_D columns of their gradient, loops over the batch,
recomputes ``p = exp(s * f - lse)`` (at most 1, since lse is known) and adds ``g @ x_hat`` to an
accumulator in registers. The projection of the normalisation needs the radial part
``sum_i g_ij c_ij`` only, a sum over the tiles of cosines, so no program needs whole rows of dW.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.compact import compact
from fastmargin.backends.triton.configs import (
    DOT_PRECISION,
    STREAM_TYPES,
    TileConfig,
    block_of,
    choose,
    is_packed,
    is_raw,
    slope_power,
)
from fastmargin.backends.triton.launch import chip, on_device
from fastmargin.backends.triton.tile import (
    LOG2E,
    cast,
    centre_rows,
    hard_rule,
    indexed_rows,
    inverse_norms,
    load_rows,
    local_column,
    matmul,
    row_pointer,
    streamed_cosines,
)
from fastmargin.spec import HardRule


@triton.jit
def _largest_gradient(p_d_lse, p_d_cos, B, lse_factor, BLOCK: tl.constexpr):
    """Largest |upstream gradient| of a cosine that any row can bring."""
    b_top = tl.zeros([BLOCK], tl.float32)
    for start in range(0, B, BLOCK):
        o_b = start + tl.arange(0, BLOCK)
        b_lse = tl.load(p_d_lse + o_b, mask=o_b < B, other=0.0)
        b_cos = tl.load(p_d_cos + o_b, mask=o_b < B, other=0.0)
        b_top = tl.maximum(b_top, tl.maximum(tl.abs(b_lse) * lse_factor, tl.abs(b_cos)))
    return tl.max(b_top, 0)


@triton.jit(do_not_specialize=["B", "C", "rows_w", "class_start"])
def centre_pass_kernel(
    p_d_lse,  # (B,) upstream gradient of lse_neg
    p_d_cos,  # (B,) upstream gradient of cos_y
    p_x,  # (B, D) contiguous unit rows
    p_w,  # (rows_w, D) strided centres
    p_index,  # (C,) int64, their rows that are columns of the pass, if INDEXED
    p_label,  # (B,) int64
    p_lse,  # (B,) lse_neg
    p_threshold,  # (B,) hard rule, if HAS_HARD
    p_rule,  # (3,) its coefficients
    p_count,  # (1,) int32 number of rows that take part, the first ones, if COUNTED
    p_dw,  # (C, D) contiguous, out, in the order of the columns
    B,
    C,
    rows_w,
    class_start,
    stride_wc,
    stride_wd,
    scale,
    slope_limit,
    PACKED: tl.constexpr,
    INDEXED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    RAW: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_HARD: tl.constexpr,
    COUNTED: tl.constexpr,
):
    if COUNTED:
        B = tl.load(p_count)
    WHOLE: tl.constexpr = BLOCK_K >= D
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i_c = tl.program_id(0).to(tl.int64) // COLUMNS
    i_d = tl.program_id(0) % COLUMNS
    start = i_c * BLOCK_C
    o_c = start + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if INDEXED:
        p_wc, m_c = indexed_rows(p_w, p_index, o_c, C, rows_w, stride_wc, D, PACKED)
    else:
        p_wc = row_pointer(p_w, start, stride_wc, D, PACKED)
    b_inverse = inverse_norms(p_wc, m_c, stride_wc, stride_wd, D, BLOCK_C, BLOCK_N, PACKED, INDEXED)
    if WHOLE:
        b_w = centre_rows(
            p_wc,
            m_c,
            b_inverse,
            stride_wc,
            stride_wd,
            0,
            D,
            BLOCK_C,
            BLOCK_K,
            PACKED,
            INDEXED,
            OPERAND,
            RAW,
        )

    # fp16 holds gradients of one power of two of the largest; 2**-39 of it still counts
    unit = 1.0
    if SCALED:
        b_top = _largest_gradient(p_d_lse, p_d_cos, B, scale * slope_limit, 1024)
        b_power = tl.floor(14.0 - tl.log2(tl.where(b_top > 0, b_top, 1.0)))
        unit = tl.exp2(tl.minimum(tl.maximum(b_power, -100.0), 100.0))

    b_grad = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    b_radial = tl.zeros([BLOCK_C], tl.float32)
    scale2 = scale * LOG2E
    for i_b in range(0, tl.cdiv(B, BLOCK_B)):
        first = i_c - i_c + i_b * BLOCK_B  # int64
        o_b = first + tl.arange(0, BLOCK_B)
        m_b = o_b < B
        p_xb = p_x + first * D
        if WHOLE:
            b_x = load_rows(p_xb, m_b, D, 1, 0, D, BLOCK_B, BLOCK_K, True)
            b_cos = tl.zeros([BLOCK_C, BLOCK_B], tl.float32)
            b_cos = matmul(b_w, tl.trans(b_x), b_cos, PRECISION)
        else:
            b_cos = streamed_cosines(
                p_xb,
                m_b,
                p_wc,
                m_c,
                b_inverse,
                stride_wc,
                stride_wd,
                D,
                BLOCK_B,
                BLOCK_C,
                BLOCK_K,
                PACKED,
                INDEXED,
                OPERAND,
                RAW,
                PRECISION,
                True,
            )
        if RAW:
            b_cos *= b_inverse[:, None]

        b_lse = tl.load(p_lse + o_b, mask=m_b, other=float("-inf"))
        b_d_lse = tl.load(p_d_lse + o_b, mask=m_b, other=0.0) * (scale * unit)
        b_d_cos = tl.load(p_d_cos + o_b, mask=m_b, other=0.0) * unit
        b_label = tl.load(p_label + o_b, mask=m_b, other=-1) - class_start
        b_target = local_column(b_label, start, BLOCK_C)
        # a row without a negative (lse = -inf), or past B, has p = 0
        b_lse2 = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
        b_f = b_cos
        if HAS_HARD:
            b_threshold = tl.load(p_threshold + o_b, mask=m_b, other=2.0)
            b_f, b_slope = hard_rule(b_cos, b_threshold[None, :], p_rule)
        b_z = scale2 * b_f - b_lse2[None, :]
        # rounding may put a cosine on the other side of a hard threshold than the forward pass did
        b_z = tl.minimum(b_z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_g = tl.exp2(b_z) * b_d_lse[None, :]
        if HAS_HARD:
            b_g *= b_slope
        m_target = tl.arange(0, BLOCK_C)[:, None] == b_target[None, :]
        b_g = tl.where(m_target, b_d_cos[None, :], b_g)
        b_half = cast(b_g, OPERAND)
        # of the rounded gradients, so that it matches what the product below sums up
        b_radial += tl.sum(b_half.to(tl.float32) * b_cos, 1)
        if not (WHOLE and COLUMNS == 1):
            b_x = load_rows(p_xb, m_b, D, 1, i_d * BLOCK_D, D, BLOCK_B, BLOCK_D, True)
        b_grad = matmul(b_half, b_x, b_grad, PRECISION)

    b_out = load_rows(
        p_wc, m_c, stride_wc, stride_wd, i_d * BLOCK_D, D, BLOCK_C, BLOCK_D, PACKED, INDEXED
    )
    # the inverse norm of an empty place is 0, and so is its gradient
    b_out = b_out.to(tl.float32) * b_inverse[:, None]
    b_out = (b_grad - b_radial[:, None] * b_out) * (b_inverse / unit)[:, None]
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    p_tile = p_dw + start * D + (tl.arange(0, BLOCK_C)[:, None] * D + o_d[None, :])
    m_tile = (o_c < C)[:, None] & (o_d < D)[None, :]
    tl.store(p_tile, cast(b_out, p_dw.dtype.element_ty), mask=m_tile)


def constants(
    d: int,
    precision: str,
    packed: bool,
    indexed: bool,
    raw: bool,
    tile: TileConfig,
    has_hard: bool,
    counted: bool,
) -> dict:
    """Compile-time arguments."""
    return {
        "PACKED": packed,
        "INDEXED": indexed,
        "D": d,
        "BLOCK_N": min(block_of(d), 128),
        "OPERAND": STREAM_TYPES[precision],
        "PRECISION": DOT_PRECISION[precision],
        "RAW": raw,
        "SCALED": precision == "fp16",
        "HAS_HARD": has_hard,
        "COUNTED": counted,
        **tile.arguments(),
    }


def centre_pass(
    d_lse: Tensor,
    d_cos: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor | None,
    labels: Tensor,
    lse_neg: Tensor,
    scale: float,
    hard: HardRule | None,
    class_start: int,
    precision: str,
    skip_zero_rows: bool,
) -> Tensor:
    """Gradient (C, D) of ``weight``, or (K, D) of its rows in ``index``: contiguous, in its dtype.

    Args:
        d_lse: (B,) contiguous, fp32.
        d_cos: (B,) contiguous, fp32.
        x: (B, D) contiguous unit rows in the operand type.
        weight: (C, D).
        index: (K,) contiguous, or None.
        labels: (B,) contiguous, int64.
        lse_neg: (B,) contiguous, fp32.
        scale: s.
        hard: rule for hard negatives, its threshold contiguous and fp32.
        class_start: global id of ``weight[0]``.
        precision: one of "fp32", "tf32", "bf16", "fp16".
        skip_zero_rows: rows without a gradient are many, so they are sorted out first.
    """
    count, threshold = None, None if hard is None else hard.threshold
    if skip_zero_rows:
        count, d_lse, d_cos, lse_neg, threshold, labels, x = compact(
            d_lse, d_cos, lse_neg, threshold, labels, x
        )
    c, d = weight.shape[0] if index is None else index.shape[0], weight.shape[1]
    d_weight = torch.empty((c, d), dtype=weight.dtype, device=weight.device)
    packed, raw = is_packed(weight), is_raw(weight.dtype, precision)
    indexed = index is not None
    # a number of rows that is read takes a register, as an index does
    short = indexed or skip_zero_rows
    tile = choose("centre_pass", d, precision, raw, packed, short, chip(weight.device).arch)
    fixed = constants(d, precision, packed, indexed, raw, tile, hard is not None, skip_zero_rows)
    grid = (triton.cdiv(c, tile.block_c) * triton.cdiv(d, tile.block_d),)
    with on_device(weight):
        centre_pass_kernel[grid](
            d_lse,
            d_cos,
            x,
            weight,
            index,
            labels,
            lse_neg,
            threshold,
            None if hard is None else hard.coefficients,
            count,
            d_weight,
            x.shape[0],
            c,
            weight.shape[0],
            class_start,
            weight.stride(0),
            weight.stride(1),
            float(scale),
            slope_power(hard),
            **fixed,
        )
    return d_weight
