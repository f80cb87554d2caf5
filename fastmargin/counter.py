"""Random numbers that follow from a key: every process that has the key draws the same ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014), whose arithmetic wraps around as int64 does
GOLDEN_GAMMA = -7046029254386353131
MULTIPLIERS = (-4658895280553007687, -7723592293110705685)
SHIFTS = (30, 27, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        x = (x ^ _shift(x, shift)) * multiplier
    return x ^ _shift(x, SHIFTS[2])


def row_normals(seed: Tensor, step: Tensor, labels: Tensor, place: int = 0) -> Tensor:
    """:func:`counter_normal` for every row of a batch, labels (B,) int64: (B,) float32.

    The number of a row is how many rows with a class there are up to it, itself included. So rows
    without one, label < 0, do not change what the others draw; what they get is not to be used.
    """
    return counter_normal(seed, step, (labels >= 0).cumsum(0), place)


def counter_normal(seed: Tensor, step: Tensor, number: Tensor, place: int = 0) -> Tensor:
    """(n,) float32, standard normal: the draws ``number`` (n,) int64 of a step at a place.

    seed, step: (1,) int64, the second how many steps came before. On their device, without waiting
    for it; a replayed CUDA graph whose step has advanced draws anew.
    """
    stream = _mix(_mix(_mix(seed + GOLDEN_GAMMA) + place) + (step + 1))
    counter = torch.stack([2 * number + 1, 2 * number + 2])
    bits = _shift(_mix(stream + counter * GOLDEN_GAMMA), 11)
    first, second = bits.double() * 2.0**-53
    return ((-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()).float()
