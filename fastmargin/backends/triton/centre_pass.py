"""The centre pass: gradient of the centres, through the normalisation; optionally their update.

A program owns BLOCK_C centres and BLOCK_D columns of their gradient, loops over the batch,
recomputes ``p = exp(s * f - lse)`` (at most 1, since lse is known) and adds ``g @ x_hat`` to an
accumulator in registers. The normalisation removes the component of that sum along the centre: by
a product with the centre if a program has whole rows, else from ``sum_i g_ij c_ij``, accumulated.

The gradient of a row's own centre is not part of that product: late in training it dominates and
must not be rounded to an operand. It comes in fp32 from ``own_rows.py`` and is added to the
finished tile, which an epilogue (``epilogues.py``) then stores or applies.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton import epilogues
from fastmargin.backends.triton.centre_finish import along_centres, finish
from fastmargin.backends.triton.centres import Centres, blocks_of
from fastmargin.backends.triton.compact import compact
from fastmargin.backends.triton.configs import (
    DOT_PRECISION,
    OPERAND_DTYPES,
    TileConfig,
    choose,
    is_packed,
    operand_width,
    slope_power,
)
from fastmargin.backends.triton.launch import chip, on_device
from fastmargin.backends.triton.own_rows import NO_ROW, OwnRows
from fastmargin.backends.triton.tile import (
    LOG2E,
    cosines,
    first_product,
    hard_rule,
    indexed_rows,
    matmul,
    operand,
    row_pointer,
    runs_ahead,
)
from fastmargin.spec import GradientFactors, SgdUpdate

SCANNED_AT_ONCE: tl.constexpr = tl.constexpr(1024)
FINISHED_AT_ONCE = 32


@triton.jit
def _largest(p_values, count, BLOCK: tl.constexpr):
    """Largest magnitude of ``count`` numbers."""
    b_top = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        o_b = start + tl.arange(0, BLOCK)
        b_top = tl.maximum(b_top, tl.abs(tl.load(p_values + o_b, mask=o_b < count, other=0.0)))
    return tl.max(b_top, 0)


@triton.jit
def _own_slots(p_code, count, o_column, BLOCK: tl.constexpr):
    """For columns the first row that has each as its own; NO_ROW without one."""
    b_slot = tl.zeros_like(o_column) + NO_ROW
    for start in range(0, count, BLOCK):
        o_b = start + tl.arange(0, BLOCK)
        b_code = tl.load(p_code + o_b, mask=o_b < count, other=-2)
        m_own = o_column[:, None] == (b_code >> 1)[None, :]
        b_slot = tl.minimum(b_slot, tl.min(tl.where(m_own, o_b[None, :], NO_ROW), 1))
    return b_slot


@triton.jit(do_not_specialize=["B", "B_own", "C", "rows_w", "column_start", "key"])
def centre_pass_kernel(
    d_x,  # (B, D') unit rows in the operand type, in blocks of (BLOCK_B, BLOCK_K)
    d_x_grad,  # the same in blocks of (BLOCK_B, BLOCK_D)
    d_w,  # (C, D') unit centres, in blocks of (BLOCK_C, BLOCK_K)
    p_inverse,  # (C,) 1 / ||w||; below 0 at an empty place
    p_level,  # (B',) of own_rows.py
    p_code,  # (B',) int32, of own_rows.py
    p_lse,  # (B,) lse_neg, if HAS_HARD
    p_threshold,  # (B,) hard rule, if HAS_HARD
    p_rule,  # (3,) its coefficients
    p_count,  # (1,) int32 number of rows above that take part, the first ones, if COUNTED
    p_d_lse,  # (B_own,) upstream gradient of lse_neg, of all rows
    p_own_code,  # (B_own',) int32, of all rows
    p_own,  # (B_own, D) of own_rows.py
    p_unit,  # (C, D') contiguous, what d_w copies from
    p_w,  # (rows_w, D) contiguous centres as they are, if IN_PLACE
    p_index,  # (C,) int64, their rows that are columns of the pass, if INDEXED
    p_out,  # (C, D) contiguous, in the order of the columns, if not IN_PLACE
    p_state,  # (rows_w, D) contiguous, if IN_PLACE; p_w again, if the epilogue has no state
    B,
    B_own,
    C,
    rows_w,
    column_start,
    scale2,  # s log2(e)
    slope_limit,  # of s f(c)
    rate,
    momentum,
    decay,
    key,  # int32, of the rounding, if STOCHASTIC
    INDEXED: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,  # D'
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FINISHED: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_HARD: tl.constexpr,
    COUNTED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    AHEAD: tl.constexpr,
):
    if COUNTED:
        B = tl.load(p_count)
    WHOLE: tl.constexpr = BLOCK_K >= D
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    RAGGED: tl.constexpr = D % BLOCK_D != 0  # where it is not, D' is D
    start = tl.program_id(0) // COLUMNS * BLOCK_C
    i_d = tl.program_id(0) % COLUMNS
    o_c = start + tl.arange(0, BLOCK_C)
    if WHOLE:
        b_w = d_w.load([start, 0])

    # fp16 holds gradients of one power of two of the largest; 2**-39 of it still counts
    power = 0.0
    if SCALED:
        top = _largest(p_d_lse, B_own, SCANNED_AT_ONCE) * slope_limit
        power = tl.floor(14.0 - tl.log2(tl.where(top > 0, top, 1.0)))
        power = tl.minimum(tl.maximum(power, -100.0), 100.0)

    b_slot = _own_slots(p_own_code, B_own, column_start + o_c, 128)
    b_grad = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    if COLUMNS > 1:
        b_radial = tl.zeros([BLOCK_C], tl.float32)
    o_column = column_start + o_c
    for first in tl.range(0, B, BLOCK_B, num_stages=AHEAD):
        if WHOLE:
            b_x = d_x.load([first, 0])
        if runs_ahead(first < B, AHEAD):
            o_b = first + tl.arange(0, BLOCK_B)
            if WHOLE:
                b_cos = first_product(b_w, tl.trans(b_x), C, BLOCK_C, BLOCK_B, PRECISION)
            else:
                b_cos = cosines(d_w, d_x, start, first, D, BLOCK_C, BLOCK_B, BLOCK_K, PRECISION)

            b_level = tl.load(p_level + o_b) - power
            b_code = tl.load(p_code + o_b)
            b_f = b_cos
            if HAS_HARD:
                m_b = o_b < B
                b_threshold = tl.load(p_threshold + o_b, mask=m_b, other=2.0)
                b_f, b_slope = hard_rule(b_cos, b_threshold[None, :], p_rule)
            b_z = scale2 * b_f - b_level[None, :]
            b_z = tl.where(o_column[:, None] == (b_code >> 1)[None, :], float("-inf"), b_z)
            if HAS_HARD:
                # rounding may put a cosine on the other side of its threshold than in the forward
                # pass, and its exponential above the sum of all
                b_lse = tl.load(p_lse + o_b, mask=m_b, other=0.0)
                b_most = tl.where(b_lse == float("-inf"), 0.0, b_lse * LOG2E) - b_level
                b_z = tl.minimum(b_z, b_most[None, :], propagate_nan=tl.PropagateNan.ALL)
            b_g = tl.exp2(b_z)
            b_g = tl.where((b_code & 1)[None, :] == 1, -b_g, b_g)
            if HAS_HARD:
                b_g *= b_slope
            b_half = operand(b_g, d_x.dtype, PRECISION)
            if COLUMNS > 1:  # of the rounded gradients, so that it matches what the product sums up
                b_radial += tl.sum(b_half.to(tl.float32) * b_cos, 1)
            if WHOLE and COLUMNS == 1:
                b_grad = matmul(b_half, b_x, b_grad, PRECISION)
            else:
                b_part = d_x_grad.load([first, i_d * BLOCK_D])
                b_grad = matmul(b_half, b_part, b_grad, PRECISION)

    m_c = o_c < C
    b_inverse = tl.load(p_inverse + o_c, mask=m_c, other=0.0)
    b_row = column_start + o_c
    m_out = m_c
    if INDEXED:
        m_c = m_c & (b_inverse >= 0)
        if STOCHASTIC:
            b_row = tl.load(p_index + o_c, mask=m_c, other=0)
    centre = p_w
    if IN_PLACE:
        if INDEXED:
            centre, m_out = indexed_rows(p_w, p_index, o_c, C, rows_w, D, D, True)
            p_state, _ = indexed_rows(p_state, p_index, o_c, C, rows_w, D, D, True)
        else:
            centre = row_pointer(p_w, start.to(tl.int64), D, D, True)
            p_state = row_pointer(p_state, start.to(tl.int64), D, D, True)
        p_out = centre
    else:
        p_out = row_pointer(p_out, start.to(tl.int64), D, D, True)
        p_state = p_out
    unit = (p_unit + start.to(tl.int64) * WIDE, m_c)
    if COLUMNS == 1:
        b_radial = along_centres(b_grad, unit, 0, WIDE, BLOCK_C, BLOCK_D, FINISHED, RAGGED)
    else:
        # Nothing is added. As threads have it from the loop, everything to come would be laid out
        # like that, and the gradient twice.
        b_radial = tl.sum(tl.join(b_radial, tl.zeros_like(b_radial)), 1)
    finish(
        b_grad,
        b_radial,
        tl.maximum(b_inverse, 0.0) * tl.exp2(-power),
        unit,
        centre,
        (p_out, p_state, m_out),
        (p_own, b_slot),
        (rate, momentum, decay),
        (b_row, key),
        i_d * BLOCK_D,
        D,
        WIDE,
        BLOCK_C,
        BLOCK_D,
        FINISHED,
        INDEXED,
        RAGGED,
        IN_PLACE,
        EPILOGUE,
        STOCHASTIC,
    )


def constants(
    d: int,
    precision: str,
    indexed: bool,
    tile: TileConfig,
    has_hard: bool,
    counted: bool,
    epilogue: triton.JITFunction,
    stochastic: bool,
    arch: int,
) -> dict:
    """Compile-time arguments."""
    return {
        "INDEXED": indexed,
        "D": d,
        "WIDE": operand_width(d, OPERAND_DTYPES[precision]),
        "FINISHED": min(tile.block_d, FINISHED_AT_ONCE),
        "PRECISION": DOT_PRECISION[precision],
        "SCALED": precision == "fp16",
        "HAS_HARD": has_hard,
        "COUNTED": counted,
        "IN_PLACE": epilogue is not epilogues.store_gradient,
        "EPILOGUE": epilogue,
        "STOCHASTIC": stochastic,
        "AHEAD": tile.num_stages if arch == 90 else None,
        **tile.arguments(),
    }


def steps_in_place(weight: Tensor, momentum: Tensor | None) -> bool:
    """Whether the pass can update the centres: they and their state must be packed."""
    return is_packed(weight) and (momentum is None or is_packed(momentum))


def centre_pass(
    weight: Tensor,
    part: GradientFactors,
    rows: OwnRows,
    x: Tensor,
    centres: Iterable[Centres],
    update: SgdUpdate | None = None,
    momentum: Tensor | None = None,
) -> Tensor | None:
    """Gradient (C, D) of ``weight``, or (K, D) of its rows in the index: contiguous, in its dtype.

    None with an ``update``: these rows of ``weight`` and ``momentum`` are updated in place instead.

    Args:
        weight: (C, D).
        part: tensors contiguous, float ones fp32; precision not "auto".
        rows: see :class:`OwnRows`.
        x: (B, D') unit rows in the operand type.
        centres: the columns of the pass, in pieces.
        update: only if :func:`steps_in_place`.
        momentum: its buffer, or None.
    """
    index, hard, d = part.index, part.hard, weight.shape[1]
    columns = weight.shape[0] if index is None else index.shape[0]
    out, epilogue = None, epilogues.of(update)
    key = None if update is None else update.rounding
    if update is None:
        out = torch.empty((columns, d), dtype=weight.dtype, device=weight.device)
    count, level, code = None, rows.level, rows.code
    lse, threshold = (None, None) if hard is None else (part.lse_neg, hard.threshold)
    if part.skip_zero_rows:
        count, level, code, lse, threshold, x = compact(level, code, lse, threshold, x)
    arch = chip(weight.device).arch
    crowded = hard is not None or (update is not None and update.nesterov)
    tile = choose("centre_pass", d, part.precision, arch, crowded)
    for piece in centres:
        n, stop = piece.inverse.shape[0], piece.start + piece.inverse.shape[0]
        fixed = constants(
            d,
            part.precision,
            index is not None,
            tile,
            hard is not None,
            part.skip_zero_rows,
            epilogue,
            key is not None,
            arch,
        )
        rows_of = slice(piece.start, stop) if index is None else slice(None)
        here = state = result = None
        if out is not None:
            result = out[piece.start : stop]
        else:
            here = weight[rows_of]
            state = here if momentum is None else momentum[rows_of]
        with on_device(weight):
            centre_pass_kernel[(triton.cdiv(n, tile.block_c) * triton.cdiv(d, tile.block_d),)](
                blocks_of(x, tile.block_b, tile.block_k),
                blocks_of(x, tile.block_b, tile.block_d),
                blocks_of(piece.operand, tile.block_c, tile.block_k),
                piece.inverse,
                level,
                code,
                lse,
                threshold,
                None if hard is None else hard.coefficients,
                count,
                part.d_lse,
                rows.code,
                rows.own,
                piece.operand,
                here,
                None if index is None else index[piece.start : stop],
                result,
                state,
                x.shape[0],
                x.shape[0],
                n,
                0 if here is None else here.shape[0],
                piece.start,
                part.scale * LOG2E.value,
                part.scale * slope_power(hard),
                *epilogues.numbers(update),
                key or 0,
                **fixed,
            )
    return out
