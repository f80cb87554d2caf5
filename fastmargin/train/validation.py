"""Verification of people who are not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from fastmargin import verification
from fastmargin.data import VerificationPairs
from fastmargin.train.images import Resized, open_faces
from fastmargin.train.settings import TrainError

MOST_IMAGES = 3000
"""Of which all pairs are compared: 4.5 million."""
RUN = 10
FAR = 1e-3

Embed = Callable[[Tensor], Tensor]
Validation = Callable[[Embed, int, int], dict[str, float]]
"""(embeds a batch of images, batch size, workers that decode) -> figures."""


def open_validation(path: Path, size: int) -> Validation:
    """``lfw.bin`` and the like, or other people's faces in the formats of the training images.

    Raises:
        OSError, ValueError: the file or folder cannot be used.
    """
    if path.suffix == ".bin":
        return _Pairs(path, size)
    return _People(path, size)


class _Pairs:
    """The accuracy of given pairs over ten folds."""

    def __init__(self, path: Path, size: int) -> None:
        self.pairs = VerificationPairs(path, Resized(size))
        if len(self.pairs.same) < 10:
            raise TrainError(f"{path} has {len(self.pairs.same)} pairs, fewer than ten folds")

    def __call__(self, embed: Embed, batch: int, workers: int) -> dict[str, float]:
        features = _embedded(DataLoader(self.pairs, batch, num_workers=workers), embed)
        accuracy, deviation = verification.ten_fold_accuracy(features, self.pairs.same)
        return {"accuracy": accuracy, "accuracy_std": deviation}


class _People:
    """All pairs of images, of evenly spaced runs of them if there are more than ``MOST_IMAGES``."""

    def __init__(self, path: Path, size: int) -> None:
        self.faces = open_faces(path, size)
        # runs, since data sets are ordered by person and pairs need two images of one
        runs = torch.arange(len(self.faces)).split(RUN)
        self.chosen = torch.cat(runs[:: -(-len(self.faces) // MOST_IMAGES)])
        people = self.faces.labels[self.chosen]
        counts = people.unique(return_counts=True)[1]
        if len(counts) < 2 or counts.max() < 2:
            raise TrainError(f"{path} needs two people, one of them with two images")
        self.people = people

    def __call__(self, embed: Embed, batch: int, workers: int) -> dict[str, float]:
        loader = DataLoader(Subset(self.faces, self.chosen.tolist()), batch, num_workers=workers)
        features = _embedded((images for images, _ in loader), embed)
        curve = verification.roc(verification.all_pairs(features, self.people))
        return {
            f"tar_at_far_{FAR:.0e}": verification.tar_at_far(curve, FAR),
            "auc": verification.auc(curve),
        }


@torch.no_grad()
def _embedded(batches: Iterable[Tensor], embed: Embed) -> Tensor:
    """(N, D) on the CPU: mean direction of each image and its mirror image."""
    found = []
    for images in batches:
        sides = [F.normalize(embed(view).float()) for view in (images, images.flip(3))]
        found.append((sides[0] + sides[1]).cpu())
    return torch.cat(found)
