"""Which class is an unseen glyph of? Figures of a gallery with one direction for each class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.glyphs.data import Glyphs, Split
from fastmargin.demo.network import FaceNet, embed

ROWS = 1024  # embedded or compared at once
FAR = 1e-4


def features(network: FaceNet, glyphs: Glyphs) -> Tensor:
    """Unit embeddings [N, D] of the glyphs as they were drawn."""
    parts = [
        embed(network, glyphs.images(slice(start, start + ROWS)))
        for start in range(0, len(glyphs.labels), ROWS)
    ]
    return F.normalize(torch.cat(parts))


def class_means(unit: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Directions [C, D] of the mean unit feature of each class."""
    sums = unit.new_zeros(num_classes, unit.shape[1]).index_add_(0, labels, unit)
    return F.normalize(sums)


def rank_one(unit: Tensor, labels: Tensor, gallery: Tensor) -> float:
    """Share of the unit features [N, D] whose nearest of the gallery [C, D] is their class."""
    right = [
        (probes @ gallery.T).argmax(dim=1) == own
        for probes, own in zip(unit.split(ROWS), labels.split(ROWS), strict=True)
    ]
    return torch.cat(right).double().mean().item()


def tar_at_far(unit: Tensor, labels: Tensor, gallery: Tensor, far: float = FAR) -> float:
    """Verification against the gallery: the share of genuine pairs accepted, where at most
    ``far`` of the impostor pairs (all with another class) are."""
    allowed = int(far * len(unit) * (len(gallery) - 1))
    genuine, highest = [], unit.new_empty(0)
    for probes, own in zip(unit.split(ROWS), labels.split(ROWS), strict=True):
        cosines = probes @ gallery.T
        genuine.append(cosines.gather(1, own[:, None]).squeeze(1))
        impostors = cosines.scatter(1, own[:, None], -torch.inf).flatten()
        highest = torch.cat([highest, impostors])
        highest = highest.topk(min(allowed + 1, len(highest))).values
    # above the first impostor score that is one too many
    return (torch.cat(genuine) > highest[-1]).double().mean().item()


def figures(network: FaceNet, centres: Tensor, split: Split) -> dict[str, float]:
    """Rank-1 of the unseen font by unit class centres [C, D] and by the means of the training
    glyphs, and verification by these."""
    unseen, labels = features(network, split.unseen), split.unseen.labels
    means = class_means(features(network, split.training), split.training.labels, split.num_classes)
    return {
        "rank_1_centres": rank_one(unseen, labels, centres),
        "rank_1_means": rank_one(unseen, labels, means),
        "tar_at_far_1e-4": tar_at_far(unseen, labels, means),
    }


def raw_pixel_figures(split: Split) -> dict[str, float]:
    """The yardstick without a network: cosines of the pixels minus the mean training glyph."""
    pixels = split.training.images(slice(None)).flatten(1)
    mean = pixels.mean(dim=0)
    unseen = F.normalize(split.unseen.images(slice(None)).flatten(1) - mean)
    means = class_means(F.normalize(pixels - mean), split.training.labels, split.num_classes)
    return {
        "rank_1_means": rank_one(unseen, split.unseen.labels, means),
        "tar_at_far_1e-4": tar_at_far(unseen, split.unseen.labels, means),
    }
