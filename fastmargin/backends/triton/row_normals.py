"""One standard normal number per row: ``fastmargin/counter.py`` in one launch.

Every program counts for itself the valid rows before its own, so programs do not communicate.
Computed in float64, since there are few numbers: results rounded to float32 hardly depend on the
implementation of the logarithm.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin import counter
from fastmargin.backends.triton.launch import on_device

COUNTED_AT_ONCE = 1024

_WORD = (1 << 64) - 1
GAMMA: tl.constexpr = tl.constexpr(counter.GOLDEN_GAMMA & _WORD)
FACTOR_1: tl.constexpr = tl.constexpr(counter.MULTIPLIERS[0] & _WORD)
FACTOR_2: tl.constexpr = tl.constexpr(counter.MULTIPLIERS[1] & _WORD)
SHIFT_1: tl.constexpr = tl.constexpr(counter.SHIFTS[0])
SHIFT_2: tl.constexpr = tl.constexpr(counter.SHIFTS[1])
SHIFT_3: tl.constexpr = tl.constexpr(counter.SHIFTS[2])
UNIT: tl.constexpr = tl.constexpr(2.0**-53)
TURN: tl.constexpr = tl.constexpr(2 * math.pi)


@triton.jit
def _mix(b_h):
    """SplitMix64 of uint64 numbers."""
    b_h = (b_h ^ (b_h >> SHIFT_1)) * FACTOR_1
    b_h = (b_h ^ (b_h >> SHIFT_2)) * FACTOR_2
    return b_h ^ (b_h >> SHIFT_3)


@triton.jit
def _uniform(b_h):
    """In [0, 1), float64, from the upper 53 bits of uint64 numbers."""
    return (b_h >> 11).to(tl.int64).to(tl.float64) * UNIT


@triton.jit
def cos_of_turns(b_t):
    """cos(2 pi t) for t in [0, 1), float64, to 1e-11.

    It is ``sin(2 pi (|t - 1/2| - 1/4))``, and the sine of a quarter of a turn is a short series.
    CUDA's cosine keeps local memory for huge angles.
    """
    b_x = (tl.abs(b_t - 0.5) - 0.25) * TURN
    b_z = b_x * b_x
    b_sum = b_z * (-1 / 1307674368000) + 1 / 6227020800
    b_sum = b_z * b_sum - 1 / 39916800
    b_sum = b_z * b_sum + 1 / 362880
    b_sum = b_z * b_sum - 1 / 5040
    b_sum = b_z * b_sum + 1 / 120
    b_sum = b_z * b_sum - 1 / 6
    return b_x + b_x * (b_z * b_sum)


@triton.jit(do_not_specialize=["B", "place"])
def row_normals_kernel(
    p_seed,  # (1,) int64
    p_step,  # (1,) int64
    p_label,  # (B,) int64
    p_out,  # (B,) fp32
    B,
    place,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK
    b_before = tl.zeros([AT_ONCE], tl.int32)
    for start in range(0, first, AT_ONCE):
        o_before = start + tl.arange(0, AT_ONCE)
        b_before += (tl.load(p_label + o_before, mask=o_before < first, other=-1) >= 0).to(tl.int32)
    o_b = first + tl.arange(0, BLOCK)
    b_own = (tl.load(p_label + o_b, mask=o_b < B, other=-1) >= 0).to(tl.int32)
    b_number = (tl.sum(b_before, 0) + tl.cumsum(b_own, 0)).to(tl.uint64)

    stream = _mix(tl.load(p_seed).to(tl.uint64) + GAMMA)
    stream = _mix(stream + place.to(tl.int64).to(tl.uint64))
    stream = _mix(stream + (tl.load(p_step).to(tl.uint64) + 1))
    b_first = _uniform(_mix(stream + (b_number * 2 + 1) * GAMMA))
    b_second = _uniform(_mix(stream + (b_number * 2 + 2) * GAMMA))
    b_radius = tl.sqrt(tl.log(1.0 - b_first) * -2.0)
    tl.store(p_out + o_b, (b_radius * cos_of_turns(b_second)).to(tl.float32), mask=o_b < B)


def constants() -> dict:
    """Compile-time arguments."""
    return {"BLOCK": 256, "AT_ONCE": COUNTED_AT_ONCE, "num_warps": 4}


def row_normals(seed: Tensor, step: Tensor, labels: Tensor, place: int) -> Tensor:
    """See :meth:`fastmargin.backends.interface.Backend.row_normals`; labels are contiguous."""
    b = labels.shape[0]
    out = torch.empty(b, dtype=torch.float32, device=labels.device)
    if b == 0:
        return out
    fixed = constants()
    with on_device(labels):
        row_normals_kernel[(triton.cdiv(b, fixed["BLOCK"]),)](
            seed, step, labels, out, b, place, **fixed
        )
    return out
