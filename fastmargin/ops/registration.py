"""Shared by all operators: registration, choice of backend, and checks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastmargin import backends
from fastmargin.backends.interface import Backend
from fastmargin.norms import compute_dtype
from fastmargin.spec import MarginForm

STATS_ARGS = (
    "Tensor x_hat, Tensor weight, Tensor? index, Tensor labels, float scale,"
    " Tensor? hard_threshold, Tensor? hard_coefficients, float hard_bound, int class_start"
)
"""Schema of the arguments shared by all softmax passes over the centres."""


def op(name: str, schema: str, mutates: tuple[str, ...] = ()):
    """Registers the decorated function as an operator that runs without autocast."""

    def register(function):
        @functools.wraps(function)
        def without_autocast(first, *rest):
            with torch.autocast(first.device.type, enabled=False):
                return function(first, *rest)

        define = torch.library.custom_op(f"fastmargin::{name}", mutates_args=mutates, schema=schema)
        return define(without_autocast)

    return register


def backend_for(requested: str, x: Tensor, precision: str = "auto", k: int = 1) -> Backend:
    """The backend for operators on x (B, D)."""
    return backends.select(requested, x.device, x.dtype, precision, x.shape[1], k)


def check_backend(x: Tensor, precision: str, backend: str, k: int = 1) -> None:
    """Raises :class:`fastmargin.backends.BackendError` if operators on x (B, D) would."""
    dtype = compute_dtype(x.dtype)
    backends.select(backend, x.device, dtype, precision, x.shape[1], k)


def check_index(index: Tensor | None, weight: Tensor) -> None:
    """Raises TypeError or ValueError unless ``index`` is None or (K,) int64 on weight's device."""
    if index is None:
        return
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}: use index.long()")
    if index.dim() != 1:
        raise ValueError(f"index must have shape (K,), got {tuple(index.shape)}")
    if index.device != weight.device:
        raise ValueError(f"index is on {index.device}, weight on {weight.device}: move one of them")


def check_table(form: MarginForm, labels: Tensor) -> None:
    """Raises ValueError unless a form with source "row" has a table with one number per label.

    Backends read the table by row without checking.
    """
    if form.source != "row":
        return
    if form.table is None:
        drawn = "" if form.draw is None else ": draw it with ops.row_normals"
        raise ValueError(f"a margin form with source 'row' needs a table (B,){drawn}")
    if form.table.shape != labels.shape:
        raise ValueError(
            f"the table of a margin form with source 'row' has shape {tuple(form.table.shape)}, "
            f"expected one number for each row, {tuple(labels.shape)}"
        )
