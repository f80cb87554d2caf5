"""Stochastic rounding to 16 bits, whose noise is a function of where a number stands.

A step that is smaller than half the distance to the next 16-bit number is lost if every sum is
rounded to nearest. Rounded up or down at random, with odds by the distance, it arrives on average.
Noise that depends on nothing but key, row and column is the same on every backend, however the
rows are cut up, and again after a checkpoint. Numbers that 16 bits hold stay as they are.

``backends/triton/rounding.py`` computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmargin.hashing import GOLDEN, MASK, as_int32, mix, mix_

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
LEAST_NORMAL = 2.0**-14  # of float16
STEPS = 2.0**24  # of float16 below LEAST_NORMAL, per unit


@dataclass(frozen=True)
class Rounding:
    """Stochastic rounding of an optimiser's writes, with keys that differ from step to step."""

    seed: int

    def key(self, step: int) -> int:
        """31 bits."""
        return mix(mix(self.seed & MASK) ^ (step * GOLDEN & MASK)) >> 1


def noise(rows: Tensor, width: int, key: int) -> Tensor:
    """(K, width) int32, 32 random bits for each column of the rows (K,) int64."""
    first = mix_(rows.to(torch.int32) ^ key)
    columns = torch.arange(width, dtype=torch.int32, device=rows.device) * as_int32(GOLDEN)
    return mix_(first[:, None] + columns)


def stochastic(values: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``values`` in bfloat16 or float16, up if the low 16 ``bits`` say so."""
    bits = bits & 0xFFFF
    raw = values.view(torch.int32)
    if dtype == torch.bfloat16:
        found = ((raw + bits) & ~0xFFFF).view(torch.float32)
    else:
        bits = bits >> 3
        found = ((raw + bits) & ~0x1FFF).view(torch.float32)
        small = (values.abs() * STEPS + bits / 2**13).floor() / STEPS
        found = torch.where(values.abs() < LEAST_NORMAL, small.copysign(values), found)
    return torch.where(values.isfinite(), found, values).to(dtype)


def narrowed(
    values: Sequence[Tensor], like: Sequence[Tensor], rows: Tensor, key: int | None
) -> list[Tensor]:
    """A weight and its states (K, ...), in the types of ``like``.

    With a key 16-bit ones are rounded stochastically, those of rows (K,) of the whole; the first
    two by noise of their own. Without one, to nearest.
    """
    dtypes = [tensor.dtype for tensor in like]
    if key is None or not any(dtype in SIXTEEN_BITS for dtype in dtypes):
        return [value.to(dtype) for value, dtype in zip(values, dtypes, strict=True)]
    flat = [value.reshape(rows.shape[0], -1) for value in values]
    bits = noise(rows, flat[0].shape[1], key)
    found = []
    for place, (value, dtype) in enumerate(zip(flat, dtypes, strict=True)):
        if dtype in SIXTEEN_BITS and value.dtype != dtype:
            value = stochastic(value.float(), bits >> 16 * (place % 2), dtype)
        found.append(value.to(dtype).reshape(values[place].shape))
    return found
