"""ElasticFace: a random margin for each row."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmargin.counter import row_normals
from fastmargin.margins import guards, limits
from fastmargin.margins.base import SoftmaxMargin
from fastmargin.spec import Draw, MarginForm


class ElasticFace(SoftmaxMargin):
    """``psi = cos(theta_y + e)`` or ``cos(theta_y) - e``, ``e ~ N(m, std^2)`` drawn per row.

    Boutros et al. 2022; arXiv 2109.09416. The "plus" variant of the authors' code
    (fdbtrs/ElasticFace) assigns its sorted margins by the wrong permutation, so they stay random:
    it equals this margin with another ``std``. In ``eval()`` the margin is m.

    Args:
        m: mean of the margin, in radians if ``angular``, else in cosine units; the authors use 0.5
            and 0.35.
        std: its standard deviation, in the same units; the authors use 0.0125 to 0.05.
        s: scale.
        angular: whether the margin is added to the angle.
        guard, grad: as :class:`fastmargin.ArcFace`.
        seed: of the draws, which depend on seed, step, replica and the row's position among the
            rows with label >= 0: the same on every shard.

    Buffers, saved: ``seed`` (1,) int64, and ``step`` (1,) int64, the number of training steps.

    Raises:
        TypeError: a numeric setting is not a number.
        ValueError: m outside [0, pi] (on the cosine: [-2, 2]), std negative, s not positive, or an
            unknown guard or grad.
    """

    settings: ClassVar = {
        "m": limits.number,
        "std": limits.not_negative,
        "s": limits.positive,
        "angular": limits.anything,
        "guard": limits.GUARDED["guard"],
        "grad": limits.GUARDED["grad"],
        "seed": limits.anything,
    }
    observes_for_later = True  # a step's draws depend on the number of earlier steps

    def __init__(
        self,
        m: float = 0.5,
        std: float = 0.0125,
        s: float = 64.0,
        angular: bool = True,
        guard: str = "none",
        grad: str = "exact",
        seed: int = 0,
    ) -> None:
        super().__init__(s)
        self.settings = self.settings | {"m": limits.angle if angular else limits.cosine_difference}
        self.m, self.std, self.angular, self.guard, self.grad = m, std, angular, guard, grad
        self.register_buffer("seed", torch.tensor([seed]))
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))

    def observe(self, x_hat: Tensor, labels: Tensor) -> None:
        self.step.add_(1)

    def forward(self, cos_y: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        margin = torch.full_like(cos_y, self.m)
        if self.training:
            drawn = row_normals(self.seed, self.step, labels, self.processes.place)
            margin += self.std * drawn.to(cos_y)
        if self.angular:
            return guards.add_angle(cos_y, margin, self.guard, self.grad)
        return cos_y - margin

    def form(self) -> MarginForm:
        drawing = {"source": "constant"}
        if self.training:
            drawing = {"source": "row", "draw": Draw(self.seed, self.step, self.processes.place)}
        if self.angular:
            angle = {"m2": self.m, "m2_u": self.std, "guard": self.guard, "grad": self.grad}
            return MarginForm(self.s, **angle, **drawing)
        # as CosFace: with an added angle of 0 the derivative is 1
        return MarginForm(self.s, m3=self.m, m3_u=self.std, grad="straight_through", **drawing)
