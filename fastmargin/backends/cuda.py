"""CUDA C++ kernels.

``row_prologue`` and ``margin_rows`` are kernels of this backend (``csrc/cuda``). Everything else,
including the passes over the class centres, runs on the Triton backend's kernels, so this backend
needs Triton too; :data:`CudaBackend.note` says so at run time.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fastmargin.backends import _extension, _rows
from fastmargin.backends.composed import Composed
from fastmargin.backends.triton import TritonBackend
from fastmargin.spec import MarginForm, NormEma

REMEDY = "reinstall from source with nvcc present: FASTMARGIN_CUDA=1 pip install <fastmargin>"


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether code for e.g. ["8.0", "9.0a", "10.0+PTX"] runs on a device of this capability."""
    for architecture in architectures:
        major, minor, special, ptx = re.fullmatch(
            r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture
        ).groups()
        built = int(major), int(minor)
        same = capability == built if special else capability[0] == built[0] and capability >= built
        if same or (ptx and not special and capability >= built):
            return True
    return False


class CudaBackend(TritonBackend):
    name = "cuda"
    note = (
        "row_prologue and margin_rows are its own CUDA kernels; everything else, including the "
        "passes over the centres, runs on Triton's"
    )

    softmax_loss = Composed.softmax_loss  # the one that calls row_prologue and margin_rows

    def unavailable(self) -> str | None:
        not_loaded = _extension.reason("_cuda")
        if not_loaded and _extension.reason("_C") is None:
            return f"the extension is compiled without CUDA; {REMEDY} ({not_loaded})"
        if not_loaded:
            return not_loaded
        if torch.version.cuda is None:
            return "this torch is built without CUDA; install a CUDA build, see pytorch.org"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"
        reason = super().unavailable()
        return f"its passes over the class centres run on Triton: {reason}" if reason else None

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"it takes CUDA tensors, got {device}"
        if dtype == torch.float64:
            return "it has no float64; use backend='reference'"
        capability = torch.cuda.get_device_capability(device)
        if not runs_on(capability, _extension.cuda_architectures()):
            return (
                f"its kernels are compiled for {_extension.cuda_architectures()}, the device is "
                f"{capability[0]}.{capability[1]}; set TORCH_CUDA_ARCH_LIST and reinstall"
            )
        return super().refuses(device, dtype)

    def row_prologue(self, x: Tensor, labels: Tensor | None, ema: NormEma | None):
        op = torch.ops.fastmargin.cuda_row_prologue
        return _rows.row_prologue(op, x, labels, ema, _stream(x))

    def margin_rows(
        self, cos_y: Tensor, lse_neg: Tensor, norm: Tensor, labels: Tensor, form: MarginForm
    ):
        op = torch.ops.fastmargin.cuda_margin_rows
        return _rows.margin_rows(op, cos_y, lse_neg, norm, labels, form, _stream(cos_y))


BACKEND = CudaBackend()
