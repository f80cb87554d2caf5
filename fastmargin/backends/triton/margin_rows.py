"""Margin, loss and derivatives of all rows in one launch; the arithmetic of ``reference.py``."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.launch import on_device
from fastmargin.backends.triton.tile import exp_precise, log1p_small, sin_cos
from fastmargin.spec import GRAD_MODES, GUARDS, SOURCES, MarginForm

CONSTANT: tl.constexpr = tl.constexpr(SOURCES.index("constant"))
ADAFACE: tl.constexpr = tl.constexpr(SOURCES.index("adaface"))
NORM: tl.constexpr = tl.constexpr(SOURCES.index("norm"))
CLASS: tl.constexpr = tl.constexpr(SOURCES.index("class"))
ROW: tl.constexpr = tl.constexpr(SOURCES.index("row"))
CLIP: tl.constexpr = tl.constexpr(GUARDS.index("clip"))
MM: tl.constexpr = tl.constexpr(GUARDS.index("mm"))
MMM: tl.constexpr = tl.constexpr(GUARDS.index("mmm"))
EASY: tl.constexpr = tl.constexpr(GUARDS.index("easy"))
STRAIGHT: tl.constexpr = tl.constexpr(GRAD_MODES.index("straight_through"))
PI: tl.constexpr = tl.constexpr(math.pi)
LEAST_SINE: tl.constexpr = tl.constexpr(math.sqrt(torch.finfo(torch.float32).eps))


@triton.jit
def _cos_clipped(b_angle):
    """cos of an angle clipped to [0, pi]."""
    _, b_cos = sin_cos(tl.minimum(tl.maximum(b_angle, 0.0), PI))
    return b_cos


@triton.jit
def margin_of_rows(
    b_cos_y,
    b_lse,
    b_norm,
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
    SOURCE: tl.constexpr,
    GUARD: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss, slopes by cosine, ``lse_neg`` and norm, and margin of BLOCK rows; 0 if ignored."""
    b_u = tl.zeros([BLOCK], tl.float32)
    b_u_by_norm = tl.zeros([BLOCK], tl.float32)
    if SOURCE == CLASS:
        m_known = (b_label >= 0) & (b_label < classes)
        b_u = tl.load(p_table + tl.where(m_known, b_label, 0), mask=m_b).to(tl.float32)
    elif SOURCE == ROW:
        b_u = tl.load(p_table + o_b, mask=m_b, other=0.0).to(tl.float32)
    elif SOURCE != CONSTANT:
        b_clipped = tl.maximum(b_norm, low, propagate_nan=tl.PropagateNan.ALL)
        b_clipped = tl.minimum(b_clipped, high, propagate_nan=tl.PropagateNan.ALL)
        if SOURCE == NORM:
            b_u = b_clipped
            b_u_by_norm = ((b_norm >= low) & (b_norm <= high)).to(tl.float32)
        else:
            b_z = (b_clipped - mean) / (std + eps) * h
            b_z = tl.maximum(b_z, -1.0, propagate_nan=tl.PropagateNan.ALL)
            b_u = tl.minimum(b_z, 1.0, propagate_nan=tl.PropagateNan.ALL)

    b_c = tl.maximum(b_cos_y, -cos_limit, propagate_nan=tl.PropagateNan.ALL)
    b_c = tl.minimum(b_c, cos_limit, propagate_nan=tl.PropagateNan.ALL)
    m_inside = (b_cos_y >= -cos_limit) & (b_cos_y <= cos_limit)
    b_m2 = m2 + m2_u * b_u
    b_m3 = m3 + m3_u * b_u
    b_sin_m, b_cos_m = sin_cos(b_m2)
    b_sin_t = tl.sqrt_rn(tl.maximum((1 - b_c) * (1 + b_c), 0.0))
    b_value = b_c * b_cos_m - b_sin_t * b_sin_m
    b_by_cos = b_cos_m + b_c * b_sin_m / tl.maximum(b_sin_t, LEAST_SINE)
    b_by_m2 = -(b_sin_t * b_cos_m + b_c * b_sin_m)
    if GUARD == CLIP:
        # theta + m2 below angle_eps or above pi - angle_eps = angle_top
        m_low = (angle_eps - b_m2 > 0) & (b_c > _cos_clipped(angle_eps - b_m2))
        m_high = (b_m2 + angle_eps > 0) & (b_c < _cos_clipped(angle_top - b_m2))
        b_value = tl.where(m_high, -cos_angle_eps, b_value)
        b_value = tl.where(m_low, cos_angle_eps, b_value)
        b_by_cos = tl.where(m_low | m_high, 0.0, b_by_cos)
        b_by_m2 = tl.where(m_low | m_high, 0.0, b_by_m2)
    elif GUARD == MM:
        m_past = (b_m2 > 0) & (b_c <= -b_cos_m)
        b_value = tl.where(m_past, b_c - b_m2 * b_sin_m, b_value)
        b_by_cos = tl.where(m_past, 1.0, b_by_cos)
        b_by_m2 = tl.where(m_past, -(b_sin_m + b_m2 * b_cos_m), b_by_m2)
    elif GUARD == MMM:
        m_past = (b_m2 > 0) & (b_c <= -b_cos_m)
        b_value = tl.where(m_past, b_c - 1 + b_cos_m, b_value)
        b_by_cos = tl.where(m_past, 1.0, b_by_cos)
        b_by_m2 = tl.where(m_past, -b_sin_m, b_by_m2)
    elif GUARD == EASY:
        b_value = tl.where(b_c > 0, b_value, b_c)
        b_by_cos = tl.where(b_c > 0, b_by_cos, 1.0)
        b_by_m2 = tl.where(b_c > 0, b_by_m2, 0.0)
    if GRAD == STRAIGHT:
        b_by_cos = tl.full([BLOCK], 1.0, tl.float32)
    b_by_cos = tl.where(m_inside, b_by_cos, 0.0)
    b_psi = b_value - b_m3
    b_by_u = m2_u * b_by_m2 - m3_u

    # 1 - p_y as a sigmoid of the gap keeps its digits where p_y -> 1
    b_gap = b_lse - scale * b_psi
    # a gap of 1000 is as good as infinite, which exp_precise does not take
    b_small = exp_precise(-tl.minimum(tl.abs(b_gap), 1000.0, propagate_nan=tl.PropagateNan.ALL))
    b_miss = tl.where(b_gap < 0, b_small, 1.0) / (1.0 + b_small)
    b_loss = tl.maximum(b_gap, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p_small(b_small)

    m_valid = b_label >= 0
    b_pull = -scale * b_miss
    b_by_norm = b_pull * b_by_u * b_u_by_norm
    return (
        tl.where(m_valid, b_loss, 0.0),
        tl.where(m_valid, b_pull * b_by_cos, 0.0),
        tl.where(m_valid, b_miss, 0.0),
        tl.where(m_valid, b_by_norm, 0.0),
        tl.where(m_valid, b_cos_y - b_psi, 0.0),
    )


@triton.jit(do_not_specialize=["B", "classes"])
def margin_rows_kernel(
    p_cos,  # (B,) target cosine
    p_lse,  # (B,) lse_neg
    p_norm,  # (B,)
    p_label,  # (B,) int64
    p_mean,  # (1,), if SOURCE is ADAFACE
    p_std,  # (1,), if SOURCE is ADAFACE
    p_table,  # (classes,), if SOURCE is CLASS; (B,), if ROW
    p_loss,  # (B,) out
    p_by_cos,  # (B,) out
    p_by_lse,  # (B,) out
    p_by_norm,  # (B,) out
    p_margin,  # (B,) out
    B,
    classes,
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
    SOURCE: tl.constexpr,
    GUARD: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_b = o_b < B
    b_cos_y = tl.load(p_cos + o_b, mask=m_b, other=0.0)
    b_lse = tl.load(p_lse + o_b, mask=m_b, other=0.0)
    b_label = tl.load(p_label + o_b, mask=m_b, other=-1)

    b_norm = tl.load(p_norm + o_b, mask=m_b, other=0.0)
    mean, std = 0.0, 0.0
    if SOURCE == ADAFACE:
        mean = tl.load(p_mean).to(tl.float32)
        std = tl.load(p_std).to(tl.float32)
    b_loss, b_by_cos, b_by_lse, b_by_norm, b_margin = margin_of_rows(
        b_cos_y,
        b_lse,
        b_norm,
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
    tl.store(p_loss + o_b, b_loss, mask=m_b)
    tl.store(p_by_cos + o_b, b_by_cos, mask=m_b)
    tl.store(p_by_lse + o_b, b_by_lse, mask=m_b)
    tl.store(p_by_norm + o_b, b_by_norm, mask=m_b)
    tl.store(p_margin + o_b, b_margin, mask=m_b)


def constants(form: MarginForm) -> dict:
    """Compile-time arguments."""
    source, guard, grad = form.codes()
    return {"SOURCE": source, "GUARD": guard, "GRAD": grad, "BLOCK": 128, "num_warps": 4}


def numbers(form: MarginForm) -> tuple[float, ...]:
    """The form's numbers in the order of the kernels' arguments, ``scale`` to ``eps``."""
    return (
        float(form.scale),
        float(form.m2),
        float(form.m3),
        float(form.m2_u),
        float(form.m3_u),
        1.0 - form.cos_eps,
        float(form.angle_eps),
        math.pi - form.angle_eps,
        math.cos(form.angle_eps),
        float(form.h),
        float(form.low),
        float(form.high),
        float(form.eps),
    )


def margin_rows(
    cos_y: Tensor, lse_neg: Tensor, norm: Tensor, labels: Tensor, form: MarginForm
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, its derivatives with respect to the first three arguments, and margin; each (B,).

    Args:
        cos_y: (B,) contiguous, fp32.
        lse_neg: (B,) contiguous, fp32.
        norm: (B,) contiguous, fp32.
        labels: (B,) contiguous, int64.
        form: the margin.
    """
    b = cos_y.shape[0]
    out = tuple(torch.empty_like(cos_y) for _ in range(5))
    if b == 0:
        return out
    fixed = constants(form)
    with on_device(cos_y):
        margin_rows_kernel[(triton.cdiv(b, fixed["BLOCK"]),)](
            cos_y,
            lse_neg,
            norm,
            labels,
            form.mean,
            form.std,
            form.table,
            *out,
            b,
            0 if form.table is None else form.table.numel(),
            *numbers(form),
            **fixed,
        )
    return out
