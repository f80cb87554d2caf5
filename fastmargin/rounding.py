"""Stochastic rounding to 16 bits, whose noise is a function of where a number stands.

A step that is smaller than half the distance to the next 16-bit number is lost if every sum is
rounded to nearest. Rounded up or down at random, with odds by the distance, it arrives on average.
Noise that depends on nothing but key, row and column is the same on every backend, however the
rows are cut up, and again after a checkpoint. Numbers that 16 bits hold stay as they are.

``backends/triton/rounding.py`` computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmargin.hashing import GOLDEN, MASK, as_int32, mix, mix_

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
LEAST_NORMAL = 2.0**-14  # of float16
STEPS = 2.0**24  # of float16 below LEAST_NORMAL, per unit
AT_ONCE = 1 << 21
"""Numbers rounded at a time, which bounds temporaries."""


@dataclass(frozen=True)
class Rounding:
    """Stochastic rounding of an optimiser's writes to one parameter.

    place: of the parameter among the optimiser's, so that each has noise of its own.
    """

    seed: int
    place: int = 0

    @staticmethod
    def of(seed: int) -> Rounding:
        """With a seed of the caller's.

        Raises:
            TypeError: it is no integer.
        """
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        return Rounding(seed)

    def key(self, step: int) -> int:
        """31 bits, others in every step."""
        found = 0
        for number in (self.seed, self.seed >> 32, self.place, step):
            found = mix((found + (number & MASK) * GOLDEN + 1) & MASK)
        return found >> 1


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
    """A weight and its states (K, ...), in the types of ``like``; as they are where those fit.

    With a key 16-bit ones are rounded stochastically, those of rows (K,) of the whole; the first
    two by noise of their own. Without one, to nearest.
    """
    found = []
    for place, (value, tensor) in enumerate(zip(values, like, strict=True)):
        if key is not None and value.dtype != tensor.dtype and tensor.dtype in SIXTEEN_BITS:
            found.append(_rounded(value, tensor.dtype, rows, key, 16 * (place % 2)))
        else:
            found.append(value.to(tensor.dtype))
    return found


def _rounded(value: Tensor, dtype: torch.dtype, rows: Tensor, key: int, shift: int) -> Tensor:
    out = torch.empty(value.shape, dtype=dtype, device=value.device)
    shape = rows.shape[0], math.prod(value.shape[1:])
    flat, to = value.reshape(shape), out.view(shape)
    size = max(1, AT_ONCE // max(1, shape[1]))
    for start in range(0, shape[0], size):
        part = slice(start, start + size)
        bits = noise(rows[part], shape[1], key) >> shift
        to[part] = stochastic(flat[part].float(), bits, dtype)
    return out


def write_back(
    tensors: Sequence[Tensor], values: Sequence[Tensor], rows: Tensor, key: int | None
) -> None:
    """Copies rows (K, ...) to where they are from, unless they were never a copy."""
    for tensor, value in zip(tensors, narrowed(values, tensors, rows, key), strict=True):
        if value is not tensor:
            tensor.copy_(value)
