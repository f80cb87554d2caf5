"""Cosine scores of a batch against all classes, computed on demand."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fastmargin import ops
from fastmargin.backends.reference import psi_and_slopes, row_factor
from fastmargin.norms import inverse_norm
from fastmargin.rows import inside
from fastmargin.spec import MarginForm

MOST_STREAMED = 16
"""Largest k of a streamed ``topk``."""


class Scores(Protocol):
    """What :class:`fastmargin.compat.logits.StreamedLogits` needs; all of it differentiable.

    x: (B, D) rows of unit length. inputs: the tensors, including x, that receive gradients.
    """

    x: Tensor
    inputs: tuple[Tensor, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def rows(self, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """``-log softmax(logits)[target]`` and ``logits[target]``, (B,) each.

        target: (B,) int64. counted: (B,) bool; a row where it is False, or with a target outside
        [0, C), is ignored, and its results are 0.
        """

    def total(self, class_weight: Tensor | None) -> Tensor:
        """(B,) sum of the logits over all classes, each times its (C,) weight."""

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits (B, k), descending, and their classes; k <= MOST_STREAMED."""

    def dense(self) -> Tensor:
        """All (B, C) of them."""

    def detached(self) -> Scores:
        """The same without gradient."""

    def with_rows(self, x: Tensor) -> Scores:
        """The same with other rows."""


def _without_autocast(method):
    """Runs a method without autocast, so products keep the logits' dtype, as in the passes."""

    @functools.wraps(method)
    def run(self, *args):
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args)

    return run


