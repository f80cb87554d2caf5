"""SGD with momentum over the rows of class centres."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastmargin import ops
from fastmargin.norms import FLOATS
from fastmargin.optim.row_chunks import beside
from fastmargin.optim.row_optimizer import RowOptimizer
from fastmargin.rounding import Rounding
from fastmargin.spec import GradientFactors, SgdUpdate

__all__ = ["RowSGD"]


@dataclass(frozen=True)
class SGDStep(SgdUpdate):
    """One step; with a zero gradient it is a 2 x 2 linear map of (weight, momentum buffer)."""

    # the map, row by row: weight from (weight, buffer), buffer from (weight, buffer)
    STILL = (1.0, 0.0, 0.0, 1.0)

    def update(self, weight: Tensor, *buffer_and_grad: Tensor) -> None:
        self.apply_(weight, *buffer_and_grad)

    def moves_still_rows(self) -> bool:
        return bool(self.momentum or self.lr * self.weight_decay)

    def append_to(self, table: Tensor) -> None:
        weight, buffer = table[:2], table[2:]
        grad = weight * self.weight_decay
        if self.momentum:
            buffer.mul_(self.momentum).add_(grad)
            grad = grad.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        weight.sub_(grad, alpha=self.lr)

    @staticmethod
    def catch_up(ways: Tensor, weight: Tensor, buffer: Tensor | None = None) -> None:
        from_weight, from_buffer, to_buffer, keep_buffer = beside(ways, weight)
        if buffer is None:
            weight.mul_(from_weight)
            return
        moved = (weight * from_weight).addcmul_(buffer, from_buffer)
        buffer.mul_(keep_buffer).addcmul_(weight, to_buffer)
        weight.copy_(moved)


class RowSGD(RowOptimizer):
    """``torch.optim.SGD`` for row-sparse gradients of class centres; dense ones are taken too.

    ``unsampled`` says what a step does to the rows of a parameter without a gradient:

    - ``"dense"``: momentum and weight decay move them as if their gradient were zero. All rows are
      touched at every step.
    - ``"lazy"``: the same, but later: when a row is next used, at a cost per step that does not
      grow with the number of rows. The missed steps are a product of 2 x 2 matrices, kept in
      float64, so this is "dense" up to rounding whatever lr, momentum and weight decay do
      meanwhile. Call :func:`fastmargin.deferred.settle` before reading the rows.
    - ``"frozen"``: they do not change, nor does their momentum.

    A parameter whose ``grad`` is None takes no step in any mode.

    State per parameter: ``step``; ``momentum_buffer`` as the parameter (float32 for a 16-bit one,
    or ``momentum_dtype``) once there is momentum; ``last_step`` (C,) int32, but not with "frozen".

    With ``fused=True`` the gradient of class centres is never formed. ``backward()`` stores its
    factors, about the size of the batch, and leaves ``grad`` None; ``step()`` runs the centre pass
    with the update in it. Several backward passes before a step add up, GradScaler works, and a
    gradient of other losses is added. Code that reads ``grad`` in between finds None: clipping,
    ``scaler.unscale_``, hooks, DDP (refused, as is :func:`fastmargin.total_norm`), and a module's
    ``zero_grad``, so call the optimiser's. A gradient is formed as usual under ``torch.compile``,
    for ``torch.autograd.grad``, DTensors and losses on the nearest negatives.

    Args:
        params: tensors or groups, as for any optimiser. A sparse gradient has one sparse
            dimension, the rows.
        lr: learning rate, a Python number, not a tensor.
        momentum, weight_decay, nesterov: as ``torch.optim.SGD``.
        unsampled, fused: see above.
        momentum_dtype: dtype of the momentum; ``torch.bfloat16`` halves its memory.
        stochastic_rounding: of 16-bit weights and momentum, see :mod:`fastmargin.rounding`. With
            rounding to nearest, updates below half the distance to the next number are lost.
        seed: of that rounding, an integer; the same on processes that hold the same rows.

    Raises:
        RuntimeError: at the step, with ``fused``: a parameter was written to since the backward
            pass, or a GradScaler's ``unscale_`` was called. Nothing has changed.
            During CUDA graph capture, unless ``unsampled="frozen"``, nothing is rounded
            stochastically, and one step has been taken before.
        ValueError: a number out of its range, in a group or, changed since, at the step.
        TypeError: a number that is a tensor, a ``momentum_dtype`` that is no float type, a seed
            that is no integer; at the step, a DTensor to round stochastically.
    """

    momentum_dtype: torch.dtype | None = None
    _step_type = SGDStep
    _row_states = ("momentum_buffer",)
    _numbers = ("lr", "momentum", "weight_decay")
    _counts = False

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        unsampled: str = "lazy",
        fused: bool = False,
        momentum_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        if momentum_dtype is not None and momentum_dtype not in FLOATS:
            raise TypeError(f"momentum_dtype must be one of {FLOATS} or None, got {momentum_dtype}")
        self.fused = bool(fused)
        self.momentum_dtype = momentum_dtype
        self.rounding = Rounding.of(seed) if stochastic_rounding else None
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "unsampled": unsampled,
            },
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov needs a momentum above 0")

    def _needed_states(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._row_states if group["momentum"] else ()

    def _state_dtype(self, parameter: Tensor) -> torch.dtype:
        return self.momentum_dtype or super()._state_dtype(parameter)

    def _make_step(self, group: dict[str, Any], count: int) -> SGDStep:
        numbers = (float(group[name]) for name in self._numbers)
        return SGDStep(*numbers, bool(group["nesterov"]))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "momentum_dtype": self.momentum_dtype}

    def _step_by_factors(
        self, tensors: list[Tensor], found: GradientFactors, step: SGDStep, key: int | None
    ) -> None:
        weight, *buffer = tensors
        step = replace(step, rounding=key)
        ops.centre_step(weight, buffer[0] if buffer else None, step, found)
