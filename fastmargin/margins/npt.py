"""NPT-Loss: a hinge loss on the target and the nearest negative centres."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmargin.margins import limits
from fastmargin.margins.base import NearestMargin
from fastmargin.spec import HingeForm


class NPT(NearestMargin):
    """``2*r * sum_k max(0, c_k - cos_y + delta)`` over the ``top_k`` nearest negative centres.

    NPT-Loss (Khalid et al. 2021; arXiv 2103.03503), with the parameters of the authors' code
    (cerebrai/npt-loss): in the paper's symbols ``r`` is r^2 and ``delta`` is Delta / (2 r^2).

    Args:
        delta: margin in cosine units.
        top_k: number of nearest negative centres used.
        r: weight of the loss.
        zero_slot: as the authors' code, which masks the target by cosine 0 and so lets that 0
            compete with the nearest: a constant negative at 90 degrees. The default is the paper's
            form, without it.

    Raises:
        TypeError: top_k is not an integer.
        ValueError: top_k below 1, or r not positive.
    """

    settings: ClassVar = {
        "delta": limits.OrTensor(limits.number),
        "top_k": limits.count,
        "r": limits.OrTensor(limits.positive),
        "zero_slot": limits.anything,
    }

    def __init__(
        self, delta: float = 0.5, top_k: int = 1, r: float = 1.0, zero_slot: bool = False
    ) -> None:
        super().__init__()
        self.delta, self.top_k, self.r, self.zero_slot = delta, top_k, r, zero_slot

    def forward(self, cos_y: Tensor, nearest: Tensor) -> Tensor:
        if self.zero_slot:
            with_zero = torch.cat([nearest, nearest.new_zeros(nearest.shape[0], 1)], dim=1)
            nearest = with_zero.topk(self.top_k, dim=1).values
        gap = nearest - cos_y[:, None] + self.delta
        # not relu: at a gap of exactly 0 the authors' code keeps the gradient
        return 2 * self.r * torch.where(gap < 0, 0, gap).sum(1)

    def form(self) -> HingeForm | None:
        if isinstance(self.r, Tensor) or isinstance(self.delta, Tensor):
            return None  # learned ones get their gradient by autograd
        return HingeForm(2 * self.r, self.delta, self.zero_slot)
