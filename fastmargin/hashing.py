"""A bijective hash of 32 bits: Chris Wellons' "lowbias32" (public domain).

See https://github.com/skeeto/hash-prospector; ``backends/triton/hashing.py`` is the same.
"""

from __future__ import annotations

from torch import Tensor

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
"""2**32 divided by the golden ratio, odd: its multiples are well spread."""
SHIFTS = (16, 15, 16)
FACTORS = (0x7FEB352D, 0x846CA68B)


def mix(h):
    """Hashes 32-bit numbers, given as an int64 tensor or a Python integer."""
    h = h ^ (h >> SHIFTS[0])
    h = (h * FACTORS[0]) & MASK
    h = h ^ (h >> SHIFTS[1])
    # minus 2**32: the same low 32 bits, and the product fits in int64
    h = (h * (FACTORS[1] - 2**32)) & MASK
    return h ^ (h >> SHIFTS[2])


def mix_(h: Tensor) -> Tensor:
    """:func:`mix` in place for int32, where products wrap around and shifts are made logical."""
    for shift, factor in zip(SHIFTS, (*FACTORS, None), strict=True):
        h ^= (h >> shift) & (MASK >> shift)
        if factor is not None:
            h *= as_int32(factor)
    return h


def as_int32(number: int) -> int:
    """The same 32 bits as a signed number."""
    return number - (1 << 32) if number >> 31 else number
