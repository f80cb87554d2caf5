"""Inter-class filter: negatives above a cosine threshold get logit 0."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmargin.margins import limits
from fastmargin.margins.base import Margin, Processes, SoftmaxMargin
from fastmargin.spec import HardRule, MarginForm, NormEma


class Filtered(SoftmaxMargin):
    """A margin under the inter-class filter of partial FC (An et al., CVPR 2022; arXiv 2203.15565).

    A negative whose cosine is above ``threshold`` is assumed to be the same person under another
    label: its logit becomes 0, as at 90 degrees, with zero gradient.

    Args:
        margin: applied to the target; a softmax margin without its own rule for negatives and
            without per-class state.
        threshold: cosine, in (0, 1); insightface's examples use 0.4.

    Raises:
        TypeError: margin is not a softmax margin, or threshold not a number.
        ValueError: margin has its own rule for negatives or per-class state, or threshold is
            outside (0, 1).
    """

    settings: ClassVar = {
        "threshold": limits.Within(1e-6, 1 - 1e-6, "a cosine, in (0, 1)"),
    }

    def __init__(self, margin: SoftmaxMargin, threshold: float) -> None:
        if not isinstance(margin, SoftmaxMargin):
            raise TypeError(f"margin must be a softmax margin such as fm.ArcFace(), got {margin!r}")
        if type(margin).hard is not SoftmaxMargin.hard or margin.per_class:
            raise ValueError(
                f"{type(margin).__name__} has its own rule for negatives or keeps per-class state: "
                "use Filtered with one that does not, such as fm.ArcFace or fm.AdaFace"
            )
        Margin.__init__(self)
        self.margin, self.threshold = margin, threshold

    @property
    def s(self) -> float:
        """Scale of the wrapped margin; may be set."""
        return self.margin.s

    @s.setter
    def s(self, s: float) -> None:
        self.margin.s = s

    @property
    def m(self) -> float:
        """``m`` of the wrapped margin; may be set."""
        return self.margin.m

    @m.setter
    def m(self, m: float) -> None:
        self.margin.m = m

    @property
    def stats(self) -> str:
        return self.margin.stats

    @property
    def observes_for_later(self) -> bool:
        return self.margin.observes_for_later

    @property
    def processes(self) -> Processes:
        return self.margin.processes

    @processes.setter
    def processes(self, processes: Processes) -> None:
        self.margin.processes = processes

    def bind(
        self,
        num_classes: int,
        embedding_size: int,
        device: torch.device | None = None,
        here: tuple[int, int] | None = None,
    ) -> None:
        self.margin.bind(num_classes, embedding_size, device, here)

    def change_classes(self, change) -> None:
        self.margin.change_classes(change)

    def hard(self, cos_y: Tensor, labels: Tensor) -> HardRule:
        return HardRule.of(torch.full_like(cos_y, self.threshold), 0.0, 0.0, 0.0)

    def form(self) -> MarginForm | None:
        return self.margin.kernel_form()

    def forward(self, cos_y: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        return self.margin(cos_y, norm, labels)

    def norm_ema(self) -> NormEma | None:
        return self.margin.norm_ema()

    def set_norm_ema(self, mean: Tensor, std: Tensor) -> None:
        self.margin.set_norm_ema(mean, std)

    def penalty(self, norm: Tensor) -> Tensor | None:
        return self.margin.penalty(norm)

    def observe(self, x_hat: Tensor, labels: Tensor) -> None:
        self.margin.observe(x_hat, labels)
