"""What the gradient of the centres is made of, left to the optimiser instead of the gradient.

The gradient (C, D) of the centres follows from a few tensors of the size of the batch. An optimiser
that forms it where it takes its step (:class:`fastmargin.optim.RowSGD` with ``fused=True``)
calls :func:`keep` for its parameters; a backward pass then leaves these factors here and ``grad``
None. Several passes before a step leave several, which add up as gradients do.

Factors belong to a parameter by identity and are never copied or saved with it. They keep neither
the parameter nor an optimiser alive. Once no optimiser that keeps a parameter is left, gradients
are formed again.
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
"""So many passes without a step are rather a loop that steps another optimiser."""


class _Kept:
    """Who keeps a parameter, and the factors that wait for a step."""

    def __init__(self) -> None:
        self.keepers: weakref.WeakSet = weakref.WeakSet()
        self.waiting: list[GradientFactors] = []
        self.version = 0


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def keep(parameter: Tensor, keeper: object) -> None:
    """From now on, as long as ``keeper`` lives, backward passes leave factors."""
    known = _kept.get(parameter)
    if known is None:
        known = _kept[parameter] = _Kept()
    known.keepers.add(keeper)


def release(parameter: Tensor, keeper: object) -> None:
    """Undoes :func:`keep`; factors that wait go with the last keeper."""
    known = _kept.get(parameter)
    if known is not None:
        known.keepers.discard(keeper)
        if not known.keepers:
            del _kept[parameter]


def is_kept(parameter: Tensor) -> bool:
    """Whether a backward pass leaves factors for this tensor."""
    # compiled, another tensor stands for the parameter and the gradient is formed
    if not _kept:
        return False
    known = _kept.get(parameter)
    return known is not None and len(known.keepers) > 0


def wanted(parameter: Tensor, node: torch.autograd.graph.Node | None) -> bool:
    """Whether the backward pass that is under way leaves factors for this tensor.

    node: where its gradient goes, its accumulator. ``torch.autograd.grad`` and ``backward(inputs)``
    may pass it by, and the gradient is then formed for whoever asked for it.
    """
    if node is None or not is_kept(parameter):
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad asks for this very gradient
        return False


def add(parameter: Tensor, found: GradientFactors) -> None:
    """Leaves the factors of one pass for a parameter that is kept."""
    known = _kept[parameter]
    if not known.waiting:
        known.version = parameter._version
    known.waiting.append(found.outlasting())
    if len(known.waiting) == MANY:
        warnings.warn(
            f"{MANY} backward passes wait for a step of the optimiser made with fused=True: step "
            "it, or drop it if another one is in use",
            stacklevel=2,
        )


def pending(parameter: Tensor) -> tuple[GradientFactors, ...]:
    """The factors that wait, in the order of their passes."""
    known = _kept.get(parameter) if _kept else None
    return () if known is None else tuple(known.waiting)


def changed(parameter: Tensor) -> bool:
    """Whether the parameter has been written to since the factors that wait were left."""
    known = _kept.get(parameter) if _kept else None
    return known is not None and bool(known.waiting) and known.version != parameter._version


def take(parameter: Tensor) -> tuple[GradientFactors, ...]:
    """:func:`pending`, which wait no more."""
    found = pending(parameter)
    clear(parameter)
    return found


def clear(parameter: Tensor) -> None:
    """Drops the factors that wait."""
    known = _kept.get(parameter) if _kept else None
    if known is not None:
        known.waiting.clear()
