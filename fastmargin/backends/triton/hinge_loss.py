"""The hinge loss on the nearest negatives, its derivatives and its mean, by a single program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.launch import on_device
from fastmargin.spec import HingeForm


@triton.jit(do_not_specialize=["B", "num_classes"])
def hinge_loss_kernel(
    p_cos,  # (B,) target cosine
    p_nearest,  # (B, K) contiguous, descending; -inf in free places
    p_label,  # (B,) int64
    p_total,  # (1,) out, if REDUCED: sum of the losses, divided by the valid rows if MEAN
    p_loss,  # (B,) out
    p_valid,  # (B,) bool, out
    p_by_cos,  # (B,) out: slopes of the total, of a row's loss if not REDUCED
    p_by_nearest,  # (B, K) out, as p_by_cos
    B,
    num_classes,
    scale,
    delta,
    ZERO_SLOT: tl.constexpr,
    REDUCED: tl.constexpr,
    MEAN: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    share = 1.0
    if MEAN:
        b_count = tl.zeros([BLOCK], tl.float32)
        for start in range(0, B, BLOCK):
            o_b = start + tl.arange(0, BLOCK)
            b_count += (tl.load(p_label + o_b, mask=o_b < B, other=-1) >= 0).to(tl.float32)
        share = tl.div_rn(1.0, tl.maximum(tl.sum(b_count, 0), 1.0))
    o_k = tl.arange(0, BLOCK_K)
    b_total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, B, BLOCK):
        o_b = start + tl.arange(0, BLOCK)
        m_b = o_b < B
        b_label = tl.load(p_label + o_b, mask=m_b, other=-1)
        m_valid = (b_label >= 0) & (b_label < num_classes)
        b_cos = tl.load(p_cos + o_b, mask=m_b, other=0.0)
        m_tile = m_b[:, None] & (o_k < K)[None, :]
        o_tile = o_b.to(tl.int64)[:, None] * K + o_k[None, :]
        b_nearest = tl.load(p_nearest + o_tile, mask=m_tile, other=float("-inf"))
        m_own = m_valid[:, None]  # what has a gradient
        if ZERO_SLOT:
            m_zero = (o_k == K - 1)[None, :] & (b_nearest < 0.0)
            b_nearest = tl.where(m_zero, 0.0, b_nearest)
            m_own = m_own & (m_zero == 0)
        b_gap = b_nearest - b_cos[:, None] + delta
        # a gap of exactly 0 has a gradient, and NaN is kept
        m_off = b_gap < 0.0
        b_loss = scale * tl.sum(tl.where(m_off, 0.0, b_gap), 1)
        b_loss = tl.where(b_label >= 0, b_loss, 0.0)
        b_loss = tl.where(b_label < num_classes, b_loss, float("nan"))
        b_slope = tl.where(m_off, 0.0, scale) * share
        b_by_cos = tl.where(m_valid, -tl.sum(b_slope, 1), 0.0)
        tl.store(p_loss + o_b, b_loss, mask=m_b)
        tl.store(p_valid + o_b, b_label >= 0, mask=m_b)
        tl.store(p_by_cos + o_b, b_by_cos, mask=m_b)
        tl.store(p_by_nearest + o_tile, tl.where(m_own, b_slope, 0.0), mask=m_tile)
        b_total += b_loss
    if REDUCED:
        tl.store(p_total, tl.sum(b_total, 0) * share)


def constants(form: HingeForm, reduction: str, k: int) -> dict:
    """Compile-time arguments."""
    return {
        "ZERO_SLOT": form.zero_slot,
        "REDUCED": reduction != "none",
        "MEAN": reduction == "mean",
        "K": k,
        "BLOCK": 128,
        "BLOCK_K": triton.next_power_of_2(k),
        "num_warps": 8,
    }


def hinge_loss(
    cos_y: Tensor,
    nearest: Tensor,
    labels: Tensor,
    num_classes: int,
    form: HingeForm,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :meth:`fastmargin.backends.interface.Backend.hinge_loss`; all contiguous, fp32."""
    b, k = nearest.shape
    total = cos_y.new_empty(() if reduction != "none" else (0,))
    rows, by_cos = torch.empty_like(cos_y), torch.empty_like(cos_y)
    valid, by_nearest = torch.empty_like(labels, dtype=torch.bool), torch.empty_like(nearest)
    with on_device(cos_y):
        hinge_loss_kernel[(1,)](
            cos_y,
            nearest,
            labels,
            total if reduction != "none" else None,
            rows,
            valid,
            by_cos,
            by_nearest,
            b,
            num_classes,
            float(form.scale),
            float(form.delta),
            **constants(form, reduction, k),
        )
    return total, rows, valid, by_cos, by_nearest
