"""The backends and the choice between them.

A backend is imported when it is first asked about, so that importing fastmargin needs neither
Triton nor the compiled extension.
"""

from __future__ import annotations

import functools
import importlib

import torch

from fastmargin.backends.interface import Backend

__all__ = ["NAMES", "BackendError", "available", "get", "notes", "select"]

NAMES = ("reference", "cpu", "triton", "cuda")
_AUTO = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


class BackendError(RuntimeError):
    """A backend was asked for that cannot run; the message says why and what would."""


@functools.cache
def get(name: str) -> Backend:
    """The backend of this name, whether it can run or not."""
    if name not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {NAMES}, got {name!r}")
    return importlib.import_module(f"fastmargin.backends.{name}").BACKEND


def available() -> dict[str, str | None]:
    """For each backend None if it can run in this process, else the reason it cannot.

    ``cuda`` runs its own kernels for the per-row work (``row_prologue``, ``margin_rows``) and
    Triton's for the passes over the class centres; :func:`notes` says so at run time.
    """
    return {name: get(name).unavailable() for name in NAMES}


def notes() -> dict[str, str]:
    """What is worth knowing about a backend that can run, by name."""
    found = {name: getattr(get(name), "note", "") for name in NAMES}
    return {name: note for name, note in found.items() if note}


def select(
    requested: str, device: torch.device, dtype: torch.dtype, precision: str = "auto"
) -> Backend:
    """The backend to run embeddings of this device and dtype on.

    "auto" takes the fastest that can run. A backend asked for by name is taken or refused with
    its reason, never replaced.

    Raises:
        ValueError: unknown name.
        BackendError: the backend cannot run, or does not take this device, dtype and precision.
    """
    if requested != "auto":
        backend = get(requested)
        reason = _reason(backend, device, dtype, precision)
        if reason:
            raise BackendError(
                f"backend={requested!r} cannot run: {reason}. Use backend='auto' or see "
                "fastmargin.backends.available()"
            )
        return backend
    for name in _AUTO.get(device.type, ("reference",)):
        backend = get(name)
        if _reason(backend, device, dtype, precision) is None:
            return backend
    raise BackendError(
        f"no backend for {device.type} takes precision={precision!r}; use precision='auto' or 'fp32'"
    )


def _reason(backend: Backend, device, dtype, precision: str) -> str | None:
    reason = backend.unavailable() or backend.refuses(device, dtype)
    if reason is None and precision not in ("auto", *backend.precisions):
        reason = f"it has no precision {precision!r}, only {backend.precisions}"
    return reason
