"""Norms, unit rows and, for AdaFace, the running statistics of the norms."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.configs import (
    DOT_PRECISION,
    OPERAND_DTYPES,
    block_of,
    operand_width,
)
from fastmargin.backends.triton.launch import on_device
from fastmargin.backends.triton.tile import inverse, operand
from fastmargin.spec import NormEma

ROWS_PER_STEP = 1024


@triton.jit(do_not_specialize=["B"])
def row_prologue_kernel(
    p_x,  # (B, D) strided
    p_label,  # (B,) int64, if HAS_LABELS
    p_x_hat,  # (B, D) contiguous, fp32, out
    p_operand,  # (B, WIDTH) contiguous, in the operand type, zeros past D, out, if HAS_OPERAND
    p_norm,  # (B,) out
    B,
    stride_xb,
    stride_xd,
    HAS_LABELS: tl.constexpr,
    HAS_OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m_b = o_b < B
    m_tile = m_b[:, None] & (o_d < D)[None, :]
    m_read = m_tile
    if HAS_LABELS:  # an ignored row may hold anything: it is not read
        m_read = m_read & (tl.load(p_label + o_b, mask=m_b, other=-1) >= 0)[:, None]
    p_tile = p_x + o_b[:, None] * stride_xb + o_d[None, :] * stride_xd
    b_x = tl.load(p_tile, mask=m_read, other=0.0).to(tl.float32)
    b_norm = tl.sqrt_rn(tl.sum(b_x * b_x, 1))
    b_x_hat = b_x * inverse(b_norm)[:, None]
    o_tile = o_b[:, None] * D + o_d[None, :]
    tl.store(p_x_hat + o_tile, b_x_hat, mask=m_tile)
    if HAS_OPERAND:
        o_tile = o_b[:, None] * WIDTH + o_d[None, :]
        m_tile = m_b[:, None] & (o_d < WIDTH)[None, :]
        b_x_hat = operand(b_x_hat, p_operand.dtype.element_ty, PRECISION)
        tl.store(p_operand + o_tile, b_x_hat, mask=m_tile)
    tl.store(p_norm + o_b, b_norm, mask=m_b)


@triton.jit(do_not_specialize=["B"])
def norm_statistics_kernel(
    p_norm,  # (B,)
    p_label,  # (B,) int64
    p_old_mean,  # (1,)
    p_old_std,  # (1,)
    p_mean,  # (1,) out
    p_std,  # (1,) out
    B,
    alpha,
    low,
    high,
    BLOCK: tl.constexpr,
):
    """One program."""
    mean, std = advanced(p_norm, p_label, p_old_mean, p_old_std, B, alpha, low, high, BLOCK)
    tl.store(p_mean, mean)
    tl.store(p_std, std)


@triton.jit
def advanced(p_norm, p_label, p_mean, p_std, B, alpha, low, high, BLOCK: tl.constexpr):
    """The running statistics after this batch, for one program.

    Two passes over the norms, in one order, so the result is always the same.
    """
    b_count = tl.zeros([BLOCK], tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, B, BLOCK):
        o_b = start + tl.arange(0, BLOCK)
        m_row, b_norm = _counted(p_norm, p_label, o_b, B, low, high)
        b_count += m_row.to(tl.float32)
        b_sum += tl.where(m_row, b_norm, 0.0)
    count = tl.sum(b_count, 0)
    mean = tl.sum(b_sum, 0) / tl.maximum(count, 1.0)

    b_square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, B, BLOCK):
        o_b = start + tl.arange(0, BLOCK)
        m_row, b_norm = _counted(p_norm, p_label, o_b, B, low, high)
        b_off = b_norm - mean
        b_square += tl.where(m_row, b_off * b_off, 0.0)
    std = tl.sqrt_rn(tl.sum(b_square, 0) / tl.maximum(count - 1.0, 1.0))

    old_mean = tl.load(p_mean).to(tl.float32)
    old_std = tl.load(p_std).to(tl.float32)
    mean = tl.where(count >= 1.0, old_mean + alpha * (mean - old_mean), old_mean)
    std = tl.where(count >= 2.0, old_std + alpha * (std - old_std), old_std)
    return mean, std


@triton.jit
def _counted(p_norm, p_label, o_b, B, low, high):
    """Which rows count, and their clipped norms. One NaN would stay in the statistics for good."""
    m_row = tl.load(p_label + o_b, mask=o_b < B, other=-1) >= 0
    b_norm = tl.load(p_norm + o_b, mask=m_row, other=0.0)
    m_row = m_row & (b_norm == b_norm)
    return m_row, tl.minimum(tl.maximum(tl.where(m_row, b_norm, 0.0), low), high)


def constants(d: int, has_labels: bool, width: int | None, precision: str) -> dict:
    """Compile-time arguments of the first kernel; without a width, no operand is written."""
    block_d = block_of(d)
    rows = max(1, min(16, 2048 // block_d))
    return {
        "HAS_LABELS": has_labels,
        "HAS_OPERAND": width is not None,
        "PRECISION": DOT_PRECISION[precision],
        "D": d,
        "WIDTH": width or d,
        "BLOCK_R": rows,
        "BLOCK_D": block_d,
        "num_warps": 4,
    }


def statistics_constants() -> dict:
    """Compile-time arguments of the second kernel."""
    return {"BLOCK": ROWS_PER_STEP, "num_warps": 8}


def unit_rows(
    x: Tensor, labels: Tensor | None, precision: str = "fp32"
) -> tuple[Tensor, Tensor, Tensor]:
    """``x_hat`` (B, D), the same (B, D') in the operand type, and norms (B,), in one launch.

    Args:
        x: (B, D), any strides.
        labels: (B,) contiguous, int64: rows with labels below 0 give zeros; None: no such rows.
        precision: of the operand; with "fp32" the second result is the first one, unless D' > D.
    """
    b, d = x.shape
    x_hat = torch.empty((b, d), dtype=torch.float32, device=x.device)
    norm = torch.empty((b,), dtype=torch.float32, device=x.device)
    dtype = OPERAND_DTYPES[precision]
    width = operand_width(d, dtype)
    has_operand = precision != "fp32" or width != d
    made = x_hat.new_empty((b, width), dtype=dtype) if has_operand else x_hat
    fixed = constants(d, labels is not None, width if has_operand else None, precision)
    if b > 0:
        with on_device(x):
            row_prologue_kernel[(triton.cdiv(b, fixed["BLOCK_R"]),)](
                x,
                labels,
                x_hat,
                made if has_operand else None,
                norm,
                b,
                x.stride(0),
                x.stride(1),
                **fixed,
            )
    return x_hat, made, norm


def norm_statistics(norm: Tensor, labels: Tensor, ema: NormEma) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1,), (1,) of the norms after this batch.

    Args:
        norm, labels: (B,) contiguous.
        ema: running statistics before this batch.
    """
    mean, std = norm.new_empty(1), norm.new_empty(1)
    with on_device(norm):
        norm_statistics_kernel[(1,)](
            norm,
            labels,
            ema.mean,
            ema.std,
            mean,
            std,
            norm.shape[0],
            float(ema.alpha),
            float(ema.low),
            float(ema.high),
            **statistics_constants(),
        )
    return mean, std
