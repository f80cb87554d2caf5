"""MagFace: the margin grows with the embedding norm, and the norm is trained with it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastmargin.margins import guards, limits
from fastmargin.margins.base import SoftmaxMargin
from fastmargin.spec import MarginForm


class MagFace(SoftmaxMargin):
    """``psi = cos(theta_y + m(a))``, ``a = clip(||x||, l_a, u_a)`` (Meng et al. 2021).

    arXiv 2103.06627. ``m(a)`` rises linearly from ``l_margin`` at ``l_a`` to ``u_margin`` at
    ``u_a``. Each row's loss has the regulariser ``lambda_g * (a / u_a^2 + 1 / a)``, which rewards
    large norms. Unlike :class:`fastmargin.AdaFace`, both have a gradient to the norm, where it is
    inside the range.

    The defaults are those of the authors' training script (IrvingMeng/MagFace). By the paper
    ``lambda_g`` must be at least ``s (u_margin - l_margin) / (u_a - l_a) * u_a^2 l_a^2 /
    (u_a^2 - l_a^2)`` for the norm of easy images to grow: 22.6 for the defaults.

    Args:
        l_a, u_a: range of norms, above 0.
        l_margin, u_margin: margins at its ends, in radians.
        lambda_g: weight of the regulariser.
        s: scale.
        guard, grad: as :class:`fastmargin.ArcFace`; the authors' ``easy_margin`` is "easy", without
            it "mm".

    Raises:
        TypeError: a numeric setting is not a number.
        ValueError: l_a not below u_a, l_a, u_a or s not positive, a margin outside [0, pi],
            lambda_g negative, or an unknown guard or grad.
    """

    settings: ClassVar = {
        "l_a": limits.positive,
        "u_a": limits.positive,
        "l_margin": limits.angle,
        "u_margin": limits.angle,
        "lambda_g": limits.not_negative,
        "s": limits.positive,
        "guard": limits.GUARDED["guard"],
        "grad": limits.GUARDED["grad"],
    }

    def __init__(
        self,
        l_a: float = 10.0,
        u_a: float = 110.0,
        l_margin: float = 0.45,
        u_margin: float = 0.8,
        lambda_g: float = 35.0,
        s: float = 64.0,
        guard: str = "easy",
        grad: str = "exact",
    ) -> None:
        super().__init__(s)
        self.l_a, self.u_a, self.l_margin, self.u_margin = l_a, u_a, l_margin, u_margin
        self.lambda_g, self.guard, self.grad = lambda_g, guard, grad
        self._line()

    def _line(self) -> tuple[float, float]:
        """Slope and intercept of the margin as a function of the norm."""
        if not self.l_a < self.u_a:
            raise ValueError(f"l_a must be below u_a, got {self.l_a} and {self.u_a}")
        slope = (self.u_margin - self.l_margin) / (self.u_a - self.l_a)
        return slope, self.l_margin - slope * self.l_a

    def forward(self, cos_y: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        slope, intercept = self._line()
        angle = intercept + slope * norm.clamp(self.l_a, self.u_a)
        return guards.add_angle(cos_y, angle.to(cos_y.dtype), self.guard, self.grad)

    def form(self) -> MarginForm:
        slope, intercept = self._line()
        return MarginForm(
            self.s,
            m2=intercept,
            m2_u=slope,
            source="norm",
            guard=self.guard,
            grad=self.grad,
            low=self.l_a,
            high=self.u_a,
        )

    def penalty(self, norm: Tensor) -> Tensor:
        a = norm.clamp(self.l_a, self.u_a)
        return self.lambda_g * (a / self.u_a**2 + 1 / a)
