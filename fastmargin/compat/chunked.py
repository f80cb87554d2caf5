"""Scores that need several centres per class or one scale per row, a chunk of classes at a time.

Plain PyTorch: a chunk's cosines are computed, reduced and freed, and recomputed for the gradient,
so that (B, C) of them never exist. Slower than the passes of :mod:`fastmargin.ops`, for heads that
those do not support.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmargin.first_order import first_order
from fastmargin.margins.guards import add_angle
from fastmargin.norms import inverse_norm
from fastmargin.rows import inside

CHUNK = 4096
"""Number of centres per chunk."""


def over_chunks(function: Callable, x: Tensor, weight: Tensor, *rows: Tensor) -> list[tuple]:
    """``function(cosines, first, *rows)``, a tuple of tensors, of every chunk of classes in order.

    x: (B, D) float32 or float64, of unit length. weight: (C, K, D) raw centres, any strides and
    float type; the cosine with a class is the largest of its K. ``cosines`` (B, n) are those with
    the classes ``first`` to ``first + n - 1``. Differentiable in x, weight and ``rows``
    (not in what else the function uses); only these are saved for the backward.
    """
    if torch.compiler.is_compiling():
        return [function(_cosines(x, weight), 0, *rows)]
    flat = _Chunks.apply(function, max(1, CHUNK // weight.shape[1]), x, weight, *rows)
    each = len(flat) // -(-weight.shape[0] // max(1, CHUNK // weight.shape[1]))
    return [flat[i : i + each] for i in range(0, len(flat), each)]


class _Chunks(torch.autograd.Function):
    """The results of all chunks, one after the other."""

    @staticmethod
    def forward(ctx, function, size, x, weight, *rows):
        ctx.function, ctx.size = function, size
        ctx.save_for_backward(x, weight, *rows)
        kind = x.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        results = []
        for number, centres in enumerate(weight.split(size)):
            results += function(_cosines(x, centres), number * size, *rows)
        ctx.mark_non_differentiable(*(each for each in results if not each.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        x, weight, *rows = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        d_weight = torch.zeros_like(weight) if wanted[1] else None
        others = [x, *rows]
        d_others = [torch.zeros_like(each) for each in others]
        chunks = weight.split(ctx.size)
        each = len(grads) // len(chunks)
        for number, centres in enumerate(chunks):
            inputs = [x, centres, *rows]
            inputs = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
            kind, dtype, enabled = ctx.autocast
            with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
                first = number * ctx.size
                made = ctx.function(_cosines(*inputs[:2]), first, *inputs[2:])
            here = zip(made, grads[number * each : (number + 1) * each], strict=True)
            here = [(t, g) for t, g in here if g is not None and t.requires_grad]
            if not here:
                continue
            made, given = zip(*here, strict=True)
            leaves = [t for t in inputs if t.requires_grad]
            found = iter(torch.autograd.grad(made, leaves, given, allow_unused=True))
            d_x, d_centres, *d_rows = [next(found) if w else None for w in wanted]
            if d_centres is not None:
                d_weight[first : first + len(centres)] = d_centres
            for total, part in zip(d_others, [d_x, *d_rows], strict=True):
                if part is not None:
                    total += part
        d_x, *d_rows = d_others
        return None, None, d_x, d_weight, *d_rows


def _cosines(x: Tensor, centres: Tensor) -> Tensor:
    """(B, n) from x (B, D) and raw centres (n, K, D)."""
    n, k, _ = centres.shape
    centres = centres.to(x.dtype)
    unit = (centres * inverse_norm(centres)).flatten(0, 1)
    # autocast may multiply in 16 bits; what follows does not
    cosines = (x @ unit.t()).to(x.dtype)
    return cosines if k == 1 else cosines.unflatten(1, (n, k)).max(2).values


def own_cosine(x: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """(B,) cosine of every row with its class (B,) int64; without its chunks, but for a gradient
    as large as the weight."""
    own = weight[classes].to(x.dtype)
    return (x[:, None, :] * (own * inverse_norm(own))).sum(2).max(1).values


def is_class(classes: Tensor, first: int, count: int) -> Tensor:
    """(B, count) whether the columns, classes from ``first`` on, are the rows' ``classes`` (B,)."""
    return torch.arange(first, first + count, device=classes.device) == classes[:, None]


