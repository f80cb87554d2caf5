"""Input validation; errors name the argument and the fix."""

from __future__ import annotations

import torch
from torch import Tensor


def check_rows(name: str, x: Tensor, size: int) -> None:
    """Raises TypeError or ValueError unless ``x`` is a float tensor of shape (B, size)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 2 or x.shape[1] != size:
        raise ValueError(f"{name} must have shape (B, {size}), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be of a float type, got {x.dtype}: use {name}.float()")


def check_labels(name: str, labels: Tensor, rows: int, classes: int) -> None:
    """Raises TypeError or ValueError unless ``labels`` are ``rows`` integers in [0, classes).

    The range is checked on a CPU only, where that causes no synchronisation.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64, got {labels.dtype}: use {name}.long()")
    if labels.shape not in ((rows,), (rows, 1)):
        raise ValueError(f"{name} must have shape ({rows},), got {tuple(labels.shape)}")
    if labels.device.type == "cpu" and rows and not torch.compiler.is_compiling():
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"{name} must be in [0, {classes}), found {low if low < 0 else high}: number the "
                "classes from 0"
            )
