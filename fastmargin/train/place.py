"""Where this process trains."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastmargin.train.settings import TrainError


@dataclass(frozen=True)
class Place:
    """Device, and rank among ``world`` processes."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[Place]:
    """This process alone, or as one of those that torchrun started.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        TrainError: CUDA is asked for and missing.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainError("--device cuda: torch finds no GPU; use --device cpu")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if "RANK" not in os.environ:
        yield Place(torch.device(kind))
        return
    own = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Place(own, dist.get_rank(), dist.get_world_size())
    finally:
        gc.collect()  # device meshes: gloo threads that outlive them can abort the process
        dist.destroy_process_group()
