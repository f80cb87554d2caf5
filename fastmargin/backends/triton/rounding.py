"""Stochastic rounding to 16 bits: :mod:`fastmargin.rounding` in a kernel, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmargin import rounding
from fastmargin.backends.triton.hashing import GOLDEN, mix
from fastmargin.backends.triton.tile import cast

LEAST_NORMAL: tl.constexpr = tl.constexpr(rounding.LEAST_NORMAL)
STEPS: tl.constexpr = tl.constexpr(rounding.STEPS)
LOW: tl.constexpr = tl.constexpr(2.0**-13)


@triton.jit
def noise(b_row, o_col, key):
    """(ROWS, COLUMNS) uint32 of row numbers, column numbers, and an int32 key."""
    b_first = mix(b_row.to(tl.uint32) ^ key.to(tl.uint32))
    return mix(b_first[:, None] + (o_col.to(tl.uint32) * GOLDEN)[None, :])


@triton.jit
def narrow(b_value, b_noise, TYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """fp32 to a type of 16 bits by the low 16 bits of the noise; else to nearest."""
    if STOCHASTIC and TYPE.primitive_bitwidth == 16:
        b_bits = b_value.to(tl.uint32, bitcast=True)
        b_low = b_noise & 0xFFFF
        if TYPE == tl.bfloat16:
            b_found = ((b_bits + b_low) & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            b_low = b_low >> 3
            b_found = ((b_bits + b_low) & 0xFFFFE000).to(tl.float32, bitcast=True)
            b_small = tl.abs(b_value) * STEPS + b_low.to(tl.float32) * LOW
            b_small = tl.floor(b_small) * (1 / STEPS)
            b_sign = b_bits & 0x80000000
            b_small = (b_small.to(tl.uint32, bitcast=True) | b_sign).to(tl.float32, bitcast=True)
            b_found = tl.where(tl.abs(b_value) < LEAST_NORMAL, b_small, b_found)
        # infinite ones and NaN have no neighbour
        b_value = tl.where((b_bits & 0x7F800000) == 0x7F800000, b_value, b_found)
    return cast(b_value, TYPE)
