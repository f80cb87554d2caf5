"""A kernel that rounds, for tests to compare with PyTorch; imported where Triton is there."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmargin.backends.triton.rounding import narrow, noise


@triton.jit
def round_kernel(p_value, p_out, p_noise, first_row, key, ROWS: tl.constexpr, D: tl.constexpr):
    """One program: rows ``first_row`` onwards (ROWS, D) to the type of ``p_out``."""
    o_row, o_d = tl.arange(0, ROWS), tl.arange(0, D)
    b_noise = noise(first_row + o_row, o_d, key)
    o_tile = o_row[:, None] * D + o_d[None, :]
    tl.store(p_noise + o_tile, b_noise.to(tl.int32, bitcast=True))
    b_value = tl.load(p_value + o_tile)
    tl.store(p_out + o_tile, narrow(b_value, b_noise, p_out.dtype.element_ty, True))
