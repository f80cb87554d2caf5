"""The keyed permutation: what all backends compute bit for bit, and its plain PyTorch form.

Numbers 0 .. side**2 - 1 are pairs (left, right) of digits to the base ``side``, the least square
that holds ``size``. A round adds a keyed hash of one digit to the other, modulo ``side``; rounds
take turns (a Feistel network over Z_side, Black and Rogaway 2002). A result of ``size`` or more is
sent through again until it is smaller, which closes the cycle on range(size); a square wastes so
little that at a million one in five hundred goes twice.

Two distinct numbers go to a uniform pair but for a distance in total variation of about
side**(1 - ROUNDS / 2) with ideal round functions (the chain of pairs, iterated exactly for sides
up to 16): at most 3e-5 from ``LEAST_SIDE`` on, which a hundred million draws do not show.
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
    """(ROUNDS,) numbers of 32 bits, each from all bits of the key (2,)."""
    h = (torch.arange(1, ROUNDS + 1, device=key.device) * GOLDEN) & MASK
    for word in (key[0], key[0] >> 32, key[1], key[1] >> 32):
        h = mix(h ^ (word & MASK))
    return h


def _pass(value: Tensor, round_keys: Tensor, side: int) -> Tensor:
    """Once through the network, a permutation of range(side**2)."""
    left, right = value // side, value % side
    for i in range(ROUNDS):
        if i % 2 == 0:
            left = (left + (mix((right + round_keys[i]) & MASK) * side >> 32)) % side
        else:
            right = (right + (mix((left + round_keys[i]) & MASK) * side >> 32)) % side
    return left * side + right


def permutation(key: Tensor, size: int, count: int) -> Tensor:
    """See :meth:`fastmargin.backends.interface.Backend.permutation`; waits for a GPU."""
    side, round_keys = side_of(size), _round_keys(key)
    value = _pass(torch.arange(count, device=key.device), round_keys, side)
    outside = (value >= size).nonzero()[:, 0]
    while outside.numel():
        value[outside] = _pass(value[outside], round_keys, side)
        outside = outside[value[outside] >= size]
    return value
