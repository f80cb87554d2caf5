"""The same head trained twice, by fastmargin and in plain PyTorch: how far do the losses part?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastmargin as fm
from fastmargin.demo.faces import Faces
from fastmargin.demo.plain_head import PlainArcFace, plain_arcface_loss
from fastmargin.demo.training import Recipe, Trained, train


@dataclass(frozen=True)
class Twin:
    """Two trainings from the same seeds. Losses [steps].

    largest_gap: largest difference of the two curves. A training amplifies rounding errors, so
    ``rounding_gap`` gives the yardstick: the same figure for plain PyTorch against itself, started
    with centres that differ in the last bit. ``same_state_gap`` has no history in it: the largest
    difference of the two losses, evaluated step by step on the same embeddings and centres.
    """

    fast: Tensor
    plain: Tensor
    largest_gap: float
    rounding_gap: float
    same_state_gap: float


class _Watched(nn.Module):
    """A fastmargin head that also evaluates the plain loss of the same inputs, without gradient."""

    def __init__(self, head: fm.MarginHead) -> None:
        super().__init__()
        self.head, self.gaps = head, []

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = self.head(embeddings, labels)
        with torch.no_grad():
            margin = self.head.margin
            plain = plain_arcface_loss(embeddings, self.head.weight, labels, margin.m, margin.s)
            self.gaps.append((loss - plain).abs().detach())
        return loss


class _LastBit(PlainArcFace):
    """Plain head whose initial centres differ by one rounding from its parent's."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        with torch.no_grad():
            self.weight.copy_(torch.nextafter(self.weight, torch.full_like(self.weight, torch.inf)))


def train_twins(
    margin: fm.ArcFace,
    faces: Faces,
    recipe: Recipe,
    seed: int,
    backend: str,
    after_epoch: Callable[[], None] = lambda: None,
) -> Twin:
    """Three trainings: fastmargin, plain PyTorch, and plain PyTorch from the neighbouring bit."""

    def run(new_head: Callable[[int, int], nn.Module]) -> Trained:
        return train(new_head, faces, recipe, seed, after_epoch)

    fast = run(lambda d, c: _Watched(fm.MarginHead(d, c, margin, backend=backend)))
    plain = run(lambda d, c: PlainArcFace(d, c, margin.m, margin.s))
    nudged = run(lambda d, c: _LastBit(d, c, margin.m, margin.s))
    return Twin(
        fast=fast.losses,
        plain=plain.losses,
        largest_gap=(fast.losses - plain.losses).abs().max().item(),
        rounding_gap=(nudged.losses - plain.losses).abs().max().item(),
        same_state_gap=torch.stack(fast.head.gaps).max().item(),
    )
