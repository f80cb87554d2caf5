"""The keyed permutation of ``backends/_permutation.py``, a block of numbers per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends import _permutation
from fastmargin.backends.triton.hashing import GOLDEN, MASK, mix
from fastmargin.backends.triton.launch import on_device


@triton.jit
def _round_keys(p_key, ROUNDS: tl.constexpr):
    """A tuple of ROUNDS numbers, uint32."""
    first = tl.load(p_key)
    second = tl.load(p_key + 1)
    keys = ()
    for i in tl.static_range(ROUNDS):
        h = tl.full([], ((i + 1) * GOLDEN) & MASK, tl.uint32)
        h = mix(h ^ first.to(tl.uint32))
        h = mix(h ^ (first >> 32).to(tl.uint32))
        h = mix(h ^ second.to(tl.uint32))
        h = mix(h ^ (second >> 32).to(tl.uint32))
        keys = keys + (h,)  # noqa: RUF005  Triton has no unpacking
    return keys


@triton.jit
def _add_hash(b_digit, b_other, round_key, side):
    """``b_digit`` plus a hash of the other digit, modulo ``side``."""
    b_sum = b_digit + tl.umulhi(mix(b_other + round_key), side)
    return tl.minimum(b_sum, b_sum - side)  # wraps to a large number where b_sum is below side


@triton.jit(do_not_specialize=["size", "side", "count"])
def permutation_kernel(
    p_key,  # (2,) int64
    p_marks,  # (size,) uint8, if MARKED
    p_out,  # (count,) int64; if MARKED -1 in place of a number with a mark
    p_counts,  # (count / BLOCK,) int32, out, if MARKED: how many numbers of a block have none
    size,
    side,
    count,
    MARKED: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    keys = _round_keys(p_key, ROUNDS)
    o_c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < count
    digits = side.to(tl.uint32)
    b_value = o_c
    m_outside = m_c
    while tl.max(m_outside.to(tl.int32), 0) > 0:
        b_left = (b_value // side).to(tl.uint32)
        b_right = (b_value % side).to(tl.uint32)
        for i in tl.static_range(0, ROUNDS, 2):
            b_left = _add_hash(b_left, b_right, keys[i], digits)
            b_right = _add_hash(b_right, b_left, keys[i + 1], digits)
        b_next = b_left.to(tl.int64) * side + b_right.to(tl.int64)
        b_value = tl.where(m_outside, b_next, b_value)
        m_outside = m_c & (b_value >= size)
    if MARKED:
        m_free = m_c & (tl.load(p_marks + b_value, mask=m_c, other=1) == 0)
        b_value = tl.where(m_free, b_value, -1)
        tl.store(p_counts + tl.program_id(0), tl.sum(m_free.to(tl.int32), 0))
    tl.store(p_out + o_c, b_value, mask=m_c)


def constants(marked: bool) -> dict:
    """Compile-time arguments; a small block, since it takes as long as its slowest number."""
    return {"MARKED": marked, "ROUNDS": _permutation.ROUNDS, "BLOCK": 128, "num_warps": 1}


def permutation(key: Tensor, size: int, count: int) -> Tensor:
    """See :meth:`fastmargin.backends.interface.Backend.permutation`."""
    return _permuted(key, size, count, None)[0]


def candidates(key: Tensor, size: int, count: int, marks: Tensor) -> tuple[Tensor, Tensor, int]:
    """The same numbers, with -1 for marked ones, and the count of unmarked ones per block.

    Args:
        key: (2,) contiguous, int64.
        size, count: of the permutation.
        marks: (size,) or longer, uint8.

    Returns:
        (count,) int64; (blocks,) int32; and the size of a block, a power of two.
    """
    return _permuted(key, size, count, marks)


def _permuted(key, size, count, marks):
    fixed = constants(marks is not None)
    blocks = triton.cdiv(count, fixed["BLOCK"])
    out = key.new_empty(count)
    counts = None if marks is None else key.new_empty(blocks, dtype=torch.int32)
    if count:
        side = _permutation.side_of(size)
        with on_device(key):
            permutation_kernel[(blocks,)](key, marks, out, counts, size, side, count, **fixed)
    return out, counts, fixed["BLOCK"]
