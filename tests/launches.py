"""Counts kernel launches without a GPU: Triton's in the interpreter, and ATen's as a GPU has them.

An ATen operator counts as one launch unless it only makes a view or allocates memory, or makes
nothing. Operators of fastmargin are looked into.
"""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS = {"alias", "detach", "is_same_size", "lift_fresh"}


class LaunchCounter(TorchDispatchMode):
    """``names``: one entry per launch, in order."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # what it is made of is seen, too
            if func.namespace == "fastmargin":
                definition = torch._library.custom_ops.OPDEFS[func._schema.name]
                return definition._init_fn(*args, **kwargs)
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name, made = func.overloadpacket.__name__, func(*args, **kwargs)
        nothing = isinstance(made, torch.Tensor) and made.numel() == 0
        if not (func.is_view or nothing or name in ALLOCATIONS | VIEWS):
            self.names.append(f"aten::{name}")
        return made


@contextlib.contextmanager
def counted():
    """Counts in this block, and gives the counter."""
    from triton.runtime.interpreter import GridExecutor

    counter, launch = LaunchCounter(), GridExecutor.__call__

    def counting(self, *args, **kwargs):
        counter.names.append(self.fn.__name__)
        with _disable_current_modes():  # the interpreter itself copies tensors
            return launch(self, *args, **kwargs)

    GridExecutor.__call__ = counting
    try:
        with counter:
            yield counter
    finally:
        GridExecutor.__call__ = launch
