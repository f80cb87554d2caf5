"""A pseudo-random permutation that is never held."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin import backends
from fastmargin.ops.registration import op

MAX_PERMUTATION = 2**60


@op("permutation", "(Tensor key, int size, int count, str backend) -> Tensor")
def _permutation(key, size, count, backend):
    chosen = backends.select(backend, key.device, torch.float32)
    return chosen.permutation(key, size, count)


@_permutation.register_fake
def _(key, size, count, backend):
    return key.new_empty((count,))


def permutation(key: Tensor, size: int, count: int, backend: str = "auto") -> Tensor:
    """The first ``count`` numbers of a pseudo-random permutation of range(size), (count,) int64.

    Distinct, the same on every backend, and in O(count) whatever the size. No host
    synchronisation, but for the reference backend on a GPU.

    Args:
        key: (2,) int64; chooses the permutation.
        size: up to 2**60.
        count: at most ``size``.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: a size or the key out of range.
    """
    if key.dtype != torch.int64 or key.shape != (2,):
        raise ValueError(
            f"key must be (2,) int64, got {tuple(key.shape)} {key.dtype}: use torch.tensor([a, b])"
        )
    if not 0 <= size <= MAX_PERMUTATION:
        raise ValueError(f"size must be in [0, 2**60], got {size}")
    if not 0 <= count <= size:
        raise ValueError(f"count must be in [0, size={size}], got {count}: there are no more")
    return _permutation(key, size, count, backend)
