"""Plain PyTorch on any device, float64 included: the specification of the other backends."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmargin.backends import _permutation
from fastmargin.backends.composed import Composed
from fastmargin.norms import advance, compute_dtype, inverse_norm, moments
from fastmargin.rows import inside, take
from fastmargin.spec import GradientFactors, MarginForm, NormEma, RowStats


def psi_and_slopes(cos_y: Tensor, u: Tensor, form: MarginForm) -> tuple[Tensor, Tensor, Tensor]:
    """psi and its derivatives with respect to ``cos_y`` and ``u``, each (B,), in closed form.

    Conditions on the angle are comparisons of cosines (cos decreases on [0, pi]), so no acos. The
    factor 1 / sin(theta) in the derivative is bounded by 1 / sqrt(machine epsilon): the gradient it
    multiplies vanishes with sin(theta), so the product stays finite and correct.
    """
    limit = 1 - form.cos_eps
    c = cos_y.clamp(-limit, limit)
    inside = (cos_y >= -limit) & (cos_y <= limit)
    m2, m3 = form.m2 + form.m2_u * u, form.m3 + form.m3_u * u
    sin_m, cos_m = m2.sin(), m2.cos()
    sin_t = ((1 - c) * (1 + c)).clamp_min(0).sqrt()
    value = c * cos_m - sin_t * sin_m
    by_cos = cos_m + c * sin_m / sin_t.clamp_min(math.sqrt(torch.finfo(c.dtype).eps))
    by_m2 = -(sin_t * cos_m + c * sin_m)

    if form.guard == "clip":
        # theta + m2 below e or above pi - e
        e = form.angle_eps
        low = (e - m2 > 0) & (c > (e - m2).clamp(0, math.pi).cos())
        high = (m2 + e > 0) & (c < (math.pi - e - m2).clamp(0, math.pi).cos())
        value = torch.where(low, math.cos(e), torch.where(high, -math.cos(e), value))
        by_cos, by_m2 = (torch.where(low | high, 0.0, t) for t in (by_cos, by_m2))
    elif form.guard in ("mm", "mmm"):
        past = (m2 > 0) & (c <= -cos_m)
        if form.guard == "mm":
            beyond, beyond_by_m2 = c - m2 * sin_m, -(sin_m + m2 * cos_m)
        else:
            beyond, beyond_by_m2 = c - 1 + cos_m, -sin_m
        value = torch.where(past, beyond, value)
        by_cos = torch.where(past, 1.0, by_cos)
        by_m2 = torch.where(past, beyond_by_m2, by_m2)
    elif form.guard == "easy":
        value = torch.where(c > 0, value, c)
        by_cos = torch.where(c > 0, by_cos, 1.0)
        by_m2 = torch.where(c > 0, by_m2, 0.0)

    by_cos = torch.ones_like(c) if form.grad == "straight_through" else by_cos
    return value - m3, torch.where(inside, by_cos, 0.0), form.m2_u * by_m2 - form.m3_u


def row_factor(norm: Tensor, labels: Tensor, form: MarginForm) -> tuple[Tensor, Tensor]:
    """``u`` of :class:`MarginForm` and its derivative with respect to the norm, each (B,)."""
    zero = torch.zeros_like(norm)
    if form.source == "constant":
        return zero, zero
    if form.source == "class":
        known = (labels >= 0) & (labels < form.table.numel())
        return form.table.to(norm.dtype)[torch.where(known, labels, 0)], zero
    if form.source == "row":
        return form.table.to(norm.dtype), zero
    clipped = norm.clamp(form.low, form.high)
    if form.source == "norm":
        return clipped, ((norm >= form.low) & (norm <= form.high)).to(norm.dtype)
    z = (clipped - form.mean.to(norm.dtype)) / (form.std.to(norm.dtype) + form.eps)
    return (z * form.h).clamp(-1, 1), zero


class ReferenceBackend(Composed):
    """Dense and simple: stores the (B, C) logits."""

    name = "reference"
    precisions = ("fp32",)
    max_dim = max_k = math.inf
    note = ""

    def unavailable(self) -> str | None:
        return None

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def row_prologue(self, x: Tensor, labels: Tensor | None, ema: NormEma | None):
        x = x.to(compute_dtype(x.dtype))
        if labels is not None:
            x = torch.where((labels >= 0)[:, None], x, 0)
        norm = torch.linalg.vector_norm(x, dim=1)
        x_hat = (x * inverse_norm(x)).contiguous()
        if ema is None:
            return x_hat, norm, x.new_empty(0), x.new_empty(0)
        return x_hat, norm, *advance(ema, moments(norm, labels, ema)[None])

    def _columns(self, x_hat, weight, index, labels, hard, class_start):
        """Centres, unit centres, cosines, masks of negatives and targets, f(c) and f'(c)."""
        count = weight.shape[0] if index is None else index.shape[0]
        present = torch.ones(count, dtype=torch.bool, device=weight.device)
        if index is not None:
            present = inside(index, weight.shape[0])
            weight = take(weight, index, 0)
        w = weight.to(x_hat.dtype)
        w_hat = w * inverse_norm(w)
        cos = x_hat @ w_hat.t()
        own = torch.arange(count, device=weight.device) == (labels - class_start)[:, None]
        negative, target = present & ~own, present & own
        f, slope = cos, torch.ones_like(cos)
        if hard is not None:
            harder = cos > hard.threshold.to(cos.dtype)[:, None]
            a, b, d = hard.coefficients.to(cos.dtype)
            f = torch.where(harder, a * cos**2 + b * cos + d, cos)
            slope = torch.where(harder, 2 * a * cos + b, slope)
        return w, w_hat, cos, negative, target, f, slope

    def row_stats(
        self, x_hat, weight, index, labels, scale, hard, class_start, want_pull, precision
    ) -> RowStats:
        _, w_hat, cos, negative, target, f, slope = self._columns(
            x_hat, weight, index, labels, hard, class_start
        )
        logits = torch.where(negative, scale * f, -math.inf)
        lse_neg = torch.logsumexp(logits, dim=1)
        cos_y = torch.where(target, cos, 0).sum(1)
        max_neg = (
            torch.where(negative, cos, -math.inf).amax(1) if cos.shape[1] else cos_y - math.inf
        )
        pull = x_hat.new_empty((0, x_hat.shape[1]))
        if want_pull:
            pull = (_softmax(logits, lse_neg) * slope) @ w_hat
        return RowStats(lse_neg, cos_y, max_neg, pull)

    def row_stats_backward(self, weight: Tensor, part: GradientFactors) -> Tensor:
        w, w_hat, _, negative, target, f, slope = self._columns(
            part.x_hat, weight, part.index, part.labels, part.hard, part.class_start
        )
        p = _softmax(torch.where(negative, part.scale * f, -math.inf), part.lse_neg)
        by_negative = part.d_lse[:, None] * part.scale * p * slope
        grad = torch.where(target, part.d_cos[:, None], by_negative)
        d_w_hat = grad.t() @ part.x_hat
        radial = (d_w_hat * w_hat).sum(1, keepdim=True)
        return ((d_w_hat - radial * w_hat) * inverse_norm(w)).to(weight.dtype)

    def row_topk(self, x_hat, weight, index, labels, k, class_start, precision):
        _, _, cos, negative, target, _, _ = self._columns(
            x_hat, weight, index, labels, None, class_start
        )
        cos_y = torch.where(target, cos, 0).sum(1)
        masked = torch.where(negative, cos, -math.inf)
        # a stable sort, not topk: ties go to the lower column
        values, nearest = masked.sort(dim=1, descending=True, stable=True)
        values, nearest = values[:, :k], nearest[:, :k]
        missing = (0, k - values.shape[1])
        values, nearest = F.pad(values, missing, value=-math.inf), F.pad(nearest, missing, value=-1)
        nearest = torch.where(values > -math.inf, nearest, -1)
        return values.contiguous(), nearest.contiguous(), cos_y

    def margin_rows(self, cos_y, lse_neg, norm, labels, form: MarginForm):
        u, u_by_norm = row_factor(norm, labels, form)
        psi, by_cos, by_u = psi_and_slopes(cos_y, u, form)
        gap = lse_neg - form.scale * psi
        valid = labels >= 0
        # 1 - p_y as a sigmoid of the gap stays accurate as p_y -> 1
        miss = torch.sigmoid(gap)
        loss = gap.clamp_min(0) + torch.log1p(torch.exp(-gap.abs()))
        parts = (
            loss,
            -form.scale * miss * by_cos,
            miss,
            -form.scale * miss * by_u * u_by_norm,
            cos_y - psi,
        )
        return tuple(torch.where(valid, part, 0) for part in parts)

    def permutation(self, key: Tensor, size: int, count: int) -> Tensor:
        return _permutation.permutation(key, size, count)


def _softmax(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), 0 in rows without negatives (lse = -inf)."""
    empty = torch.isneginf(lse)
    p = torch.exp(logits - torch.where(empty, 0, lse)[:, None])
    return torch.where(empty[:, None], 0, p)


BACKEND = ReferenceBackend()
