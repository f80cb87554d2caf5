"""Samples the classes of a step in three launches: mark positives, test candidates, place both.

Instead of sorting, each of B rows is compared with all, B**2 integers, and every program counts for
itself what comes before its part: no communication between programs, and a deterministic order. The
candidates come from ``permutation.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.launch import on_device
from fastmargin.backends.triton.permutation import candidates
from fastmargin.spec import MAX_SHARDS

ROWS, AT_ONCE = 16, 256
"""A tile of comparisons."""
PLACED = 1024
"""Candidates per program."""
MOST_ROWS = 2**15
"""A billion comparisons; larger batches are sorted, which avoids the quadratic cost."""
SHARDS: tl.constexpr = tl.constexpr(MAX_SHARDS)


@triton.jit
def _local(p_label, o_b, B, class_start, classes):
    """Rows of the shard that labels are about; ``classes`` where that is none."""
    b_local = tl.load(p_label + o_b, mask=o_b < B, other=-1) - class_start
    return tl.where((b_local >= 0) & (b_local < classes), b_local, classes)


@triton.jit(do_not_specialize=["B", "class_start", "classes", "shard"])
def mark_kernel(
    p_label,  # (B,) int64
    p_seed,  # (1,) int64
    p_step,  # (1,) int64
    p_marks,  # (classes + 1,) uint8, clear; out: 1 for positives
    p_first,  # (B,) int8, out: whether no row before has the same centre, and the centre is here
    p_key,  # (2,) int64, out
    B,
    class_start,
    classes,
    shard,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    i_b = tl.program_id(0)
    if i_b == 0:
        tl.store(p_key, tl.load(p_seed))
        tl.store(p_key + 1, tl.load(p_step) * SHARDS + shard)
    o_b = i_b * ROWS + tl.arange(0, ROWS)
    b_local = _local(p_label, o_b, B, class_start, classes)
    b_again = tl.zeros([ROWS], tl.int32)
    for start in range(0, (i_b + 1) * ROWS, AT_ONCE):
        o_j = start + tl.arange(0, AT_ONCE)
        b_before = _local(p_label, o_j, B, class_start, classes)
        m_same = (b_local[:, None] == b_before[None, :]) & (o_j[None, :] < o_b[:, None])
        b_again += tl.sum(m_same.to(tl.int32), 1)
    m_here = b_local < classes
    tl.store(p_marks + b_local, 1, mask=m_here)
    tl.store(p_first + o_b, (m_here & (b_again == 0)).to(tl.int8), mask=o_b < B)


@triton.jit
def _place_positives(
    i_p,
    p_label,
    p_first,
    p_step,
    p_marks,
    p_index,
    p_column,
    p_positives,
    B,
    class_start,
    classes,
    count,
    places,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    o_b = i_p * ROWS + tl.arange(0, ROWS)
    b_local = _local(p_label, o_b, B, class_start, classes)
    b_rank = tl.zeros([ROWS], tl.int32)
    b_total = tl.zeros([AT_ONCE], tl.int32)
    for start in range(0, B, AT_ONCE):
        o_j = start + tl.arange(0, AT_ONCE)
        b_first = tl.load(p_first + o_j, mask=o_j < B, other=0).to(tl.int32)
        b_other = _local(p_label, o_j, B, class_start, classes)
        b_rank += tl.sum(tl.where(b_other[None, :] < b_local[:, None], b_first[None, :], 0), 1)
        b_total += b_first
    positives = tl.sum(b_total, 0)
    m_b = o_b < B
    m_here = b_local < classes
    tl.store(p_column + o_b, tl.where(m_here, b_rank, -1).to(tl.int64), mask=m_b)
    m_first = tl.load(p_first + o_b, mask=m_b, other=0) != 0
    tl.store(p_index + b_rank, b_local, mask=m_first)
    tl.store(p_marks + b_local, 0, mask=m_here)
    # there are at most B places besides the count
    o_empty = count + o_b.to(tl.int64)
    m_empty = m_b & (o_empty < places) & (o_empty >= positives)
    tl.store(p_index + o_empty, tl.full([ROWS], -1, tl.int64), mask=m_empty)
    if i_p == 0:
        tl.store(p_positives, positives.to(tl.int64))
        tl.store(p_step, tl.load(p_step) + 1)


@triton.jit
def _place_negatives(
    i_block,
    p_first,
    p_candidate,
    p_counts,
    p_index,
    B,
    count,
    PLACED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b_total = tl.zeros([PLACED], tl.int32)
    for start in range(0, B, PLACED):
        o_j = start + tl.arange(0, PLACED)
        b_total += tl.load(p_first + o_j, mask=o_j < B, other=0).to(tl.int32)
    blocks = i_block.to(tl.int64) * (PLACED // BLOCK)
    b_before = tl.zeros([PLACED], tl.int64)
    for start in range(0, blocks, PLACED):
        o_n = start + tl.arange(0, PLACED)
        b_before += tl.load(p_counts + o_n, mask=o_n < blocks, other=0).to(tl.int64)
    o_c = i_block.to(tl.int64) * PLACED + tl.arange(0, PLACED)
    b_candidate = tl.load(p_candidate + o_c, mask=o_c < count, other=-1)
    b_own = (b_candidate >= 0).to(tl.int32)
    b_place = tl.sum(b_total, 0) + tl.sum(b_before, 0) + (tl.cumsum(b_own, 0) - b_own)
    tl.store(p_index + b_place, b_candidate, mask=(b_candidate >= 0) & (b_place < count))


@triton.jit(do_not_specialize=["B", "class_start", "classes", "count", "places", "row_programs"])
def place_kernel(
    p_label,  # (B,) int64
    p_first,  # (B,) int8
    p_candidate,  # (count,) int64, -1 where it is a positive
    p_counts,  # (count / BLOCK,) int32: how many candidates of each block are not
    p_step,  # (1,) int64, advanced
    p_marks,  # (classes + 1,) uint8, out: clear again
    p_index,  # (places,) int64, out
    p_column,  # (B,) int64, out
    p_positives,  # () int64, out
    B,
    class_start,
    classes,
    count,
    places,
    row_programs,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PLACED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_p = tl.program_id(0)
    if i_p < row_programs:
        _place_positives(
            i_p,
            p_label,
            p_first,
            p_step,
            p_marks,
            p_index,
            p_column,
            p_positives,
            B,
            class_start,
            classes,
            count,
            places,
            ROWS,
            AT_ONCE,
        )
    else:
        i_block = i_p - row_programs
        _place_negatives(i_block, p_first, p_candidate, p_counts, p_index, B, count, PLACED, BLOCK)


def constants() -> dict:
    """Compile-time arguments of both kernels."""
    return {"ROWS": ROWS, "AT_ONCE": AT_ONCE, "num_warps": 4}


@contextlib.contextmanager
def _clear_at_an_error(marks: Tensor) -> Iterator[None]:
    """Clears the marks if memory runs out between the launches that mark and that clear."""
    try:
        yield
    except BaseException:
        marks.zero_()
        raise


def sample(
    labels: Tensor, seed: Tensor, step: Tensor, marks: Tensor, shard: int, class_start: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :meth:`fastmargin.backends.interface.Backend.sample`; all contiguous."""
    b, classes = labels.shape[0], marks.shape[0] - 1
    index = labels.new_empty(max(k, min(b, classes)))
    column, positives = torch.empty_like(labels), labels.new_empty(())
    key, first = labels.new_empty(2), torch.empty_like(labels, dtype=torch.int8)
    rows, fixed = max(1, triton.cdiv(b, ROWS)), constants()  # one also for what is no row's
    about = b, class_start, classes
    with on_device(labels), _clear_at_an_error(marks):
        mark_kernel[(rows,)](labels, seed, step, marks, first, key, *about, shard, **fixed)
        candidate, counts, block = candidates(key, classes, k, marks)
        place_kernel[(rows + triton.cdiv(k, PLACED),)](
            labels,
            first,
            candidate,
            counts,
            step,
            marks,
            index,
            column,
            positives,
            *about,
            k,
            index.shape[0],
            rows,
            PLACED=PLACED,
            BLOCK=block,
            **fixed,
        )
    return index, column, positives
