"""The collectives; each is the identity without a process group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors of one shape, as a new tensor; no gradient."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def gather_stacked(tensor: Tensor) -> Tensor:
    """(R, ...) the tensors of all ranks, which have one shape; no gradient."""
    ranks = world_size()
    if ranks == 1:
        return tensor[None]
    gathered = tensor.new_empty((ranks * tensor.numel(),))
    dist.all_gather_into_tensor(gathered, tensor.detach().contiguous().flatten())
    return gathered.view(ranks, *tensor.shape)
