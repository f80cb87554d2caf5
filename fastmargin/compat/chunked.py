"""Scores that need more than one centre and one scale per class, a chunk of classes at a time.

Plain PyTorch: a chunk's cosines are made, reduced and forgotten, and made again for the gradient,
so that (B, C) of them never exist. Slower than the passes of :mod:`fastmargin.ops`, for the heads
those cannot carry.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastmargin.margins.guards import add_angle
from fastmargin.norms import inverse_norm
from fastmargin.rows import inside

CHUNK = 4096
"""Rows of the weight whose cosines exist at a time."""


def over_chunks(function: Callable, x: Tensor, weight: Tensor, *rows: Tensor) -> list:
    """``function(cosines, first, *rows)`` of every chunk of classes, in order.

    x: (B, D) float32 or float64, of unit length. weight: (C, K, D) raw centres, any strides and
    float type; the cosine with a class is the largest of its K. ``cosines`` (B, n) are those with
    the classes ``first`` to ``first + n - 1``. Differentiable by x, weight and ``rows``; only the
    results and the inputs are kept for it.

    Raises:
        RuntimeError: in the backward pass, if the weight was written to after the forward pass.
    """
    followed = not (torch.compiler.is_compiling() or weight.is_inference())
    version = weight._version if followed else None

    def run(x: Tensor, centres: Tensor, first: int, *rows: Tensor):
        if version is not None and weight._version != version:
            raise RuntimeError(
                "the weight of the head was changed in place between the forward and the backward "
                "pass: call optimizer.step() after backward()"
            )
        return function(_cosines(x, centres), first, *rows)

    size = max(1, CHUNK // weight.shape[1])
    return [
        checkpoint(
            run, x, centres, number * size, *rows, use_reentrant=False, preserve_rng_state=False
        )
        for number, centres in enumerate(weight.split(size))
    ]


def _cosines(x: Tensor, centres: Tensor) -> Tensor:
    """(B, n) from x (B, D) and raw centres (n, K, D)."""
    n, k, _ = centres.shape
    centres = centres.to(x.dtype)
    unit = (centres * inverse_norm(centres)).flatten(0, 1)
    # autocast may multiply in 16 bits; what follows does not
    cosines = (x @ unit.t()).to(x.dtype)
    return cosines if k == 1 else cosines.unflatten(1, (n, k)).max(2).values


def own_cosine(x: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """(B,) cosine of every row with its class; ``classes`` (B,) int64, those outside count as 0."""
    own = weight[torch.where(inside(classes, weight.shape[0]), classes, 0)].to(x.dtype)
    return (x[:, None, :] * (own * inverse_norm(own))).sum(2).max(1).values


@dataclass(frozen=True)
class ChunkedScores:
    """``scale_i * cos_ij`` with a margin on each row's own class (see :class:`Scores`).

    x: (B, D) float32 or float64, rows of unit length. weight: (C, K, D) raw centres, the cosine
    with a class is the largest of its K. scale: (B,) positive, of x's type. labels: (B,) int64,
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
        """Scores that later changes of the labels do not reach; ``scale`` a number or (B,)."""
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
    def requires_grad(self) -> bool:
        return self.x.requires_grad or self.weight.requires_grad or self.scale.requires_grad

    def detached(self) -> ChunkedScores:
        x, weight, scale = (each.detach() for each in (self.x, self.weight, self.scale))
        return replace(self, x=x, weight=weight, scale=scale)

    def _own(self, labels: Tensor) -> Tensor:
        """(B,) logits of the labels, with the margin if there is one."""
        cos_y = own_cosine(self.x, self.weight, labels)
        return self.scale * (cos_y if self.labels is None else self.psi(cos_y))

    def _other(self, classes: Tensor) -> Tensor:
        """(B,) logits of classes that are not the labels."""
        cosine = own_cosine(self.x, self.weight, classes)
        if self.nearer is not None:
            index, angle = self.nearer
            penalised = (index == classes[:, None]).any(1)
            cosine = torch.where(penalised, _turned(cosine, angle), cosine)
        return self.scale * cosine

    def _penalised(self, cosines: Tensor, first: int) -> Tensor:
        """The cosines of a chunk after the inter-top-k penalty."""
        if self.nearer is None:
            return cosines
        index, angle = self.nearer
        n = cosines.shape[1]
        # what belongs to other chunks goes to a column that is cut off again
        place = torch.where(inside(index - first, n), index - first, n)
        cosines = F.pad(cosines, (0, 1))
        return cosines.scatter(1, place, _turned(cosines.gather(1, place), angle))[:, :n]

    def _each(self, function: Callable, labels: Tensor, own: Tensor) -> list:
        """``function(logits (B, n), first)`` of every chunk, with ``own`` (B,) at the labels."""

        def logits(cosines: Tensor, first: int, scale: Tensor, own: Tensor):
            found = scale[:, None] * self._penalised(cosines, first)
            classes = torch.arange(first, first + found.shape[1], device=found.device)
            found = torch.where(classes == labels[:, None], own[:, None], found)
            return function(found, first)

        return over_chunks(logits, self.x, self.weight, self.scale, own)

    def _labelled(self) -> tuple[Tensor, Tensor]:
        """Labels and their logits for :meth:`_each`; -1, which is no class, without margin."""
        if self.labels is None:
            return torch.full_like(self.scale, -1, dtype=torch.int64), self.scale.detach()
        return self.labels, self._own(self.labels)

    def rows(self, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        takes_part = counted & inside(target, self.shape[1])
        # NaN in a row that is ignored reaches nothing
        x = torch.where(takes_part[:, None], self.x, 0)
        kept = replace(self, x=x, scale=torch.where(takes_part, self.scale, 1))
        labels = torch.where(takes_part, target if self.labels is None else self.labels, -1)
        logit = kept._own(labels)
        nothing = torch.full_like(logit, -math.inf)
        parts = kept._each(lambda found, _: torch.logsumexp(found, 1), labels, nothing)
        lse_neg = torch.logsumexp(torch.stack(parts, 1), 1)
        # 1 - p_y keeps its digits where p_y -> 1
        loss = -F.logsigmoid(logit - lse_neg)
        if self.labels is not None:
            # the margin is on another class than the target: both stand in the same sum
            other = takes_part & (target != labels)
            plain = kept._other(target)
            loss = torch.where(other, loss + (logit - plain), loss)
            logit = torch.where(other, plain, logit)
        return torch.where(takes_part, loss, 0), torch.where(takes_part, logit, 0)

    def total(self, class_weight: Tensor | None) -> Tensor:
        def weighted(found: Tensor, first: int) -> Tensor:
            if class_weight is None:
                return found.sum(1)
            here = class_weight[first : first + found.shape[1]]
            return (found * here.to(found.dtype)).sum(1)

        return torch.stack(self._each(weighted, *self._labelled())).sum(0)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        def largest(found: Tensor, first: int) -> tuple[Tensor, Tensor]:
            values, place = found.topk(min(k, found.shape[1]), dim=1)
            return values, place + first

        values, index = zip(*self._each(largest, *self._labelled()), strict=True)
        values, place = torch.cat(values, 1).topk(k, dim=1)
        return values, torch.cat(index, 1).gather(1, place)

    def dense(self) -> Tensor:
        return torch.cat(self._each(lambda found, _: found, *self._labelled()), 1)

    def __deepcopy__(self, memo) -> ChunkedScores:
        return copy.copy(self)


def _turned(cosine: Tensor, angle: float) -> Tensor:
    """``cos(theta - angle)``."""
    return add_angle(cosine, torch.full_like(cosine, -angle), "none", "exact")
