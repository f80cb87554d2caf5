"""Random inputs, the same for every contender."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case

CHUNK = 1 << 28
"""Numbers drawn at a time."""
BATCHES = 4
"""Batches that a run rotates through, so that none stays in a cache."""


def centres(case: Case, device: torch.device, unit: bool = False, seed: int = 0) -> Tensor:
    """(C, D) centres in the case's dtype, N(0, 0.01^2) as initialised; ``unit``: of unit length."""
    g = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(case.classes, case.dim, device=device, dtype=getattr(torch, case.dtype))
    for rows in weight.split(max(1, CHUNK // case.dim)):  # float32 of all might not fit
        drawn = torch.empty(rows.shape, device=device).normal_(0, 0.01, generator=g)
        rows.copy_(F.normalize(drawn) if unit else drawn)
    return weight


def batches(
    case: Case, device: torch.device, unit: bool = False, seed: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """BATCHES of embeddings (B, D) float32 with norms about 20 (``unit``: 1), and labels (B,)."""
    g = torch.Generator(device).manual_seed(seed)
    found = []
    for _ in range(BATCHES):
        x = torch.randn(case.batch, case.dim, device=device, generator=g)
        x *= (20 + 5 * torch.randn(case.batch, 1, device=device, generator=g)).clamp_min(1)
        x = F.normalize(x) if unit else x / case.dim**0.5
        labels = torch.randint(0, case.classes, (case.batch,), device=device, generator=g)
        found.append((x.requires_grad_(), labels))
    return found
