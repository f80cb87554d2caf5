"""Class sampling with the operations of insightface's ``PartialFC_V2``; our implementation."""

from __future__ import annotations

import torch


def sample(labels: torch.Tensor, num_classes: int, num_sampled: int):
    """Sampled rows (k,), ascending, and labels (B,) as positions in them; draws for each class."""
    here = (labels >= 0) & (labels < num_classes)
    labels = torch.where(here, labels, -1)
    positive = torch.unique(labels[here], sorted=True)
    index = positive
    if num_sampled >= positive.numel():
        priority = torch.rand(num_classes, device=labels.device)
        priority[positive] = 2.0
        index = torch.topk(priority, k=num_sampled)[1].sort()[0]
    labels[here] = torch.searchsorted(index, labels[here])
    return index, labels
