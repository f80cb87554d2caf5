"""Stochastic rounding to 16 bits, whose noise is a function of where a number stands.

A step that is smaller than half the distance to the next 16-bit number is lost if every sum is
rounded to nearest. Rounded up or down at random, with odds by the distance, it arrives on average.
Noise that depends on nothing but key, row and column is the same on every backend, however the
rows are cut up, and again after a checkpoint. Numbers that 16 bits hold stay as they are.

``backends/triton/rounding.py`` computes the same. The hash is lowbias32 of Chris Wellons (public
domain, https://github.com/skeeto/hash-prospector).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
GOLDEN = 0x9E3779B9
LEAST_NORMAL = 2.0**-14  # of float16
STEPS = 2.0**24  # of float16 below LEAST_NORMAL, per unit

MULTIPLIERS = 0x7FEB352D, 0x846CA68B

_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Rounding:
    """Stochastic rounding of an optimiser's writes, with keys that differ from step to step."""

    seed: int

    def key(self, step: int) -> int:
        """31 bits."""
        return _mixed(_mixed(self.seed & _LOW_32) ^ (step * GOLDEN & _LOW_32)) >> 1


def _mixed(x: int) -> int:
    x ^= x >> 16
    x = x * MULTIPLIERS[0] & _LOW_32
    x ^= x >> 15
    x = x * MULTIPLIERS[1] & _LOW_32
    return x ^ x >> 16


def _signed(x: int) -> int:
    """The same 32 bits as int32."""
    return x - (1 << 32) if x >> 31 else x


def _mixed_(x: Tensor) -> Tensor:
    """:func:`_mixed` of int32 in place; products wrap around, and shifts are made logical."""
    first, second = map(_signed, MULTIPLIERS)
    x ^= (x >> 16) & 0xFFFF
    x *= first
    x ^= (x >> 15) & 0x1FFFF
    x *= second
    x ^= (x >> 16) & 0xFFFF
    return x


def noise(rows: Tensor, width: int, key: int) -> Tensor:
    """(K, width) int32, 32 random bits for each column of the rows (K,) int64."""
    first = _mixed_(rows.to(torch.int32) ^ key)
    columns = torch.arange(width, dtype=torch.int32, device=rows.device) * _signed(GOLDEN)
    return _mixed_(first[:, None] + columns)


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
