"""A slowly following copy of a backbone."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn


class MomentumEncoder(nn.Module):
    """A backbone's slowly following copy, whose features go to :meth:`KappaFace.accumulate`.

    After :meth:`update` its parameters are ``momentum * own + (1 - momentum) * backbone's``.
    Buffers (batch-norm statistics) are copied; the authors' code leaves them at their
    initial values. Always in ``eval()`` mode and without gradient.
    """

    def __init__(self, backbone: nn.Module, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.encoder = deepcopy(backbone).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MomentumEncoder:
        return super().train(False)

    @torch.no_grad()
    def update(self, backbone: nn.Module) -> None:
        """Follows the backbone; call it after the optimiser's step."""
        for own, new in zip(self.encoder.parameters(), backbone.parameters(), strict=True):
            own.lerp_(new.to(own), 1 - self.momentum)
        for own, new in zip(self.encoder.buffers(), backbone.buffers(), strict=True):
            own.copy_(new)

    @torch.no_grad()
    def forward(self, *inputs):
        return self.encoder(*inputs)
