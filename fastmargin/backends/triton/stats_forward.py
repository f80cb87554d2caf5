"""The tied forward pass: sums of exponentials and, if wanted, the pull, in one stream over W.

A program owns BLOCK_B rows, BLOCK_D columns of the pull and one split of the classes. For each
tile of centres it forms the cosines, their exponentials ``e`` and adds ``e @ w_hat`` to an
accumulator that never leaves the registers: attention with K = V = w_hat. Nothing is shared
between programs, so the sums have one order and the results are the same every time.

With ONLINE a row's exponentials are relative to 2**shift, its own running power of two; without,
the logits are bounded and need none (``|s * f| + log C <= 85`` keeps the sums in fp32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.configs import (
    DOT_PRECISION,
    STREAM_TYPES,
    TileConfig,
    choose,
    is_packed,
    is_raw,
    slope_power,
    split_classes,
)
from fastmargin.backends.triton.launch import chip, on_device
from fastmargin.backends.triton.tile import (
    LOG2E,
    NO_SHIFT,
    RISE,
    START,
    cast,
    centre_rows,
    hard_rule,
    indexed_rows,
    load_rows,
    local_column,
    matmul,
    row_pointer,
    streamed_cosines,
)
from fastmargin.spec import HardRule


@triton.jit(do_not_specialize=["B", "C", "rows_w", "class_start", "tiles_per_split"])
def stats_forward_kernel(
    p_x,  # (B, D) contiguous unit rows
    p_w,  # (rows_w, D) strided centres
    p_index,  # (C,) int64, their rows that are columns of the pass, if INDEXED
    p_inverse,  # (C,) 1 / ||w||
    p_label,  # (B,) int64
    p_threshold,  # (B,) hard rule, if HAS_HARD
    p_rule,  # (3,) its coefficients
    p_sum,  # (splits, B) out: sum of exponentials, relative to 2**shift
    p_shift,  # (splits, B) out, if ONLINE
    p_max,  # (splits, B) out: largest negative cosine
    p_pull,  # (splits, B, D) out: pull numerator times slope_unit, if WANT_PULL
    B,
    C,
    rows_w,
    class_start,
    stride_wc,
    stride_wd,
    tiles_per_split,
    scale,
    slope_unit,
    PACKED: tl.constexpr,
    INDEXED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    RAW: tl.constexpr,
    WANT_PULL: tl.constexpr,
    ONLINE: tl.constexpr,
    HAS_HARD: tl.constexpr,
):
    # weights of the second product that carry 1 / ||w|| are kept in range like large logits are
    RAW_PULL: tl.constexpr = RAW and WANT_PULL
    WHOLE: tl.constexpr = BLOCK_K >= D  # a tile holds whole rows, so w_hat serves both products
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D if WANT_PULL else 1
    i_b = tl.program_id(0) // COLUMNS
    i_d = tl.program_id(0) % COLUMNS
    i_split = tl.program_id(1).to(tl.int64)

    first = i_b.to(tl.int64) * BLOCK_B
    o_b = first + tl.arange(0, BLOCK_B)
    m_b = o_b < B
    p_xb = p_x + first * D
    # rows past B, and labels of other shards, fall in no tile
    b_label = tl.load(p_label + o_b, mask=m_b, other=-1) - class_start
    if HAS_HARD:
        b_threshold = tl.load(p_threshold + o_b, mask=m_b, other=2.0)
    if WHOLE:
        b_x = load_rows(p_xb, m_b, D, 1, 0, D, BLOCK_B, BLOCK_K, True)

    b_sum = tl.zeros([BLOCK_B], tl.float32)
    b_shift = tl.full([BLOCK_B], NO_SHIFT, tl.float32)
    b_max = tl.full([BLOCK_B], float("-inf"), tl.float32)
    if WANT_PULL:
        b_pull = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    scale2 = scale * LOG2E

    i_first = i_split * tiles_per_split
    i_last = tl.minimum(i_first + tiles_per_split, tl.cdiv(C, BLOCK_C))
    for i_c in range(i_first, i_last):
        start = i_c * BLOCK_C
        o_c = start + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        if INDEXED:
            p_wc, m_c = indexed_rows(p_w, p_index, o_c, C, rows_w, stride_wc, D, PACKED)
        else:
            p_wc = row_pointer(p_w, start, stride_wc, D, PACKED)
        b_inverse = tl.load(p_inverse + o_c, mask=m_c, other=0.0)

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
            b_cos = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
            b_cos = matmul(b_x, tl.trans(b_w), b_cos, PRECISION)
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
                False,
            )
        if RAW:
            b_cos *= b_inverse[None, :]

        b_target = local_column(b_label, start, BLOCK_C)
        m_negative = m_c[None, :] & (tl.arange(0, BLOCK_C)[None, :] != b_target[:, None])
        b_max = tl.maximum(b_max, tl.max(tl.where(m_negative, b_cos, float("-inf")), 1))
        b_f = b_cos
        if HAS_HARD:
            b_f, b_slope = hard_rule(b_cos, b_threshold[:, None], p_rule)
        b_z = tl.where(m_negative, scale2 * b_f, float("-inf"))
        if ONLINE:
            b_reach = b_z
            if RAW_PULL:
                b_reach += tl.log2(tl.maximum(b_inverse, 1e-12))[None, :]
            b_top = tl.max(b_reach, 1)
            m_rise = b_top > b_shift + RISE
            b_new = tl.where(m_rise, tl.ceil(b_top) - START, b_shift)
            b_ratio = tl.exp2(b_shift - b_new)
            b_shift = b_new
            b_sum *= b_ratio
            if WANT_PULL:
                b_pull *= b_ratio[:, None]
            b_z -= b_shift[:, None]
        b_e = tl.exp2(b_z)
        b_sum += tl.sum(b_e, 1)
        if WANT_PULL:
            if HAS_HARD:
                b_e *= b_slope * slope_unit
            if RAW:
                b_e *= b_inverse[None, :]
            if not (WHOLE and COLUMNS == 1):
                b_w = centre_rows(
                    p_wc,
                    m_c,
                    b_inverse,
                    stride_wc,
                    stride_wd,
                    i_d * BLOCK_D,
                    D,
                    BLOCK_C,
                    BLOCK_D,
                    PACKED,
                    INDEXED,
                    OPERAND,
                    RAW,
                )
            b_pull = matmul(cast(b_e, OPERAND), b_w, b_pull, PRECISION)

    o_row = i_split * B + o_b
    if i_d == 0:
        tl.store(p_sum + o_row, b_sum, mask=m_b)
        tl.store(p_max + o_row, b_max, mask=m_b)
        if ONLINE:
            tl.store(p_shift + o_row, b_shift, mask=m_b)
    if WANT_PULL:
        o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
        p_first = p_pull + (i_split * B + first) * D
        p_tile = p_first + (tl.arange(0, BLOCK_B)[:, None] * D + o_d[None, :])
        tl.store(p_tile, b_pull, mask=m_b[:, None] & (o_d < D)[None, :])


def constants(
    d: int,
    precision: str,
    packed: bool,
    indexed: bool,
    raw: bool,
    tile: TileConfig,
    want_pull: bool,
    online: bool,
    has_hard: bool,
) -> dict:
    """Compile-time arguments."""
    return {
        "PACKED": packed,
        "INDEXED": indexed,
        "D": d,
        "OPERAND": STREAM_TYPES[precision],
        "PRECISION": DOT_PRECISION[precision],
        "RAW": raw,
        "WANT_PULL": want_pull,
        "ONLINE": online,
        "HAS_HARD": has_hard,
        **tile.arguments(),
    }


def stats_forward(
    x: Tensor,
    weight: Tensor,
    index: Tensor | None,
    inverse: Tensor,
    labels: Tensor,
    scale: float,
    hard: HardRule | None,
    class_start: int,
    precision: str,
    want_pull: bool,
    online: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """What every split of the classes leaves: sums, shifts, maxima, pull numerators.

    Shapes (splits, B) fp32, the last (splits, B, D); without ONLINE no shifts, without
    ``want_pull`` no numerators. Their size depends on B, D and the chip, not on C.

    Args:
        x: (B, D) contiguous unit rows in the operand type.
        weight: (C, D), C > 0.
        index: (K,) contiguous, K > 0, or None.
        inverse: (C,) or (K,) inverse norms of the columns.
        labels: (B,) contiguous, int64.
        scale: s.
        hard: rule for hard negatives, its threshold contiguous and fp32.
        class_start: global id of ``weight[0]``.
        precision: one of "fp32", "tf32", "bf16", "fp16".
        want_pull: also form the pull numerators.
        online: whether the logits need a running shift.
    """
    (b, d), c = x.shape, inverse.shape[0]
    here = chip(x.device)
    kernel = "stats_pull" if want_pull else "stats_sum"
    packed, raw = is_packed(weight), is_raw(weight.dtype, precision)
    tile = choose(kernel, d, precision, raw, packed, index is not None, here.arch)
    columns = triton.cdiv(d, tile.block_d) if want_pull else 1
    row_programs = triton.cdiv(b, tile.block_b) * columns
    splits, per_split = split_classes(row_programs, triton.cdiv(c, tile.block_c), here.processors)
    sums = inverse.new_empty((splits, b))
    maxima = torch.empty_like(sums)
    shifts = torch.empty_like(sums) if online else None
    numerators = inverse.new_empty((splits, b, d)) if want_pull else None
    fixed = constants(
        d,
        precision,
        packed,
        index is not None,
        raw,
        tile,
        want_pull,
        online,
        hard is not None,
    )
    with on_device(x):
        stats_forward_kernel[(row_programs, splits)](
            x,
            weight,
            index,
            inverse,
            labels,
            None if hard is None else hard.threshold,
            None if hard is None else hard.coefficients,
            sums,
            shifts,
            maxima,
            numerators,
            b,
            c,
            weight.shape[0],
            class_start,
            weight.stride(0),
            weight.stride(1),
            per_split,
            float(scale),
            1 / slope_power(hard),
            **fixed,
        )
    return sums, shifts, maxima, numerators
