"""Gradients of embeddings and centres through the nearest negatives and the own centre.

A program processes one row and its K + 1 centres, so only those are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.configs import block_of
from fastmargin.backends.triton.launch import on_device
from fastmargin.backends.triton.tile import inverse


@triton.jit(do_not_specialize=["C", "rows_w", "class_start"])
def topk_backward_kernel(
    p_d_top,  # (B, K) contiguous upstream gradients
    p_d_cos,  # (B,)
    p_x_hat,  # (B, D) contiguous
    p_w,  # (rows_w, D) strided centres
    p_index,  # (C,) int64, their rows that are columns of the pass, if INDEXED
    p_label,  # (B,) int64
    p_nearest,  # (B, K) int64 contiguous, columns
    p_d_x,  # (B, D) contiguous, out
    p_rows,  # (B * (K + 1), D) contiguous, out: gradients of centres
    p_touched,  # (B * (K + 1),) int64, out: their rows; -1 where there is none
    C,
    rows_w,
    class_start,
    stride_wc,
    stride_wd,
    K: tl.constexpr,
    INDEXED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m_d = o_d < D
    b_x = tl.load(p_x_hat + i_row * D + o_d, mask=m_d, other=0.0)
    b_d_x = tl.zeros([BLOCK_D], tl.float32)
    for j in range(K + 1):  # the own centre comes last
        if j < K:
            column = tl.load(p_nearest + i_row * K + j)
            upstream = tl.load(p_d_top + i_row * K + j)
        else:
            column = tl.load(p_label + i_row) - class_start
            upstream = tl.load(p_d_cos + i_row)
        m_here = (column >= 0) & (column < C)
        row = column
        if INDEXED:
            row = tl.load(p_index + tl.where(m_here, column, 0), mask=m_here, other=-1)
            m_here = (row >= 0) & (row < rows_w)
        row = tl.where(m_here, row, 0)
        upstream = tl.where(m_here, upstream, 0.0)
        p_row = p_w + row * stride_wc + o_d * stride_wd
        b_w = tl.load(p_row, mask=m_d & m_here, other=0.0).to(tl.float32)
        b_inverse = inverse(tl.sqrt_rn(tl.sum(b_w * b_w, 0)))
        b_w *= b_inverse
        b_d_x += upstream * b_w
        b_grad = upstream * (b_x - tl.sum(b_x * b_w, 0) * b_w) * b_inverse
        place = i_row * (K + 1) + j
        tl.store(p_rows + place * D + o_d, b_grad, mask=m_d)
        tl.store(p_touched + place, tl.where(m_here, row, -1))
    tl.store(p_d_x + i_row * D + o_d, b_d_x, mask=m_d)


def constants(d: int, k: int, indexed: bool) -> dict:
    """Compile-time arguments."""
    return {"K": k, "INDEXED": indexed, "D": d, "BLOCK_D": block_of(d), "num_warps": 4}


def topk_backward(
    d_top: Tensor,
    d_cos: Tensor,
    x_hat: Tensor,
    weight: Tensor,
    index: Tensor | None,
    labels: Tensor,
    nearest: Tensor,
    class_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :meth:`fastmargin.backends.interface.Backend.row_topk_backward`; all contiguous."""
    b, k = nearest.shape
    d_x, touched = torch.empty_like(x_hat), nearest.new_empty(b * (k + 1))
    rows = x_hat.new_empty((b * (k + 1), x_hat.shape[1]))
    if b == 0:
        return d_x, rows, touched
    with on_device(x_hat):
        topk_backward_kernel[(b,)](
            d_top,
            d_cos,
            x_hat,
            weight,
            index,
            labels,
            nearest,
            d_x,
            rows,
            touched,
            weight.shape[0] if index is None else index.shape[0],
            weight.shape[0],
            class_start,
            weight.stride(0),
            weight.stride(1),
            **constants(x_hat.shape[1], k, index is not None),
        )
    return d_x, rows, touched
