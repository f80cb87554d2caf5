"""A bijective hash of 32 bits: Chris Wellons' "lowbias32" (public domain).

See https://github.com/skeeto/hash-prospector; ``backends/triton/hashing.py`` is the same.
"""

from __future__ import annotations

from torch import Tensor

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
"""Odd and without pattern: multiples of it are far apart."""
SHIFTS = (16, 15, 16)
FACTORS = (0x7FEB352D, 0x846CA68B)


def mix(h):
    """Of 32-bit numbers, held in int64 or in a Python integer."""
    h = h ^ (h >> SHIFTS[0])
    h = (h * FACTORS[0]) & MASK
    h = h ^ (h >> SHIFTS[1])
    # less 2**32: the same 32 bits, and the product stays inside int64
    h = (h * (FACTORS[1] - 2**32)) & MASK
    return h ^ (h >> SHIFTS[2])


def mix_(h: Tensor) -> Tensor:
    """:func:`mix` of int32 in place: products wrap around, and shifts are made logical."""
    for shift, factor in zip(SHIFTS, (*FACTORS, None), strict=True):
        h ^= (h >> shift) & (MASK >> shift)
        if factor is not None:
            h *= as_int32(factor)
    return h


def as_int32(number: int) -> int:
    """The same 32 bits with a sign."""
    return number - (1 << 32) if number >> 31 else number
