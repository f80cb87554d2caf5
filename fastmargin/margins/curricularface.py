"""CurricularFace: hard negatives weigh more as training progresses."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmargin.margins import guards, limits
from fastmargin.margins.base import SoftmaxMargin
from fastmargin.spec import HardRule, MarginForm


class CurricularFace(SoftmaxMargin):
    """``psi = cos(theta_y + m)``, and ``c * (t + c)`` for the cosines of hard negatives.

    Huang et al. 2020; arXiv 2004.00288.

    A negative is hard if its cosine ``c`` is above ``cos(theta_y + m)``. ``t`` is the running mean
    of the target cosines, updated before the step uses it: near 0 at first, when hard negatives are
    played down, towards 1 at the end, when they count for more.

    Differences from the authors' code (HuangYG123/CurricularFace): ignored rows, and rows of NaN,
    are left out of ``t``, ``eval()`` does not update it, and it is the mean over all processes.

    Args:
        m: margin in radians.
        s: scale.
        alpha: weight of the new batch in ``t``; 0.1 in TFace.
        guard, grad: as :class:`fastmargin.ArcFace`.

    Buffer: ``t``, shape (1,), initially 0.

    Raises:
        TypeError: a numeric setting is not a number.
        ValueError: m outside [0, pi], s not positive, alpha outside [0, 1], or an unknown guard or
            grad.
    """

    settings: ClassVar = {
        "m": limits.angle,
        "s": limits.positive,
        "alpha": limits.fraction,
        "guard": limits.GUARDED["guard"],
        "grad": limits.GUARDED["grad"],
    }

    def __init__(
        self,
        m: float = 0.5,
        s: float = 64.0,
        alpha: float = 0.01,
        guard: str = "mm",
        grad: str = "exact",
    ) -> None:
        super().__init__(s)
        self.m, self.alpha, self.guard, self.grad = m, alpha, guard, grad
        self.register_buffer("t", torch.zeros(1))
        self._next_t: Tensor | None = None

    @torch.no_grad()
    def hard(self, cos_y: Tensor, labels: Tensor) -> HardRule:
        t = self.t.to(cos_y.dtype)
        if self.training:
            known = (labels >= 0) & ~cos_y.isnan()
            found = [torch.where(known, cos_y, 0).sum(), known.sum().to(cos_y.dtype)]
            total, rows = self.processes.sum(torch.stack(found))
            # without any row t stays as it is
            t = torch.where(rows > 0, torch.lerp(t, total / rows.clamp_min(1), self.alpha), t)
        self._next_t = t
        angle = torch.full_like(cos_y, self.m)
        threshold = guards.add_angle(cos_y, angle, "none", "exact")
        coefficients = torch.cat([torch.ones_like(t), t, torch.zeros_like(t)])
        return HardRule(threshold, coefficients, bound=2.0)

    def observe(self, x_hat: Tensor, labels: Tensor) -> None:
        self.t.copy_(self._next_t)  # only now: until here the step may still fail

    def forward(self, cos_y: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        return guards.add_angle(cos_y, torch.full_like(cos_y, self.m), self.guard, self.grad)

    def form(self) -> MarginForm:
        return MarginForm(self.s, m2=self.m, guard=self.guard, grad=self.grad)
