"""Device properties needed for launches, without synchronisation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmargin.backends.triton.tile import INTERPRETED

NO_SPILLS = {} if torch.version.hip else {"maxnreg": 255}
"""Launch options of small kernels: without a limit, ptxas may spill a few of their registers so
that more programs fit on a multiprocessor."""


@dataclass(frozen=True)
class Chip:
    """Compute capability (90 for 9.0; 0 in the interpreter) and number of multiprocessors."""

    arch: int
    processors: int


INTERPRETER = Chip(arch=0, processors=6)
"""In the interpreter; more than one processor, so that splits of the classes are tested."""


_pretended: Chip | None = None


def chip(device: torch.device) -> Chip:
    """The chip that kernels for tensors of this device run on."""
    if _pretended is not None:
        return _pretended
    return INTERPRETER if INTERPRETED else _cuda_chip(device)


@contextlib.contextmanager
def pretending(to_be: Chip) -> Iterator[None]:
    """Within the block every device has this chip, for examining launches without a GPU."""
    global _pretended
    before, _pretended = _pretended, to_be
    try:
        yield
    finally:
        _pretended = before


@functools.cache
def _cuda_chip(device: torch.device) -> Chip:
    found = torch.cuda.get_device_properties(device)
    return Chip(found.major * 10 + found.minor, found.multi_processor_count)


def on_device(tensor: Tensor):
    """Makes the tensor's device current: Triton launches on the current device's stream."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
