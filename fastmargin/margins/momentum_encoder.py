"""Exponential moving average (EMA) of a backbone."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn


class MomentumEncoder(nn.Module):
    """EMA of a backbone, whose features are passed to :meth:`KappaFace.accumulate`.

    :meth:`update` sets its parameters to ``momentum * own + (1 - momentum) * backbone's`` and
    copies buffers (batch-norm statistics), which KappaFace's code leaves at their initial values.
    Always in ``eval()`` mode and without gradient.

    Args:
        backbone: copied at construction.
        momentum: in [0, 1]; not checked.
    """

    def __init__(self, backbone: nn.Module, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.encoder = deepcopy(backbone).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MomentumEncoder:
        return super().train(False)

    @torch.no_grad()
    def update(self, backbone: nn.Module) -> None:
        """Updates the average; call it after the optimiser's step."""
        for own, new in zip(self.encoder.parameters(), backbone.parameters(), strict=True):
            own.lerp_(new.to(own), 1 - self.momentum)
        for own, new in zip(self.encoder.buffers(), backbone.buffers(), strict=True):
            own.copy_(new)

    @torch.no_grad()
    def forward(self, *inputs):
        return self.encoder(*inputs)
