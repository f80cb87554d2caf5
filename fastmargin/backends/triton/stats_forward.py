"""The forward pass: sums of exponentials and, if wanted, the pull, in one stream over W.

A program owns BLOCK_B rows, BLOCK_D columns of the pull and one split of the classes. For each
tile of centres it forms the cosines, their exponentials ``e`` and adds ``e @ w_hat`` to an
accumulator that never leaves the registers: attention with K = V = w_hat. Programs do not
communicate, so the order of the sums is fixed and results are deterministic.

With ONLINE each row's exponentials are relative to 2**shift, a running power of two; without,
bounded logits need none (``|s * f| + log C <= 85`` keeps the sums within fp32).
"""

from __future__ import annotations

from collections.abc import Iterable

import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.centres import Centres, blocks_of
from fastmargin.backends.triton.configs import (
    DOT_PRECISION,
    TileConfig,
    choose,
    slope_power,
    split_classes,
)
from fastmargin.backends.triton.launch import chip, on_device
from fastmargin.backends.triton.stats_merge import Partials, stats_merge
from fastmargin.backends.triton.tile import (
    LOG2E,
    NO_SHIFT,
    RISE,
    START,
    cosines,
    first_product,
    folded_max,
    folded_sum,
    hard_rule,
    local_columns,
    matmul,
    operand,
    runs_ahead,
)
from fastmargin.spec import HardRule

MOST_ROW_PROGRAMS = 65535
"""CUDA's limit for the second grid axis. Rows along the first one would cost a register."""


@triton.jit
def _any_rises(b_rise, LAZY: tl.constexpr):
    """Whether the shift of any row of the tile has to move; not LAZY: it is always worked out."""
    if LAZY:
        return tl.max(tl.ravel(b_rise, can_reorder=True), 0) > RISE
    else:
        return True


@triton.jit(do_not_specialize=["B", "C", "class_start", "tiles_per_split"])
def stats_forward_kernel(
    d_x,  # (B, D') unit rows, in blocks of (BLOCK_B, BLOCK_K)
    d_w,  # (C, D') unit centres, in blocks of (BLOCK_C, BLOCK_K)
    d_w_pull,  # the same in blocks of (BLOCK_C, BLOCK_D), if WANT_PULL
    p_inverse,  # (C,) below 0 at an empty place, if GAPS
    p_label,  # (B,) int64
    p_threshold,  # (B,) hard rule, if HAS_HARD
    p_rule,  # (3,) its coefficients
    p_sum,  # (splits, B) out: sum of exponentials, relative to 2**shift
    p_shift,  # (splits, B) out, if ONLINE
    p_max,  # (splits, B) out: largest negative cosine
    p_pull,  # (splits, B, D) out: pull numerator times slope_unit, if WANT_PULL
    B,
    C,
    class_start,
    tiles_per_split,
    scale2,  # s log2(e)
    slope_unit,
    GAPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WANT_PULL: tl.constexpr,
    ONLINE: tl.constexpr,
    HAS_HARD: tl.constexpr,
    LAZY: tl.constexpr,
    AHEAD: tl.constexpr,
):
    WHOLE: tl.constexpr = BLOCK_K >= D  # a block holds whole rows, so it may serve both products
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D if WANT_PULL else 1
    i_split = tl.program_id(0)
    i_b = tl.program_id(1) // COLUMNS
    i_d = tl.program_id(1) % COLUMNS

    first = i_b * BLOCK_B
    o_b = first + tl.arange(0, BLOCK_B)
    m_b = o_b < B
    # rows past B, and labels of other shards, fall in no tile
    b_column = local_columns(p_label, o_b, m_b, class_start, C)
    if HAS_HARD:
        b_threshold = tl.load(p_threshold + o_b, mask=m_b, other=2.0)
    if WHOLE:
        b_x = d_x.load([first, 0])

    b_shift = tl.full([BLOCK_B], NO_SHIFT, tl.float32)
    # of a row in parts, as its threads have them, until after the last tile
    b_sum = tl.zeros([BLOCK_B, 2, 4], tl.float32)
    b_max = tl.full([BLOCK_B, 2, 4], float("-inf"), tl.float32)
    if WANT_PULL:
        b_pull = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)

    i_first = i_split * tiles_per_split
    i_last = tl.minimum(i_first + tiles_per_split, tl.cdiv(C, BLOCK_C))
    for i_c in tl.range(i_first, i_last, num_stages=AHEAD):
        start = i_c * BLOCK_C
        if WHOLE:
            b_w = d_w.load([start, 0])
        if runs_ahead(i_c < i_last, AHEAD):
            o_c = start + tl.arange(0, BLOCK_C)
            if WHOLE:
                b_cos = first_product(b_x, tl.trans(b_w), C, BLOCK_B, BLOCK_C, PRECISION)
            else:
                b_cos = cosines(d_x, d_w, first, start, D, BLOCK_B, BLOCK_C, BLOCK_K, PRECISION)
            b_cos = tl.where(o_c[None, :] != b_column[:, None], b_cos, float("-inf"))
            if GAPS:
                m_c = tl.load(p_inverse + o_c, mask=o_c < C, other=0.0) >= 0
                b_cos = tl.where(m_c[None, :], b_cos, float("-inf"))
            if start + BLOCK_C > C:
                b_cos = tl.where((o_c < C)[None, :], b_cos, float("-inf"))
            b_max = tl.maximum(b_max, folded_max(b_cos, BLOCK_B, BLOCK_C))
            b_z = scale2 * b_cos
            if HAS_HARD:
                b_f, b_slope = hard_rule(b_cos, b_threshold[:, None], p_rule)
                b_z = scale2 * b_f
            if ONLINE:
                b_rise = b_z - b_shift[:, None]
                if _any_rises(b_rise, LAZY):
                    b_top = tl.max(b_z, 1)
                    b_risen = tl.where(b_top > b_shift + RISE, tl.ceil(b_top) - START, b_shift)
                    b_ratio = tl.exp2(b_shift - b_risen)
                    b_shift = b_risen
                    b_sum *= b_ratio[:, None, None]
                    if WANT_PULL:
                        b_pull *= b_ratio[:, None]
                    b_rise = b_z - b_shift[:, None]
                b_z = b_rise
            b_e = tl.exp2(b_z)
            b_sum += folded_sum(b_e, BLOCK_B, BLOCK_C)
            if WANT_PULL:
                if HAS_HARD:
                    b_e *= b_slope * slope_unit
                if WHOLE and COLUMNS == 1:
                    b_pull = matmul(operand(b_e, d_w.dtype, PRECISION), b_w, b_pull, PRECISION)
                else:
                    b_part = d_w_pull.load([start, i_d * BLOCK_D])
                    b_pull = matmul(operand(b_e, d_w.dtype, PRECISION), b_part, b_pull, PRECISION)

    o_row = i_split.to(tl.int64) * B + o_b
    if WANT_PULL:
        o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
        p_first = p_pull + (i_split.to(tl.int64) * B + first) * D
        p_tile = p_first + (tl.arange(0, BLOCK_B)[:, None] * D + o_d[None, :])
        tl.store(p_tile, b_pull, mask=m_b[:, None] & (o_d < D)[None, :])
    if i_d == 0:
        tl.store(p_sum + o_row, tl.sum(tl.sum(b_sum, 2), 1), mask=m_b)
        tl.store(p_max + o_row, tl.max(tl.max(b_max, 2), 1), mask=m_b)
        if ONLINE:
            tl.store(p_shift + o_row, b_shift, mask=m_b)


