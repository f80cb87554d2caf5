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


def _unit(features: Tensor) -> Tensor:
    """Unit rows [N, D] in float64; raises ValueError if some are not finite."""
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features must be finite: these have NaN or infinite values")
    return F.normalize(features.double(), dim=1)


def all_pairs(features: Tensor, people: Tensor) -> Pairs:
    """features [N, D] (any length, normalised here), people [N] -> cosines of N(N-1)/2 pairs."""
    unit = _unit(features)
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
    unit = _unit(features)
    cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return (people[cosine.argmax(dim=1)] == people).double().mean().item()


def ten_fold_accuracy(features: Tensor, same: Tensor, folds: int = 10) -> tuple[float, float]:
    """Accuracy of pairs as LFW defines it: mean and standard deviation over the folds.

    Each fold of consecutive pairs is judged by the threshold that is best on the other folds. The
    threshold lies halfway between two scores, so it can separate all that are different.

    Args:
        features: [2 P, D], pair i being rows 2 i and 2 i + 1; any length.
        same: [P] bool.
        folds: from 2 to P.

    Raises:
        ValueError: sizes do not match, or fewer pairs than folds.
    """
    if len(features) != 2 * len(same) or not 2 <= folds <= len(same):
        raise ValueError(
            f"{len(features)} features, {len(same)} answers and {folds} folds: expected two "
            "features per answer, and from two folds to one per answer"
        )
    unit = _unit(features)
    score, same = (unit[::2] * unit[1::2]).sum(1), same.to(unit.device)
    fold = torch.arange(len(same), device=unit.device) * folds // len(same)
    found = []
    for one in range(folds):
        judged = fold == one
        threshold = _best_threshold(score[~judged], same[~judged])
        right = (score[judged] >= threshold) == same[judged]
        found.append(right.double().mean())
    return torch.stack(found).mean().item(), torch.stack(found).std(unbiased=False).item()


def _best_threshold(score: Tensor, same: Tensor) -> Tensor:
    """Lowest threshold with the most correct answers; halfway between neighbouring scores."""
    values = score.unique()
    between = (values[1:] + values[:-1]) / 2
    thresholds = torch.cat([values[:1] - 1, between, values[-1:] + 1])
    accepted = [
        len(some) - torch.searchsorted(some.sort().values, thresholds)
        for some in (score[same], score[~same])
    ]
    return thresholds[(accepted[0] - accepted[1]).argmax()]
