"""Gradient factors: batch-sized tensors from which the centres' gradient is formed later, in the
optimiser's step.

An optimiser that does so (:class:`fastmargin.optim.RowSGD` with ``fused=True``) calls :func:`keep`
for its parameters. A backward pass then stores factors here, and the (C, D) ``grad`` stays None.
Factors of several passes before a step add up, as gradients do.

Factors belong to a parameter by identity and are never copied or saved with it. They keep neither
the parameter nor an optimiser alive. Once the last such optimiser is gone, gradients are formed
again.
"""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastmargin.spec import GradientFactors

__all__ = [
    "add",
    "changed",
    "clear",
    "is_kept",
    "keep",
    "pending",
    "release",
    "take",
    "wanted",
]

MANY = 256
"""Warn after this many backward passes without a step: probably another optimiser is stepped."""


class _Kept:
    """The keepers of a parameter, and the factors stored since the last step."""

    def __init__(self) -> None:
        self.keepers: weakref.WeakSet = weakref.WeakSet()
        self.waiting: list[GradientFactors] = []
        self.version = 0


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def keep(parameter: Tensor, keeper: object) -> None:
    """While ``keeper`` lives, backward passes store factors for this parameter instead of its
    gradient."""
    known = _kept.get(parameter)
    if known is None:
        known = _kept[parameter] = _Kept()
    known.keepers.add(keeper)


def release(parameter: Tensor, keeper: object) -> None:
    """Undoes :func:`keep`; releasing the last keeper drops the stored factors."""
    known = _kept.get(parameter)
    if known is not None:
        known.keepers.discard(keeper)
        if not known.keepers:
            del _kept[parameter]


def is_kept(parameter: Tensor) -> bool:
    """Whether backward passes store factors for this tensor."""
    # in compiled code another tensor represents the parameter, and the gradient is formed
    if not _kept:
        return False
    known = _kept.get(parameter)
    return known is not None and len(known.keepers) > 0


def wanted(parameter: Tensor, node: torch.autograd.graph.Node | None) -> bool:
    """Whether the running backward pass stores factors for this tensor.

    node: the accumulator of its gradient. ``torch.autograd.grad`` and ``backward(inputs)`` may
    bypass it; the gradient is then formed and returned to the caller.
    """
    if node is None or not is_kept(parameter):
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad requests this gradient
        return False


def add(parameter: Tensor, found: GradientFactors) -> None:
    """Stores the factors of one backward pass for a parameter that is kept."""
    known = _kept[parameter]
    if not known.waiting:
        known.version = parameter._version
    known.waiting.append(found.outlasting())
    if len(known.waiting) == MANY:
        warnings.warn(
            f"{MANY} backward passes without a step of the optimiser made with fused=True: step "
            "it, or delete it if another one is in use",
            stacklevel=2,
        )


def pending(parameter: Tensor) -> tuple[GradientFactors, ...]:
    """The stored factors, in the order of their passes."""
    known = _kept.get(parameter) if _kept else None
    return () if known is None else tuple(known.waiting)


def changed(parameter: Tensor) -> bool:
    """Whether the parameter was written to after the first of the stored factors was added."""
    known = _kept.get(parameter) if _kept else None
    return known is not None and bool(known.waiting) and known.version != parameter._version


def take(parameter: Tensor) -> tuple[GradientFactors, ...]:
    """Removes and returns the stored factors."""
    found = pending(parameter)
    clear(parameter)
    return found


def clear(parameter: Tensor) -> None:
    """Drops the stored factors."""
    known = _kept.get(parameter) if _kept else None
    if known is not None:
        known.waiting.clear()
