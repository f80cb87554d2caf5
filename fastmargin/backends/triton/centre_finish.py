"""The end of the centre pass: applies the derivative of the normalisation to a gradient tile.

A few columns at a time, since tiles of centres and optimiser state beside the whole gradient would
not fit the registers. The component along the centre is computed with the unit rows used in the
products, which are contiguous whatever the layout of the weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmargin.backends.triton.own_rows import NO_ROW
from fastmargin.backends.triton.rounding import noise
from fastmargin.backends.triton.tile import halves, load_rows, row_tile


@triton.jit
def along_centres(
    b_grad,
    unit,
    start,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MOST: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """(ROWS,) products of the gradient and the unit centres, MOST columns at a time."""
    if WIDTH > MOST:
        HALF: tl.constexpr = WIDTH // 2
        b_left, b_right = halves(b_grad, ROWS, HALF)
        b_sum = along_centres(b_left, unit, start, WIDE, ROWS, HALF, MOST, RAGGED)
        b_sum += along_centres(b_right, unit, start + HALF, WIDE, ROWS, HALF, MOST, RAGGED)
        return b_sum
    else:
        p_unit, m_c = unit
        b_unit = load_rows(p_unit, m_c, 0, 0, start, WIDE, ROWS, WIDTH, True, False, RAGGED)
        return tl.sum(b_grad * b_unit.to(tl.float32), 1)


@triton.jit
def finish(
    b_grad,
    b_radial,
    b_factor,
    unit,
    centre,
    out,
    own,
    numbers,
    place,
    start,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MOST: tl.constexpr,
    INDEXED: tl.constexpr,
    RAGGED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """``(b_grad - b_radial w_hat) b_factor``, own rows added, to the epilogue, MOST at a time."""
    if WIDTH > MOST:
        HALF: tl.constexpr = WIDTH // 2
        b_left, b_right = halves(b_grad, ROWS, HALF)
        finish(
            b_left,
            b_radial,
            b_factor,
            unit,
            centre,
            out,
            own,
            numbers,
            place,
            start,
            D,
            WIDE,
            ROWS,
            HALF,
            MOST,
            INDEXED,
            RAGGED,
            IN_PLACE,
            EPILOGUE,
            STOCHASTIC,
        )
        finish(
            b_right,
            b_radial,
            b_factor,
            unit,
            centre,
            out,
            own,
            numbers,
            place,
            start + HALF,
            D,
            WIDE,
            ROWS,
            HALF,
            MOST,
            INDEXED,
            RAGGED,
            IN_PLACE,
            EPILOGUE,
            STOCHASTIC,
        )
    else:
        p_unit, m_c = unit
        p_own, b_slot = own
        rate, momentum, decay = numbers
        b_row, key = place
        p_out, p_state, m_out = out
        o_d = start + tl.arange(0, WIDTH)
        m_d = o_d < D
        m_own = b_slot < NO_ROW
        p_own_tile = p_own + tl.where(m_own, b_slot, 0).to(tl.int64)[:, None] * D + o_d[None, :]
        b_own = tl.load(p_own_tile, mask=m_own[:, None] & m_d[None, :], other=0.0)
        b_unit = load_rows(p_unit, m_c, 0, 0, start, WIDE, ROWS, WIDTH, True, False, RAGGED)
        b_unit = b_unit.to(tl.float32)
        b_grad = (b_grad - b_radial[:, None] * b_unit) * b_factor[:, None] + b_own
        if INDEXED:  # the exponentials of an empty place have no bound
            b_grad = tl.where(m_c[:, None], b_grad, 0.0)
        b_w = b_unit
        if IN_PLACE:
            b_w = load_rows(centre, m_out, 0, 0, start, D, ROWS, WIDTH, True, INDEXED, RAGGED)
            b_w = b_w.to(tl.float32)
        p_out_tile = row_tile(p_out, 0, 0, start, D, ROWS, WIDTH, True, INDEXED and IN_PLACE)
        p_state_tile = row_tile(p_state, 0, 0, start, D, ROWS, WIDTH, True, INDEXED and IN_PLACE)
        m_tile = m_out[:, None] & m_d[None, :]
        b_noise = 0
        if STOCHASTIC:
            b_noise = noise(b_row, o_d, key)
        EPILOGUE(
            b_w,
            b_grad,
            p_out_tile,
            p_state_tile,
            m_tile,
            rate,
            momentum,
            decay,
            b_noise,
            STOCHASTIC,
        )
