"""A bijective 32-bit hash: :mod:`fastmargin.hashing` in a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmargin import hashing

SHIFT_1: tl.constexpr = tl.constexpr(hashing.SHIFTS[0])
SHIFT_2: tl.constexpr = tl.constexpr(hashing.SHIFTS[1])
SHIFT_3: tl.constexpr = tl.constexpr(hashing.SHIFTS[2])
FACTOR_1: tl.constexpr = tl.constexpr(hashing.FACTORS[0])
FACTOR_2: tl.constexpr = tl.constexpr(hashing.FACTORS[1])
GOLDEN: tl.constexpr = tl.constexpr(hashing.GOLDEN)
MASK: tl.constexpr = tl.constexpr(hashing.MASK)


@triton.jit
def mix(b_h):
    """Of uint32 numbers."""
    b_h = b_h ^ (b_h >> SHIFT_1)
    b_h = b_h * FACTOR_1
    b_h = b_h ^ (b_h >> SHIFT_2)
    b_h = b_h * FACTOR_2
    return b_h ^ (b_h >> SHIFT_3)