def constants(
    d: int,
    precision: str,
    gaps: bool,
    tile: TileConfig,
    want_pull: bool,
    online: bool,
    has_hard: bool,
    arch: int,
) -> dict:
    """Compile-time arguments."""
    return {
        # The branch takes registers, as a rule and a mask of empty places do, and, before sm_90,
        # pointers of tiles. Without a pull it saves nothing.
        "LAZY": want_pull and not (has_hard or gaps or 80 <= arch < 90),
        "AHEAD": tile.num_stages if arch == 90 and want_pull else None,
        "GAPS": gaps,
        "D": d,
        "PRECISION": DOT_PRECISION[precision],
        "WANT_PULL": want_pull,
        "ONLINE": online,
        "HAS_HARD": has_hard,
        **tile.arguments(),
    }


def stats_forward(
    x: Tensor,
    d: int,
    centres: Iterable[Centres],
    columns: int,
    labels: Tensor,
    scale: float,
    hard: HardRule | None,
    class_start: int,
    precision: str,
    want_pull: bool,
    online: bool,
) -> tuple[Partials, Centres]:
    """Partial sums over the splits of the classes, and the last piece of ``centres``.

    Args:
        x: (B, D') unit rows in the operand type.
        d: D.
        centres: all columns, piece by piece.
        columns: their number, at least 1.
        labels: (B,) contiguous, int64.
        scale: s.
        hard: rule for hard negatives, its threshold contiguous and fp32.
        class_start: global id of the first column.
        precision: one of "fp32", "tf32", "bf16", "fp16".
        want_pull: also compute the pull's numerators.
        online: whether the logits need a running shift.
    """
    b = x.shape[0]
    here = chip(x.device)
    kernel = "stats_pull" if want_pull else "stats_sum"
    partials = None
    for part in centres:
        n = part.inverse.shape[0]
        if partials is None:
            crowded = hard is not None or (want_pull and part.gaps)
            tile = choose(kernel, d, precision, here.arch, crowded)
            row_programs = triton.cdiv(b, tile.block_b)
            if want_pull:
                row_programs *= triton.cdiv(d, tile.block_d)
            if row_programs > MOST_ROW_PROGRAMS:
                raise ValueError(
                    f"x has too many rows for one pass ({b}), want at most"
                    f" {MOST_ROW_PROGRAMS * b // row_programs} of {d} columns; split the batch"
                )
        tiles = triton.cdiv(n, tile.block_c)
        if partials is None:
            splits = split_classes(row_programs, tiles, here.processors)
            # where there are more columns, the first one sums up what has been
            several = int(n < columns)
            partials = Partials.empty(splits + several, b, d, x.device, want_pull, online)
        new = partials.since(several)
        fixed = constants(
            d,
            precision,
            part.gaps,
            tile,
            want_pull,
            online,
            hard is not None,
            here.arch,
        )
        with on_device(x):
            stats_forward_kernel[(splits, row_programs)](
                blocks_of(x, tile.block_b, tile.block_k),
                blocks_of(part.operand, tile.block_c, tile.block_k),
                blocks_of(part.operand, tile.block_c, tile.block_d) if want_pull else None,
                part.inverse,
                labels,
                None if hard is None else hard.threshold,
                None if hard is None else hard.coefficients,
                new.sums,
                new.shifts,
                new.maxima,
                new.numerators,
                b,
                n,
                class_start + part.start,
                triton.cdiv(tiles, splits),
                scale * LOG2E.value,
                1 / slope_power(hard),
                **fixed,
            )
        if part.start + n < columns:
            stats_merge(new if part.start == 0 else partials, partials)
    return partials, part
