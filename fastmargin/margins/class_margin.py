"""A margin of its own for each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastmargin.margins import guards, limits
from fastmargin.margins.base import SoftmaxMargin
from fastmargin.spec import MarginForm


class ClassMargin(SoftmaxMargin):
    """``psi = cos(theta_y + m_y)`` or ``cos(theta_y) - m_y``, with given margins ``m``.

    For margins that follow from the data set, such as larger ones for small classes::

        counts = faces.class_counts()
        fm.ClassMargin(0.05 + 0.45 * counts**-0.25)  # dynamic margin, Ha et al. 2020; 2010.05350
        fm.ClassMargin(0.5 * (counts.min() / counts) ** 0.25, angular=False)  # LDAM; 1906.07413

    ``m`` may be set between steps. It is not in ``state_dict``: set it again after loading. With
    sharded classes every process has all of it. Classes added later get the mean.

    Args:
        m: (C,) margins, in radians if ``angular``, else in cosine units; kept in float32.
        s: scale.
        angular: whether the margin is added to the angle.
        guard, grad: as :class:`fastmargin.ArcFace`.

    Raises:
        TypeError: m is not of numbers, or s not a number.
        ValueError: m not of one dimension, not finite or outside [0, pi] (on the cosine: [-2, 2]),
            s not positive, an unknown guard or grad; in the head: m does not have C elements.
    """

    settings: ClassVar = {
        "m": limits.anything,
        "s": limits.positive,
        "angular": limits.anything,
        "guard": limits.GUARDED["guard"],
        "grad": limits.GUARDED["grad"],
    }

    def __init__(
        self,
        m: Tensor | Sequence[float],
        s: float = 64.0,
        angular: bool = True,
        guard: str = "mm",
        grad: str = "exact",
    ) -> None:
        super().__init__(s)
        limit = limits.angle if angular else limits.cosine_difference
        self.settings = self.settings | {"m": limits.Table(limit)}
        self.angular, self.guard, self.grad = angular, guard, grad
        self.register_buffer("m", self.settings["m"]("m", m), persistent=False)

    def __setattr__(self, name: str, value) -> None:
        before = self._buffers.get("m") if name == "m" else None
        super().__setattr__(name, value)
        if before is not None:  # stays where it was
            self._buffers["m"] = self.m.to(before)

    def bind(
        self,
        num_classes: int,
        embedding_size: int,
        device: torch.device | None = None,
        here: tuple[int, int] | None = None,
    ) -> None:
        if self.m.shape != (num_classes,):
            raise ValueError(
                f"m has {self.m.numel()} margins, the classifier {num_classes} classes: give one "
                "for each"
            )

    def change_classes(self, change) -> None:
        self.m = change.table(self.m, self.m.mean().item())

    def forward(self, cos_y: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        margin = self.m.to(cos_y.dtype)[labels.clamp(0, self.m.numel() - 1)]
        if self.angular:
            return guards.add_angle(cos_y, margin, self.guard, self.grad)
        return cos_y - margin

    def form(self) -> MarginForm:
        table = {"source": "class", "table": self.m}
        if self.angular:
            return MarginForm(self.s, m2_u=1.0, guard=self.guard, grad=self.grad, **table)
        # as CosFace: with an added angle of 0 the derivative is 1
        return MarginForm(self.s, m3_u=1.0, grad="straight_through", **table)
