"""CosFace: an additive margin on the cosine."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastmargin.margins import limits
from fastmargin.margins.base import SoftmaxMargin
from fastmargin.spec import MarginForm


class CosFace(SoftmaxMargin):
    """``psi = cos(theta_y) - m`` (Wang et al. 2018, AM-Softmax; arXiv 1801.09414).

    Args:
        m: margin in cosine units. 0 gives the normalised softmax (NormFace).
        s: scale.
        cos_eps: the target cosine is clamped to ``+-(1 - cos_eps)``; 1e-4 in AdaFace's repository.

    Raises:
        TypeError: a numeric setting is not a number.
        ValueError: m outside [-2, 2], s not positive, or cos_eps outside [0, 0.5].
    """

    settings: ClassVar = {
        "m": limits.cosine_difference,
        "s": limits.positive,
        "cos_eps": limits.cos_eps,
    }

    def __init__(self, m: float = 0.4, s: float = 64.0, cos_eps: float = 0.0) -> None:
        super().__init__(s)
        self.m, self.cos_eps = m, cos_eps

    def forward(self, cos_y: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        return cos_y.clamp(-(1 - self.cos_eps), 1 - self.cos_eps) - self.m

    def form(self) -> MarginForm:
        # with an added angle of 0 the derivative is 1, so "straight_through" is exact
        return MarginForm(self.s, m3=self.m, grad="straight_through", cos_eps=self.cos_eps)