@dataclass(frozen=True)
class ChunkedScores:
    """``scale_i * cos_ij`` with a margin on each row's target class (see :class:`Scores`).

    x: (B, D) float32 or float64, rows of unit length. weight: (C, K, D) raw centres, the cosine
    with a class is the largest of its K. scale: (B,) of x's type, not negative. labels: (B,) int64,
    whose entries are ``scale * psi(cos_y)``; None for logits without margin. psi: from (B,)
    cosines, by autograd. nearer: classes (B, k) int64, none of them the label, and an angle in
    radians by which each is moved nearer to the embedding (inter-top-k penalty).
    """

    x: Tensor
    weight: Tensor
    scale: Tensor
    labels: Tensor | None = None
    psi: Callable[[Tensor], Tensor] | None = None
    nearer: tuple[Tensor, float] | None = None

    @staticmethod
    def of(
        x: Tensor,
        weight: Tensor,
        scale: float | Tensor,
        labels: Tensor | None = None,
        psi: Callable[[Tensor], Tensor] | None = None,
    ) -> ChunkedScores:
        """Scores that later changes of the labels do not affect; ``scale`` a number or (B,)."""
        if not isinstance(scale, Tensor):
            scale = x.new_full((x.shape[0],), scale)
        if labels is not None:
            labels = labels.reshape(-1).long().clone()
        return ChunkedScores(x, weight, scale, labels, psi)

    def with_nearer(self, k: int, angle: float) -> ChunkedScores:
        """These, with the k nearest wrong classes of each row moved nearer by ``angle``."""
        k = min(k, self.shape[1] - 1)
        if k < 1 or angle == 0:
            return self
        with torch.no_grad():
            last = replace(self.detached(), psi=lambda cos_y: torch.full_like(cos_y, -math.inf))
            _, index = last.topk(k)
        return replace(self, nearer=(index, angle))

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.x, self.weight, self.scale

    def detached(self) -> ChunkedScores:
        x, weight, scale = (each.detach() for each in (self.x, self.weight, self.scale))
        return replace(self, x=x, weight=weight, scale=scale)

    def with_rows(self, x: Tensor) -> ChunkedScores:
        return replace(self, x=x)

    def _plain(self, cosines: Tensor, first: int, scale: Tensor) -> Tensor:
        """The logits of a chunk (B, n) without margin, but with the inter-top-k penalty."""
        if self.nearer is not None:
            index, angle = self.nearer
            n = cosines.shape[1]
            # entries of other chunks go to an extra column that is dropped again
            place = torch.where(inside(index - first, n), index - first, n)
            cosines = F.pad(cosines, (0, 1))
            picked = cosines.gather(1, place)
            turned = add_angle(picked, torch.full_like(picked, -angle), "none", "exact")
            cosines = cosines.scatter(1, place, turned)[:, :n]
        return scale[:, None] * cosines

    def rows(self, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        takes_part = counted & inside(target, self.shape[1])
        # NaN in a row that is ignored reaches nothing
        x = torch.where(takes_part[:, None], self.x, 0)
        scale = torch.where(takes_part, self.scale, 1)
        labels = target if self.labels is None else self.labels

        def parts(cosines: Tensor, first: int, scale: Tensor):
            logits = self._plain(cosines, first, scale)
            own = is_class(labels, first, logits.shape[1])
            lse = torch.logsumexp(torch.where(own, -math.inf, logits), 1)
            chosen = is_class(target, first, logits.shape[1])
            return (
                lse,
                torch.where(own, cosines, 0).sum(1),
                torch.where(chosen, logits, 0).sum(1),
            )

        lse, cos_y, plain = zip(*over_chunks(parts, x, self.weight, scale), strict=True)
        lse_neg = torch.logsumexp(torch.stack(lse, 1), 1)
        cos_y, plain = torch.stack(cos_y).sum(0), torch.stack(plain).sum(0)
        logit = scale * (cos_y if self.labels is None else self.psi(cos_y))
        # 1 - p_y stays accurate as p_y -> 1
        loss = -F.logsigmoid(logit - lse_neg)
        # if the margin is on another class than the target, both are terms of the same sum
        other = target != labels
        loss = torch.where(other, loss + (logit - plain), loss)
        logit = torch.where(other, plain, logit)
        return torch.where(takes_part, loss, 0), torch.where(takes_part, logit, 0)

    def _each(self, function: Callable) -> list[tuple]:
        """``function(logits (B, n), first)``, a tuple of tensors, of every chunk."""
        labels, own = self.labels, self.scale
        if labels is not None:
            own = self.scale * self.psi(own_cosine(self.x, self.weight, labels))

        def apply(cosines: Tensor, first: int, scale: Tensor, own: Tensor):
            logits = self._plain(cosines, first, scale)
            if labels is not None:
                here = is_class(labels, first, logits.shape[1])
                logits = torch.where(here, own[:, None], logits)
            return function(logits, first)

        return over_chunks(apply, self.x, self.weight, self.scale, own)

    def total(self, class_weight: Tensor | None) -> Tensor:
        def weighted(logits: Tensor, first: int) -> tuple[Tensor]:
            if class_weight is not None:
                logits = logits * class_weight[first : first + logits.shape[1]].to(logits.dtype)
            return (logits.sum(1),)

        return sum(part for (part,) in self._each(weighted))

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        def largest(logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
            values, place = logits.topk(min(k, logits.shape[1]), dim=1)
            return values, place + first

        values, index = zip(*self._each(largest), strict=True)
        values, place = torch.cat(values, 1).topk(k, dim=1)
        return values, torch.cat(index, 1).gather(1, place)

    def dense(self) -> Tensor:
        return torch.cat([part for (part,) in self._each(lambda logits, _: (logits,))], 1)

    def __deepcopy__(self, memo) -> ChunkedScores:
        return copy.copy(self)
