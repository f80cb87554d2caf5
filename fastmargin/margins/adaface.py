"""AdaFace: the margin depends on image quality, estimated by the embedding norm."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmargin.margins import guards, limits
from fastmargin.margins.base import SoftmaxMargin
from fastmargin.spec import MarginForm, NormEma

NORM_RANGE = (1e-3, 100.0)
STD_EPS = 1e-3


class AdaFace(SoftmaxMargin):
    """``psi = cos(theta_y - m*z) - (m + m*z)`` (Kim et al. 2022; arXiv 2204.00964).

    ``z = clip(h * (||x|| - mean) / (std + 1e-3), -1, 1)``, with ``||x||`` clipped to [1e-3, 100],
    has no gradient. Mean and std are running averages over batches, updated before the step's own
    margins are computed. A high norm (z = 1) gives ``cos(theta_y - m) - 2*m``, a low one (z = -1)
    ``cos(theta_y + m)``.

    The defaults are the official head (mk-minchul/AdaFace ``head.py``); CVLface's variant is
    ``guard="none", grad="straight_through", cos_eps=0``. Unlike both, the statistics leave out
    ignored rows, do not change in ``eval()``, and a batch of one row keeps the standard deviation
    (the official one becomes NaN for good).

    Args:
        m: margin, used both in radians and in cosine units.
        h: how strongly the norm changes the margin.
        s: scale.
        t_alpha: weight of the new batch in the running statistics.
        guard, grad, cos_eps, angle_eps: as :class:`fastmargin.ArcFace`.
        stats: "global": norm statistics over the batches of all processes; "local": of each.

    Buffers: ``batch_mean``, ``batch_std``, shape (1,), initially 20 and 100 as in the official.

    Raises:
        TypeError: a numeric setting is not a number.
        ValueError: m outside [0, pi], t_alpha outside [0, 1], s not positive, cos_eps outside
            [0, 0.5], angle_eps outside [0, pi/4], or unknown stats, guard or grad.
    """

    settings: ClassVar = {
        "m": limits.angle,
        "h": limits.number,
        "s": limits.positive,
        "t_alpha": limits.fraction,
        **limits.GUARDED,
        "stats": limits.Choice(("global", "local")),
    }
    formed = ("forward", "margin_factor")

    def __init__(
        self,
        m: float = 0.4,
        h: float = 0.333,
        s: float = 64.0,
        t_alpha: float = 0.01,
        guard: str = "clip",
        grad: str = "exact",
        cos_eps: float = 1e-3,
        angle_eps: float = 1e-3,
        stats: str = "global",
    ) -> None:
        super().__init__(s)
        self.m, self.h, self.t_alpha = m, h, t_alpha
        self.guard, self.grad, self.stats = guard, grad, stats
        self.cos_eps, self.angle_eps = cos_eps, angle_eps
        self.register_buffer("batch_mean", torch.full((1,), 20.0))
        self.register_buffer("batch_std", torch.full((1,), 100.0))

    def norm_ema(self) -> NormEma:
        return NormEma(self.batch_mean, self.batch_std, self.t_alpha, *NORM_RANGE)

    @torch.no_grad()
    def margin_factor(self, norm: Tensor) -> Tensor:
        """z (B,), in [-1, 1], of embeddings with these norms (B,)."""
        mean, std = self.batch_mean.to(norm.dtype), self.batch_std.to(norm.dtype)
        return ((norm.clamp(*NORM_RANGE) - mean) / (std + STD_EPS) * self.h).clamp(-1, 1)

    def forward(self, cos_y: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        z = self.margin_factor(norm)
        moved = guards.add_angle(
            cos_y, -self.m * z, self.guard, self.grad, self.cos_eps, self.angle_eps
        )
        return moved - (self.m + self.m * z)

    def form(self) -> MarginForm:
        low, high = NORM_RANGE
        return MarginForm(
            self.s,
            m3=self.m,
            m2_u=-self.m,
            m3_u=self.m,
            source="adaface",
            guard=self.guard,
            grad=self.grad,
            cos_eps=self.cos_eps,
            angle_eps=self.angle_eps,
            h=self.h,
            low=low,
            high=high,
            eps=STD_EPS,
            mean=self.batch_mean,
            std=self.batch_std,
        )
