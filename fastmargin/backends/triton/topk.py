"""The exact k nearest negatives of each row, and the target cosine.

Cosine and column form one int64 key, ordered by larger cosine, then lower column, so the k largest
keys are the answer in any order of processing. The scan keeps k keys per row and split, and takes
from a tile only while it contains a larger one; the merge selects from all splits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.centres import Centres, blocks_of
from fastmargin.backends.triton.configs import (
    DOT_PRECISION,
    TileConfig,
    block_of,
    choose,
    split_classes,
)
from fastmargin.backends.triton.launch import chip, on_device
from fastmargin.backends.triton.tile import cosines, local_columns, target_cosine

LEAST: tl.constexpr = tl.constexpr(-(2**63))
LOW_WORD: tl.constexpr = tl.constexpr(2**32 - 1)
# keys of places not yet taken lie below the key of every float: -inf has high word -0x7f800001
UNTAKEN: tl.constexpr = tl.constexpr(-(2**63) + 2**32)


@triton.jit
def make_key(b_value, b_column):
    """Orders by value, then by lower column; -0.0 counts as 0.0."""
    b_bits = tl.where(b_value == 0.0, 0.0, b_value).to(tl.int32, bitcast=True)
    b_order = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return (b_order.to(tl.int64) << 32) | (b_column.to(tl.int64) ^ LOW_WORD)


@triton.jit
def key_value(b_key):
    b_order = (b_key >> 32).to(tl.int32)
    return (b_order ^ ((b_order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_column(b_key):
    return (b_key & LOW_WORD) ^ LOW_WORD


@triton.jit(do_not_specialize=["B", "C", "class_start", "column_start", "tiles_per_split"])
def topk_scan_kernel(
    d_x,  # (B, D') unit rows, in blocks of (BLOCK_B, BLOCK_K)
    d_w,  # (C, D') unit centres, in blocks of (BLOCK_C, BLOCK_K)
    p_inverse,  # (C,) below 0 at an empty place, if GAPS
    p_label,  # (B,) int64
    p_key,  # (splits, B, K) int64, in if CONTINUED, and out
    B,
    C,
    class_start,
    column_start,
    tiles_per_split,
    GAPS: tl.constexpr,
    CONTINUED: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_split = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_B
    o_b = first + tl.arange(0, BLOCK_B)
    m_b = o_b < B
    b_column = local_columns(p_label, o_b, m_b, class_start, C)
    o_k = tl.arange(0, K)
    p_row = p_key + (i_split.to(tl.int64) * B + o_b) * K
    p_best = p_row[:, None] + o_k[None, :]
    # distinct, so that a better key replaces one of them at a time
    b_best = tl.zeros([BLOCK_B, K], tl.int64) + (o_k.to(tl.int64) + (LEAST + 1))[None, :]
    if CONTINUED:
        b_best = tl.load(p_best, mask=m_b[:, None], other=LEAST)

    i_first = i_split * tiles_per_split
    i_last = tl.minimum(i_first + tiles_per_split, tl.cdiv(C, BLOCK_C))
    for i_c in range(i_first, i_last):
        start = i_c * BLOCK_C
        o_c = start + tl.arange(0, BLOCK_C)
        b_cos = cosines(d_x, d_w, first, start, D, BLOCK_B, BLOCK_C, BLOCK_K, PRECISION)
        m_c = o_c < C
        if GAPS:
            m_c = m_c & (tl.load(p_inverse + o_c, mask=m_c, other=0.0) >= 0)
        m_negative = m_c[None, :] & (o_c[None, :] != b_column[:, None])
        b_key = tl.where(m_negative, make_key(b_cos, (column_start + o_c)[None, :]), LEAST)
        b_top = tl.max(b_key, 1)
        b_worst = tl.min(b_best, 1)
        while tl.max((b_top > b_worst).to(tl.int32), 0) > 0:
            m_place = (b_best == b_worst[:, None]) & (b_top > b_worst)[:, None]
            b_best = tl.where(m_place, b_top[:, None], b_best)
            b_key = tl.where(b_key == b_top[:, None], LEAST, b_key)
            b_top = tl.max(b_key, 1)
            b_worst = tl.min(b_best, 1)

    tl.store(p_best, b_best, mask=m_b[:, None])


@triton.jit(do_not_specialize=["B", "C", "rows_w", "class_start", "splits", "wanted"])
def topk_merge_kernel(
    p_x,  # (B, D) contiguous unit rows, fp32
    p_w,  # (rows_w, D) strided centres
    p_index,  # (C,) int64, their rows that are columns of the pass, if INDEXED
    p_label,  # (B,) int64
    p_key,  # (splits, B, K) int64
    p_value,  # (B, wanted) out
    p_column,  # (B, wanted) int64, out
    p_cos,  # (B,) out
    B,
    C,
    rows_w,
    class_start,
    stride_wc,
    stride_wd,
    splits,
    wanted,
    INDEXED: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_S * K)
    p_split = p_key + ((o_n // K).to(tl.int64) * B + i_b) * K + o_n % K
    b_key = tl.load(p_split, mask=o_n // K < splits, other=LEAST)
    for i_k in range(0, wanted):
        b_top = tl.max(b_key, 0)
        m_none = b_top < UNTAKEN
        b_value = tl.where(m_none, float("-inf"), key_value(b_top))
        tl.store(p_value + i_b * wanted + i_k, b_value)
        tl.store(p_column + i_b * wanted + i_k, tl.where(m_none, -1, key_column(b_top)))
        b_key = tl.where(b_key == b_top, LEAST, b_key)

    b_label = tl.load(p_label + i_b) - class_start
    b_cos = target_cosine(
        p_x,
        p_w,
        p_index,
        i_b,
        b_label,
        C,
        rows_w,
        stride_wc,
        stride_wd,
        D,
        BLOCK_D,
        INDEXED,
    )
    tl.store(p_cos + i_b, b_cos)


def scan_constants(
    d: int, k: int, precision: str, gaps: bool, continued: bool, tile: TileConfig
) -> dict:
    """Compile-time arguments of the scan."""
    arguments = tile.arguments()
    del arguments["BLOCK_D"]  # no accumulator over D
    return {
        "GAPS": gaps,
        "CONTINUED": continued,
        "D": d,
        # a tensor of one column is not worth its own case
        "K": max(2, triton.next_power_of_2(k)),
        "PRECISION": DOT_PRECISION[precision],
        **arguments,
    }


def merge_constants(d: int, k: int, indexed: bool, splits: int) -> dict:
    """Compile-time arguments of the merge."""
    return {
        "INDEXED": indexed,
        "D": d,
        "K": max(2, triton.next_power_of_2(k)),
        "BLOCK_D": block_of(d),
        "BLOCK_S": triton.next_power_of_2(splits),
        "num_warps": 4,
    }


def topk(
    x_hat: Tensor,
    x: Tensor,
    centres: Iterable[Centres],
    weight: Tensor,
    index: Tensor | None,
    labels: Tensor,
    k: int,
    class_start: int,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines (B, k) descending, their columns (B, k) int64, target cosine (B,).

    Args:
        x_hat: (B, D) contiguous unit rows, fp32.
        x: (B, D') the same in the operand type.
        centres: the columns of the pass, piece by piece; at least one.
        weight: (C, D).
        index: (K,) contiguous, or None.
        labels: (B,) contiguous, int64.
        k: at most 16.
        class_start: global id of the first column.
        precision: one of "fp32", "tf32", "bf16", "fp16".
    """
    b, d = x_hat.shape
    here = chip(x.device)
    tile = choose("topk", d, precision, here.arch)
    row_programs = triton.cdiv(b, tile.block_b)
    keys = None
    for part in centres:
        n = part.inverse.shape[0]
        tiles = triton.cdiv(n, tile.block_c)
        fixed = scan_constants(d, k, precision, part.gaps, part.start > 0, tile)
        if keys is None:
            splits = split_classes(row_programs, tiles, here.processors)
            keys = torch.empty((splits, b, fixed["K"]), dtype=torch.int64, device=x.device)
        with on_device(x):
            topk_scan_kernel[(row_programs, splits)](
                blocks_of(x, tile.block_b, tile.block_k),
                blocks_of(part.operand, tile.block_c, tile.block_k),
                part.inverse,
                labels,
                keys,
                b,
                n,
                class_start + part.start,
                part.start,
                triton.cdiv(tiles, splits),
                **fixed,
            )
    value = torch.empty((b, k), dtype=torch.float32, device=x.device)
    column = torch.empty((b, k), dtype=torch.int64, device=x.device)
    cos_y = torch.empty_like(value[:, 0])
    indexed = index is not None
    with on_device(x):
        topk_merge_kernel[(b,)](
            x_hat,
            weight,
            index,
            labels,
            keys,
            value,
            column,
            cos_y,
            b,
            index.shape[0] if indexed else weight.shape[0],
            weight.shape[0],
            class_start,
            weight.stride(0),
            weight.stride(1),
            splits,
            k,
            **merge_constants(d, k, indexed, splits),
        )
    return value, column, cos_y