@dataclass(frozen=True)
class CentreScores:
    """``s * cos`` with a margin on each row's target class, by the passes of :mod:`fastmargin.ops`.

    x: (B, D) float32 or float64, rows of unit length (not normalised again). weight: (C, D) raw
    centres, any strides. labels: (B,) int64, whose entries have the margin of ``form``; None for
    cosines without margin, where ``form`` only gives the scale. norm: (B,) used as the embedding's
    norm by the margin. sparse_grad: as :func:`fastmargin.ops.row_stats`. given: the tensor that
    labels were copied from, to recognise it, and its version.
    """

    x: Tensor
    weight: Tensor
    form: MarginForm
    labels: Tensor | None = None
    norm: Tensor | None = None
    backend: str = "auto"
    precision: str = "auto"
    sparse_grad: bool = False
    given: tuple[Tensor, int] | None = None

    @staticmethod
    def of(
        x: Tensor,
        weight: Tensor,
        form: MarginForm,
        labels: Tensor | None = None,
        norm: Tensor | None = None,
        backend: str = "auto",
        precision: str = "auto",
        sparse_grad: bool = False,
    ) -> CentreScores:
        """Scores that later changes of the labels or of the margin's state do not affect."""
        given = None
        if labels is not None:
            if not labels.is_inference():
                given = labels, labels._version
            labels = labels.reshape(-1).long().clone()
        state = {
            name: None if getattr(form, name) is None else getattr(form, name).detach().clone()
            for name in ("mean", "std")
        }
        form = replace(form, **state)
        return CentreScores(x, weight, form, labels, norm, backend, precision, sparse_grad, given)

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
        return self.x, self.weight

    def detached(self) -> CentreScores:
        return replace(self, x=self.x.detach(), weight=self.weight.detach())

    def with_rows(self, x: Tensor) -> CentreScores:
        return replace(self, x=x)

    def _norm(self) -> Tensor:
        return self.x.new_ones(self.shape[0]) if self.norm is None else self.norm.to(self.dtype)

    def _psi(self, cos_y: Tensor, labels: Tensor) -> Tensor:
        """The target's logit over s, from its cosine and the label that has the margin."""
        u, _ = row_factor(self._norm(), labels, self.form)
        psi, slope, _ = psi_and_slopes(cos_y.detach(), u, self.form)
        return psi + slope * (cos_y - cos_y.detach())

    def _is_given(self, target: Tensor, takes_part: Tensor) -> bool:
        """Whether the target is the tensor of labels that the margin is on, unchanged.

        Decided without waiting for a GPU; on a CPU another tensor with the same entries will do.
        """
        if self.labels is None:
            return True
        if self.given is not None and not target.is_inference():
            tensor, version = self.given
            if target is tensor and target._version == version:
                return True
        if target.device.type != "cpu":
            return False
        return torch.equal(target[takes_part], self.labels[takes_part])

    @_without_autocast
    def rows(self, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        takes_part = counted & inside(target, self.shape[1])
        same = self._is_given(target, takes_part)
        x = torch.where(takes_part[:, None], self.x, 0)
        labels = target if self.labels is None else self.labels
        labels = torch.where(takes_part, labels, -1)
        stats = ops.row_stats(
            x,
            self.weight,
            labels,
            self.form.scale,
            precision=self.precision,
            backend=self.backend,
            sparse_grad=self.sparse_grad,
        )
        loss, _ = ops.margin_rows(
            stats.cos_y, stats.lse_neg, self._norm(), labels, self.form, self.backend
        )
        logit = self.form.scale * self._psi(stats.cos_y, labels)
        if not same:
            # the margin is on another class than the target: both are terms of the same sum
            safe = torch.where(takes_part, target, 0)
            plain = self.form.scale * (x * self._unit(self.weight[safe])).sum(1)
            other = takes_part & (target != labels)
            loss = torch.where(other, loss + (logit - plain), loss)
            logit = torch.where(other, plain, logit)
        return torch.where(takes_part, loss, 0), torch.where(takes_part, logit, 0)

    def _unit(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.dtype)
        return rows * inverse_norm(rows)

    @_without_autocast
    def total(self, class_weight: Tensor | None) -> Tensor:
        factor = inverse_norm(self.weight.to(self.dtype)).squeeze(1)
        if class_weight is not None:
            factor = factor * class_weight.to(self.dtype)
        total = self.x @ (self.weight.to(self.dtype).t() @ factor)
        if self.labels is not None:
            # a label out of range, which is not checked on a GPU, must not end the process
            known = inside(self.labels, self.shape[1])
            labels = torch.where(known, self.labels, 0)
            cos_y = (self.x * self._unit(self.weight[labels])).sum(1)
            moved = torch.where(known, self._psi(cos_y, labels) - cos_y, 0)
            if class_weight is not None:
                moved = moved * class_weight.to(self.dtype)[labels]
            total = total + moved
        return self.form.scale * total

    @_without_autocast
    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        labels = self.labels
        if labels is None:
            labels = torch.full((self.shape[0],), -1, dtype=torch.int64, device=self.device)
        negatives = min(k, self.shape[1])
        cosine, index, cos_y = ops.row_topk(
            self.x,
            self.weight,
            labels,
            negatives,
            precision=self.precision,
            backend=self.backend,
            sparse_grad=self.sparse_grad,
        )
        if self.labels is not None:
            cosine = torch.cat([cosine, self._psi(cos_y, labels)[:, None]], dim=1)
            index = torch.cat([index, labels[:, None]], dim=1)
            cosine, place = cosine.topk(k, dim=1)
            index = index.gather(1, place)
        return self.form.scale * cosine, index

    @_without_autocast
    def dense(self) -> Tensor:
        logits = self.x @ self._unit(self.weight).t()
        if self.labels is not None:
            own = self.labels[:, None]
            cos_y = logits.gather(1, own)
            logits = logits.scatter(1, own, self._psi(cos_y.squeeze(1), self.labels)[:, None])
        return self.form.scale * logits

    def with_margin(self, labels: Tensor, form: MarginForm) -> CentreScores:
        """These cosines under a margin, for an original that makes these two separate steps."""
        return CentreScores.of(
            self.x,
            self.weight,
            form,
            labels,
            self.norm,
            self.backend,
            self.precision,
            self.sparse_grad,
        )

    def __deepcopy__(self, memo) -> CentreScores:
        return copy.copy(self)
