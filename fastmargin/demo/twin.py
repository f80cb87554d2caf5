"""The same head trained twice, by fastmargin and in plain PyTorch: how far do losses differ?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import fastmargin as fm
from fastmargin.demo.faces import Faces
from fastmargin.demo.plain_head import PlainArcFace, plain_arcface_loss
from fastmargin.demo.training import Recipe, train


@dataclass(frozen=True)
class Twin:
    """Two training runs from the same seeds. Losses [steps], float32.

    largest_gap: largest difference between the two curves. In float32, training amplifies rounding
    errors (Adam divides nearly zero gradients by their own size), so for comparison
    ``rounding_gap`` is the same figure for plain PyTorch against itself, started from centres that
    differ in the last bit. ``double_gap`` is that of a float64 run of ``double_steps`` steps, too
    short for rounding to grow. ``same_state_gap`` does not accumulate: the largest difference of
    the two float32 losses for the same embeddings and centres.
    """

    fast: Tensor
    plain: Tensor
    largest_gap: float
    rounding_gap: float
    same_state_gap: float
    double_gap: float
    double_steps: int


class _Watched(nn.Module):
    """A fastmargin head that also computes the plain loss of the same inputs, without gradient."""

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
    """Plain head whose initial centres differ from its parent's in the last bit."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        with torch.no_grad():
            self.weight.copy_(torch.nextafter(self.weight, torch.full_like(self.weight, torch.inf)))


def train_twins(
    margin: fm.ArcFace,
    faces: Faces,
    recipe: Recipe,
    double_epochs: int,
    seed: int,
    backend: str,
    after_epoch: Callable[[], None] = lambda: None,
) -> Twin:
    """Three float32 runs of ``recipe`` (fastmargin, plain PyTorch, and plain PyTorch with the last
    bit changed), and two float64 runs of ``double_epochs`` epochs."""
    in_double = Faces(faces.pixels.double(), faces.people)
    short = replace(recipe, epochs=double_epochs)

    def fast_head(embedding_size: int, num_people: int) -> nn.Module:
        return _Watched(fm.MarginHead(embedding_size, num_people, margin, backend=backend))

    def plain_head(embedding_size: int, num_people: int) -> nn.Module:
        return PlainArcFace(embedding_size, num_people, margin.m, margin.s)

    def nudged_head(embedding_size: int, num_people: int) -> nn.Module:
        return _LastBit(embedding_size, num_people, margin.m, margin.s)

    heads = (fast_head, plain_head, nudged_head)
    fast, plain, nudged = (train(head, faces, recipe, seed, after_epoch) for head in heads)
    fast_double, plain_double = (
        train(head, in_double, short, seed, after_epoch) for head in heads[:2]
    )
    return Twin(
        fast=fast.losses,
        plain=plain.losses,
        largest_gap=(fast.losses - plain.losses).abs().max().item(),
        rounding_gap=(nudged.losses - plain.losses).abs().max().item(),
        same_state_gap=torch.stack(fast.head.gaps).max().item(),
        double_gap=(fast_double.losses - plain_double.losses).abs().max().item(),
        double_steps=len(fast_double.losses),
    )
