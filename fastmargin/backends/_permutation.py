"""The keyed permutation, bit-identical on all backends, in plain PyTorch.

Numbers 0 .. side**2 - 1 are pairs (left, right) of digits in base ``side``, with side**2 the least
square of at least ``size`` (but ``LEAST_SIDE`` squared). A round adds a keyed hash of one digit to
the other, modulo ``side``, in alternation (a Feistel network over Z_side, Black and Rogaway 2002).
Results of ``size`` or more are permuted again until they are smaller (cycle walking), which gives
a permutation of range(size); at a million, one number in five hundred needs a second pass.

With ideal round functions two distinct numbers map to a uniform pair, up to a total variation
distance of about side**(1 - ROUNDS / 2) (the chain of pairs, iterated exactly for sides up to 16):
at most 3e-5 from ``LEAST_SIDE`` on, undetectable in a hundred million draws.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmargin.hashing import GOLDEN, MASK, mix

ROUNDS = 12
LEAST_SIDE = 8


def side_of(size: int) -> int:
    """The base of the two digits."""
    return max(LEAST_SIDE, math.isqrt(max(size, 1) - 1) + 1)


def _round_keys(key: Tensor) -> Tensor:
    """(ROUNDS,) 32-bit keys, each from all bits of the key (2,) int64."""
    h = (torch.arange(1, ROUNDS + 1, device=key.device) * GOLDEN) & MASK
    for word in (key[0], key[0] >> 32, key[1], key[1] >> 32):
        h = mix(h ^ (word & MASK))
    return h


def _pass(value: Tensor, round_keys: Tensor, side: int) -> Tensor:
    """One pass through the network, a permutation of range(side**2)."""
    left, right = value // side, value % side
    for i in range(ROUNDS):
        if i % 2 == 0:
            left = (left + (mix((right + round_keys[i]) & MASK) * side >> 32)) % side
        else:
            right = (right + (mix((left + round_keys[i]) & MASK) * side >> 32)) % side
    return left * side + right


def permutation(key: Tensor, size: int, count: int) -> Tensor:
    """See :meth:`fastmargin.backends.interface.Backend.permutation`; synchronises with a GPU."""
    side, round_keys = side_of(size), _round_keys(key)
    value = _pass(torch.arange(count, device=key.device), round_keys, side)
    outside = (value >= size).nonzero()[:, 0]
    while outside.numel():
        value[outside] = _pass(value[outside], round_keys, side)
        outside = outside[value[outside] >= size]
    return value
