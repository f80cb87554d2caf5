"""The usual head without fastmargin: normalise, matmul, margin, ``F.cross_entropy``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmargin.class_set import draw_centres_


def plain_arcface_loss(
    embeddings: Tensor, weight: Tensor, labels: Tensor, m: float, s: float
) -> Tensor:
    """Mean ArcFace loss of embeddings [B, D], centres [C, D], labels [B]; logits [B, C] in memory.

    The margin is computed for the target cosines only, as in a careful implementation.
    """
    cosines = F.normalize(embeddings) @ F.normalize(weight).T
    column = labels[:, None]
    target = cosines.gather(1, column)
    # where theta + m > pi: c - m sin m, as with fm.ArcFace's default guard "mm"
    angle = target.clamp(-1 + 1e-7, 1 - 1e-7).acos()
    moved = torch.where(angle + m <= math.pi, torch.cos(angle + m), target - m * math.sin(m))
    return F.cross_entropy(s * cosines.scatter(1, column, moved), labels)


class PlainArcFace(nn.Module):
    """Plain-PyTorch twin of ``fm.MarginHead(D, C, fm.ArcFace(m, s))``: same initial centres."""

    def __init__(self, embedding_size: int, num_classes: int, m: float, s: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        draw_centres_(self.weight, 0, None)
        self.m, self.s = m, s

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return plain_arcface_loss(embeddings, self.weight, labels, self.m, self.s)
