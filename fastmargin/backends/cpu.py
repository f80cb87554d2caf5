"""C++ on the CPU."""

from __future__ import annotations

import torch

from fastmargin.backends import _extension
from fastmargin.backends.reference import ReferenceBackend


class CpuBackend(ReferenceBackend):
    name = "cpu"

    def unavailable(self) -> str | None:
        return _extension.reason("_C")

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cpu" else f"it takes CPU tensors, got {device}"


BACKEND = CpuBackend()
