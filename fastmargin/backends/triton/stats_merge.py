"""Partial results of the splits of the classes, and a kernel that merges them into one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.configs import block_of
from fastmargin.backends.triton.launch import on_device


@dataclass(frozen=True)
class Partials:
    """Partial results of the splits of the classes; their size depends on B, D and chip, not on C.

    sums, shifts (None without a running shift), maxima: (splits, B). numerators: (splits, B, D) of
    the pull, or None. fp32.
    """

    sums: Tensor
    shifts: Tensor | None
    maxima: Tensor
    numerators: Tensor | None

    @staticmethod
    def empty(splits: int, b: int, d: int, device, want_pull: bool, online: bool) -> Partials:
        """Uninitialised."""
        sums = torch.empty((splits, b), dtype=torch.float32, device=device)
        shifts = torch.empty_like(sums) if online else None
        numerators = sums.new_empty((splits, b, d)) if want_pull else None
        return Partials(sums, shifts, torch.empty_like(sums), numerators)

    def since(self, split: int) -> Partials:
        """The splits from this one on."""
        parts = self.sums, self.shifts, self.maxima, self.numerators
        return Partials(*(None if part is None else part[split:] for part in parts))


@triton.jit(do_not_specialize=["B", "splits"])
def stats_merge_kernel(
    p_sum,  # (splits, B)
    p_shift,  # (splits, B), if ONLINE
    p_max,  # (splits, B)
    p_partial,  # (splits, B, D), if WANT_PULL
    p_sum_out,  # (B,) out; may be the first split
    p_shift_out,  # (B,) out, if ONLINE
    p_max_out,  # (B,) out
    p_pull_out,  # (B, D) out, if WANT_PULL
    B,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WANT_PULL: tl.constexpr,
    ONLINE: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < splits
    o_part = o_s.to(tl.int64) * B + i_b
    b_part = tl.load(p_sum + o_part, mask=m_s, other=0.0)
    b_max = tl.max(tl.load(p_max + o_part, mask=m_s, other=float("-inf")), 0)
    b_shift = 0.0
    if ONLINE:
        b_shifts = tl.load(p_shift + o_part, mask=m_s, other=float("-inf"))
        b_shift = tl.max(b_shifts, 0)
        b_part *= tl.exp2(b_shifts - b_shift)
    if WANT_PULL:
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_pull = tl.zeros([BLOCK_D], tl.float32)
        for i_s in range(0, splits):
            o_row = (i_b - i_b + i_s) * B + i_b  # int64
            b_row = tl.load(p_partial + o_row * D + o_d, mask=m_d, other=0.0)
            if ONLINE:
                b_row *= tl.exp2(tl.load(p_shift + o_row) - b_shift)
            b_pull += b_row
    tl.debug_barrier()  # all of it is read before the first split is overwritten
    tl.store(p_sum_out + i_b, tl.sum(b_part, 0))
    tl.store(p_max_out + i_b, b_max)
    if ONLINE:
        tl.store(p_shift_out + i_b, b_shift)
    if WANT_PULL:
        tl.store(p_pull_out + i_b * D + o_d, b_pull, mask=m_d)


def constants(d: int, splits: int, want_pull: bool, online: bool) -> dict:
    """Compile-time arguments."""
    return {
        "D": d,
        "BLOCK_D": block_of(d),
        "BLOCK_S": triton.next_power_of_2(splits),
        "WANT_PULL": want_pull,
        "ONLINE": online,
        "num_warps": 4,
    }


def stats_merge(partials: Partials, into: Partials) -> None:
    """Sums all splits in a fixed order and stores the result as the first split of ``into``."""
    splits, b = partials.sums.shape
    d = 1 if partials.numerators is None else partials.numerators.shape[2]
    fixed = constants(d, splits, partials.numerators is not None, partials.shifts is not None)
    with on_device(partials.sums):
        stats_merge_kernel[(b,)](
            partials.sums,
            partials.shifts,
            partials.maxima,
            partials.numerators,
            into.sums,
            into.shifts,
            into.maxima,
            into.numerators,
            b,
            splits,
            **fixed,
        )
