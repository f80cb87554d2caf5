"""Face verification: do two images show the same person? All scores are cosines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Cosines of all unordered pairs of images: genuine [P], of the same person; impostor [Q]."""

    genuine: Tensor
    impostor: Tensor


@dataclass(frozen=True)
class Roc:
    """Receiver operating characteristic, from the strictest threshold to the loosest.

    far: [T] fraction of impostor pairs accepted; tar: [T] fraction of genuine pairs accepted.
    """

    far: Tensor
    tar: Tensor


def all_pairs(features: Tensor, people: Tensor) -> Pairs:
    """features [N, D] (any length, normalised here), people [N] -> cosines of N(N-1)/2 pairs."""
    unit = F.normalize(features.double(), dim=1)
    first, second = torch.triu_indices(len(people), len(people), offset=1, device=people.device)
    cosine = (unit @ unit.T)[first, second]
    same = people[first] == people[second]
    return Pairs(genuine=cosine[same], impostor=cosine[~same])


def roc(pairs: Pairs) -> Roc:
    """Every distinct score is a threshold (accept when score >= threshold), starting at (0, 0)."""
    thresholds = torch.cat([pairs.genuine, pairs.impostor]).unique().flip(0)
    return Roc(
        far=_accepted(pairs.impostor, thresholds),
        tar=_accepted(pairs.genuine, thresholds),
    )


def _accepted(scores: Tensor, thresholds: Tensor) -> Tensor:
    """0, then the fraction of ``scores`` at or above each descending threshold: [T + 1]."""
    ascending = scores.sort().values
    below = torch.searchsorted(ascending, thresholds, right=False)
    share = (len(scores) - below).double() / len(scores)
    return torch.cat([share.new_zeros(1), share])


def auc(curve: Roc) -> float:
    """Area under the ROC by trapezoids: the probability that a genuine pair scores higher than an
    impostor pair, ties counted half."""
    return torch.trapezoid(curve.tar, curve.far).item()


def tar_at_far(curve: Roc, far: float) -> float:
    """Largest fraction of genuine pairs accepted with at most a fraction ``far`` of impostors."""
    # The small tolerance keeps e.g. 45 of 4500 within 1e-2 despite rounding of the division.
    return curve.tar[curve.far <= far + 1e-12].max().item()


def rank_one(features: Tensor, people: Tensor) -> float:
    """Fraction of images whose nearest other image (by cosine) shows the same person."""
    unit = F.normalize(features.double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return (people[cosine.argmax(dim=1)] == people).double().mean().item()
