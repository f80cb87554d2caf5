"""Where this process trains."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastmargin.train.settings import TrainError

PATIENCE = datetime.timedelta(hours=1)
"""How long processes wait for the first one, which validates."""


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
        TrainError: CUDA is asked for and missing, or torchrun's variables are incomplete.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainError("--device cuda: torch finds no GPU; use --device cpu")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    if "RANK" not in os.environ:
        yield Place(torch.device(kind))
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise TrainError(
            f"process {local} of this machine has no GPU of its own: there are "
            f"{torch.cuda.device_count()}; start no more processes than that"
        )
    own = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(own)
    try:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    except ValueError as error:
        raise TrainError(f"RANK is set, as by torchrun, but not the rest: {error}") from error
    try:
        yield Place(own, dist.get_rank(), dist.get_world_size())
    finally:
        gc.collect()  # device meshes: gloo threads that outlive them can abort the process
        dist.destroy_process_group()
