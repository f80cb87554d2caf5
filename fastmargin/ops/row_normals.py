"""Standard normal numbers, one for each row of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin import backends
from fastmargin.ops.registration import op


@op("row_normals", "(Tensor seed, Tensor step, Tensor labels, int place, str backend) -> Tensor")
def _row_normals(seed, step, labels, place, backend):
    chosen = backends.select(backend, labels.device, torch.float32)
    return chosen.row_normals(seed, step, labels, place)


@_row_normals.register_fake
def _(seed, step, labels, place, backend):
    return labels.new_empty(labels.shape, dtype=torch.float32)


def row_normals(
    seed: Tensor, step: Tensor, labels: Tensor, place: int = 0, backend: str = "auto"
) -> Tensor:
    """(B,) float32: a standard normal number for each row with label >= 0.

    A function of seed, step, place and the number of such rows before it: the same on every
    process with the same arguments, and independent of ignored rows, whose values must not be used.
    No host synchronisation.

    Args:
        seed, step: (1,) int64, on the device of the labels.
        labels: (B,) int64.
        place: index of this replica among the processes that see other rows.
        backend: "auto" or a backend's name; results differ only by rounding.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    for name, tensor in (("seed", seed), ("step", step), ("labels", labels)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {tensor.dtype}: use {name}.long()")
        if tensor.device != labels.device:
            raise ValueError(
                f"{name} is on {tensor.device}, the labels on {labels.device}: move one of them "
                "(of a margin: margin.to(device))"
            )
    for name, tensor in (("seed", seed), ("step", step)):
        if tensor.shape != (1,):
            raise ValueError(f"{name} must have shape (1,), got {tuple(tensor.shape)}")
    if labels.dim() != 1:
        raise ValueError(f"labels must have shape (B,), got {tuple(labels.shape)}")
    return _row_normals(seed, step, labels, place, backend)
