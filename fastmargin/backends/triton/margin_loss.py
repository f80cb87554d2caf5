"""The loss after the passes over the centres, by a single program.

Running statistics, margin, loss and derivatives of each row, and the reduction: so little work
that the launch dominates. One program processes all rows, so the order of the sums is fixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.launch import on_device
from fastmargin.backends.triton.margin_rows import ADAFACE, margin_of_rows, numbers
from fastmargin.backends.triton.margin_rows import constants as form_constants
from fastmargin.backends.triton.row_prologue import advanced
from fastmargin.spec import MarginForm, NormEma

ROWS_PER_STEP = 1024


@triton.jit(do_not_specialize=["B", "classes", "num_classes"])
def margin_loss_kernel(
    p_cos,  # (B,) target cosine
    p_lse,  # (B,) lse_neg
    p_norm,  # (B,)
    p_label,  # (B,) int64
    p_mean,  # (1,), if SOURCE is ADAFACE or ADVANCE; with ADVANCE also out
    p_std,  # (1,), as p_mean
    p_table,  # (classes,), if SOURCE is CLASS; (B,), if ROW
    p_total,  # (1,) out, if REDUCED: sum of the losses times the share
    p_share,  # (1,) out: what a row weighs, 1 / (number of valid rows) if MEAN, else 1
    p_valid,  # (B,) bool, out
    p_loss,  # (B,) out
    p_by_cos,  # (B,) out
    p_by_lse,  # (B,) out
    p_by_norm,  # (B,) out
    p_margin,  # (B,) out
    B,
    classes,
    num_classes,
    alpha,
    norm_low,
    norm_high,
    scale,
    m2,
    m3,
    m2_u,
    m3_u,
    cos_limit,
    angle_eps,
    angle_top,
    cos_angle_eps,
    h,
    low,
    high,
    eps,
    ADVANCE: tl.constexpr,
    REDUCED: tl.constexpr,
    MEAN: tl.constexpr,
    SOURCE: tl.constexpr,
    GUARD: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    mean, std = 0.0, 0.0
    if ADVANCE:
        mean, std = advanced(p_norm, p_label, p_mean, p_std, B, alpha, norm_low, norm_high, BLOCK)
        tl.debug_barrier()  # every thread has read the old ones
        tl.store(p_mean, mean)
        tl.store(p_std, std)
    elif SOURCE == ADAFACE:
        mean = tl.load(p_mean).to(tl.float32)
        std = tl.load(p_std).to(tl.float32)

    b_total = tl.zeros([BLOCK], tl.float32)
    b_count = tl.zeros([BLOCK], tl.float32)
    for start in range(0, B, BLOCK):
        o_b = start + tl.arange(0, BLOCK)
        m_b = o_b < B
        b_label = tl.load(p_label + o_b, mask=m_b, other=-1)
        b_loss, b_by_cos, b_by_lse, b_by_norm, b_margin = margin_of_rows(
            tl.load(p_cos + o_b, mask=m_b, other=0.0),
            tl.load(p_lse + o_b, mask=m_b, other=0.0),
            tl.load(p_norm + o_b, mask=m_b, other=0.0),
            b_label,
            o_b,
            m_b,
            p_table,
            classes,
            mean,
            std,
            scale,
            m2,
            m3,
            m2_u,
            m3_u,
            cos_limit,
            angle_eps,
            angle_top,
            cos_angle_eps,
            h,
            low,
            high,
            eps,
            SOURCE,
            GUARD,
            GRAD,
            BLOCK,
        )
        # a label out of range makes its loss NaN and has no gradient
        m_known = b_label < num_classes
        b_loss = tl.where(m_known, b_loss, float("nan"))
        tl.store(p_valid + o_b, b_label >= 0, mask=m_b)
        tl.store(p_loss + o_b, b_loss, mask=m_b)
        tl.store(p_by_cos + o_b, tl.where(m_known, b_by_cos, 0.0), mask=m_b)
        tl.store(p_by_lse + o_b, tl.where(m_known, b_by_lse, 0.0), mask=m_b)
        tl.store(p_by_norm + o_b, tl.where(m_known, b_by_norm, 0.0), mask=m_b)
        tl.store(p_margin + o_b, b_margin, mask=m_b)
        b_total += b_loss
        b_count += (b_label >= 0).to(tl.float32)
    share = 1.0
    if MEAN:
        share = tl.div_rn(1.0, tl.maximum(tl.sum(b_count, 0), 1.0))
    tl.store(p_share, share)
    if REDUCED:
        tl.store(p_total, tl.sum(b_total, 0) * share)


def constants(form: MarginForm, advance: bool, reduction: str) -> dict:
    """Compile-time arguments."""
    return form_constants(form) | {
        "ADVANCE": advance,
        "REDUCED": reduction != "none",
        "MEAN": reduction == "mean",
        "BLOCK": ROWS_PER_STEP,
        "num_warps": 16,  # with 8, some forms spill
    }


def margin_loss(
    cos_y: Tensor,
    lse_neg: Tensor,
    norm: Tensor,
    labels: Tensor,
    num_classes: int,
    form: MarginForm,
    ema: NormEma | None,
    reduction: str,
) -> tuple[Tensor, ...]:
    """The reduced loss (), the share (1,), the valid rows (B,); then as ``margin_rows``.

    Args:
        cos_y, lse_neg, norm: (B,) contiguous, fp32.
        labels: (B,) contiguous, int64.
        num_classes: labels from here on give loss NaN.
        form: the margin.
        ema: running statistics of ``form``, updated in place before the margin; or None.
        reduction: "mean", "sum", or "none" for an empty first result.
    """
    b = cos_y.shape[0]
    total = cos_y.new_empty(() if reduction != "none" else (0,))
    share = cos_y.new_empty(1)
    valid = torch.empty_like(labels, dtype=torch.bool)
    out = tuple(torch.empty_like(cos_y) for _ in range(5))
    running = (form.mean, form.std) if ema is None else (ema.mean, ema.std)
    limits = (0.0, 0.0, 0.0) if ema is None else (ema.alpha, ema.low, ema.high)
    with on_device(cos_y):
        margin_loss_kernel[(1,)](
            cos_y,
            lse_neg,
            norm,
            labels,
            *running,
            form.table,
            total if reduction != "none" else None,
            share,
            valid,
            *out,
            b,
            0 if form.table is None else form.table.numel(),
            num_classes,
            *map(float, limits),
            *numbers(form),
            **constants(form, ema is not None, reduction),
        )
    return total, share, valid, *out
