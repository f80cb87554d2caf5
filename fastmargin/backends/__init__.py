"""The backends and the choice between them.

A backend is imported on first use, so that importing fastmargin needs neither Triton nor the
compiled extension.
"""

from __future__ import annotations

import functools
import importlib

import torch

from fastmargin.backends.interface import Backend

__all__ = ["NAMES", "BackendError", "available", "get", "notes", "select"]

NAMES = ("reference", "cpu", "triton", "cuda")
_AUTO = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}


class BackendError(RuntimeError):
    """The requested backend cannot run; the message says why, and what to use instead."""


@functools.cache
def get(name: str) -> Backend:
    """The backend of this name, whether it can run or not.

    Raises:
        ValueError: unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {NAMES}, got {name!r}")
    return importlib.import_module(f"fastmargin.backends.{name}").BACKEND


def available() -> dict[str, str | None]:
    """For each backend None if it can run in this process, else the reason, with its note.

    ``cuda`` uses its own kernels for per-row work (``row_prologue``, ``margin_rows``) and Triton's
    for the passes over the class centres; :func:`notes` says so at run time.
    """
    reasons = {}
    for backend in map(get, NAMES):
        reason = backend.unavailable()
        reasons[backend.name] = f"{reason} ({backend.note})" if reason and backend.note else reason
    return reasons


def notes() -> dict[str, str]:
    """Remarks on backends, by name."""
    found = {name: get(name).note for name in NAMES}
    return {name: note for name, note in found.items() if note}


def select(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    precision: str = "auto",
    dim: int = 1,
    k: int = 1,
) -> Backend:
    """The backend for embeddings of this device, dtype and width ``dim``.

    "auto" takes the first that can run: cpu on a CPU or triton on a GPU, else reference. A backend
    requested by name runs or raises; it is never replaced. k: number of nearest centres needed.

    Raises:
        ValueError: unknown name.
        BackendError: the backend cannot run, or does not take this device, dtype and precision.
    """
    if requested != "auto":
        backend = get(requested)
        reason = _reason(backend, device, dtype, precision, dim, k)
        if reason:
            raise BackendError(
                f"backend={requested!r} cannot run: {reason}. Use backend='auto' or see "
                "fastmargin.backends.available()"
            )
        return backend
    for name in _AUTO.get(device.type, ("reference",)):
        backend = get(name)
        if _reason(backend, device, dtype, precision, dim, k) is None:
            return backend
    raise BackendError(
        f"no backend for {device.type} has precision={precision!r}: use 'auto' or 'fp32'"
    )


def _reason(backend: Backend, device, dtype, precision: str, dim: int, k: int) -> str | None:
    reason = backend.unavailable() or backend.refuses(device, dtype)
    if reason is None and dim > backend.max_dim:
        reason = f"it takes embeddings of up to {backend.max_dim} dimensions, got {dim}"
    if reason is None and k > backend.max_k:
        reason = f"it finds up to {backend.max_k} nearest centres, got {k}"
    if reason is None and precision not in ("auto", *backend.precisions):
        reason = f"it has no precision {precision!r}, only {backend.precisions}"
    return reason
