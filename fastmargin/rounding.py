"""Stochastic rounding to 16 bits, with noise that is a function of key, row and column.

An update below half the distance to the next 16-bit number is lost when rounding to nearest.
Rounding up or down at random, with probabilities by distance, keeps it in expectation. The noise is
the same on every backend, for any chunking of the rows, and after resuming from a checkpoint.
Numbers that 16 bits can represent do not change.

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
"""Numbers rounded at a time, which bounds temporary buffers."""


@dataclass(frozen=True)
class Rounding:
    """Stochastic rounding of an optimiser's writes to one parameter.

    place: index of the parameter in the optimiser, so that each has its own noise.
    """

    seed: int
    place: int = 0

    @staticmethod
    def of(seed: int) -> Rounding:
        """From a seed.

        Raises:
            TypeError: it is not an integer.
        """
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        return Rounding(seed)

    def key(self, step: int) -> int:
        """A 31-bit key, different in each step."""
        found = 0
        for number in (self.seed, self.seed >> 32, self.place, step):
            found = mix((found + (number & MASK) * GOLDEN + 1) & MASK)
        return found >> 1


def noise(rows: Tensor, width: int, key: int) -> Tensor:
    """(K, width) int32: 32 random bits for each column of the rows (K,) int64."""
    first = mix_(rows.to(torch.int32) ^ key)
    columns = torch.arange(width, dtype=torch.int32, device=rows.device) * as_int32(GOLDEN)
    return mix_(first[:, None] + columns)


def stochastic(values: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float32 ``values`` to bfloat16 or float16, up or down by the low 16 ``bits``."""
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
    """Rows of a weight and its states (K, ...), in the dtypes of ``like``; not copied if equal.

    With a key, 16-bit ones are rounded stochastically, with noise by their row numbers ``rows``
    (K,); weight and first state get independent noise. Without a key, to nearest.
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
    """Writes updated rows (K, ...) back to ``tensors``, rounded; skips those updated in place."""
    for tensor, value in zip(tensors, narrowed(values, tensors, rows, key), strict=True):
        if value is not tensor:
            tensor.copy_(value)
