"""Counter-based random numbers: every process with the same key draws the same numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014), whose arithmetic wraps around as int64 does
GOLDEN_GAMMA = -7046029254386353131
MULTIPLIERS = (-4658895280553007687, -7723592293110705685)
SHIFTS = (30, 27, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        x = (x ^ _shift(x, shift)) * multiplier
    return x ^ _shift(x, SHIFTS[2])


def row_normals(seed: Tensor, step: Tensor, labels: Tensor, place: int = 0) -> Tensor:
    """One :func:`counter_normal` per row of a batch, labels (B,) int64: (B,) float32.

    Rows with label >= 0 are numbered from 1. Ignored rows (label < 0) thus do not change the draws
    of the others; their own values must not be used.
    """
    return counter_normal(seed, step, (labels >= 0).cumsum(0), place)


def counter_normal(seed: Tensor, step: Tensor, number: Tensor, place: int = 0) -> Tensor:
    """(n,) float32 standard normal numbers: draws ``number`` (n,) int64 of one step and replica.

    seed, step: (1,) int64; step counts the earlier steps. place: index of the replica. Computed on
    their device, without synchronisation: a replayed CUDA graph whose step has advanced makes new
    draws.
    """
    stream = _mix(_mix(_mix(seed + GOLDEN_GAMMA) + place) + (step + 1))
    counter = torch.stack([2 * number + 1, 2 * number + 2])
    bits = _shift(_mix(stream + counter * GOLDEN_GAMMA), 11)
    first, second = bits.double() * 2.0**-53
    return ((-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()).float()
