"""ArcFace: an additive margin on the angle."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmargin.margins import guards, limits
from fastmargin.margins.base import SoftmaxMargin
from fastmargin.spec import MarginForm


class ArcFace(SoftmaxMargin):
    """``psi = cos(theta_y + m)`` (Deng et al. 2019; arXiv 1801.07698).

    Public heads agree for theta_y + m <= pi, and differ beyond it and in the gradient:
    insightface (since December 2022) is ``guard="none", grad="straight_through"``; the AdaFace
    repository ``guard="clip", cos_eps=1e-4, angle_eps=1e-4``; pytorch-metric-learning, TFace and
    speechbrain ``guard="mm"``; wespeaker ``guard="mmm"``; MagFace ``guard="easy"``.

    Args:
        m: margin in radians.
        s: scale.
        guard: behaviour past pi, see :mod:`fastmargin.margins.guards`.
        grad: "exact", or "straight_through": derivative with respect to the target cosine set to 1.
        cos_eps: the target cosine is clamped to ``+-(1 - cos_eps)``.
        angle_eps: the ``clip`` guard clamps the angle to ``[angle_eps, pi - angle_eps]``, radians.

    Raises:
        TypeError: a numeric setting is not a number.
        ValueError: m outside [0, pi], s not positive, cos_eps outside [0, 0.5], angle_eps outside
            [0, pi/4], or an unknown guard or grad.
    """

    settings: ClassVar = {
        "m": limits.angle,
        "s": limits.positive,
        **limits.GUARDED,
    }

    def __init__(
        self,
        m: float = 0.5,
        s: float = 64.0,
        guard: str = "mm",
        grad: str = "exact",
        cos_eps: float = 0.0,
        angle_eps: float = 1e-3,
    ) -> None:
        super().__init__(s)
        self.m, self.guard, self.grad = m, guard, grad
        self.cos_eps, self.angle_eps = cos_eps, angle_eps

    def forward(self, cos_y: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        m = torch.full_like(cos_y, self.m)
        return guards.add_angle(cos_y, m, self.guard, self.grad, self.cos_eps, self.angle_eps)

    def form(self) -> MarginForm:
        return MarginForm(
            self.s,
            m2=self.m,
            guard=self.guard,
            grad=self.grad,
            cos_eps=self.cos_eps,
            angle_eps=self.angle_eps,
        )
