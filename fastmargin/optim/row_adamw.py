"""AdamW over the rows of class centres."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmargin.optim.row_chunks import beside
from fastmargin.optim.row_optimizer import RowOptimizer
from fastmargin.rounding import Rounding

__all__ = ["RowAdamW"]


LEAST_MOVEMENT = 1e-290
"""Sums of learning rates up to here change nothing, in any float type."""


@dataclass(frozen=True)
class AdamWStep:
    """One step, the ``count``-th of its parameter, from 1.

    With a zero gradient the k-th step multiplies m by beta1, v by beta2 and the weight by
    ``1 - lr * weight_decay``, and then moves it by ``-a_k m / (sqrt(v) + e_k)``, in terms of m and
    v before the first missed step: ``a_k = lr sqrt(1 - beta2^k) / (1 - beta1^k) * A / sqrt(B)``
    and ``e_k = eps sqrt(1 - beta2^k) / sqrt(B)``, A and B being the products of the betas so far.
    With the later decays in ``a_k``, the sum of the movements is taken as
    ``a m / (sqrt(v) + e)``, ``a = sum a_k``, ``e = sum a_k e_k / a``.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    count: int

    # decay of the weight, A, B, A / B, sum a_k, sum a_k e_k
    STILL = (1.0, 1.0, 1.0, 1.0, 0.0, 0.0)

    def update(self, weight: Tensor, mean: Tensor, square: Tensor, grad: Tensor) -> None:
        """As ``torch.optim.AdamW``."""
        weight.mul_(1 - self.lr * self.weight_decay)
        mean.lerp_(grad, 1 - self.beta1)
        square.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        root = square.sqrt().div_(math.sqrt(1 - self.beta2**self.count)).add_(self.eps)
        weight.addcdiv_(mean, root, value=-self.lr / (1 - self.beta1**self.count))

    def moves_still_rows(self) -> bool:
        return True

    def append_to(self, table: Tensor) -> None:
        decay, of_mean, of_square, ratio, moved, moved_eps = table.unbind()
        kept = 1 - self.lr * self.weight_decay
        correction = math.sqrt(1 - self.beta2**self.count)
        rate = self.lr * correction / (1 - self.beta1**self.count)
        decay.mul_(kept)
        of_mean.mul_(self.beta1)
        of_square.mul_(self.beta2)
        ratio.mul_(self.beta1 / self.beta2)
        # A / sqrt(B) is sqrt(A * A/B): 1/B alone could pass the largest float64
        moved.mul_(kept).add_((of_mean * ratio).sqrt_(), alpha=rate)
        moved_eps.mul_(kept).add_(ratio, alpha=rate * self.eps * correction)

    @staticmethod
    def catch_up(ways: Tensor, weight: Tensor, mean: Tensor, square: Tensor) -> None:
        *_, moved, moved_eps = ways
        # where moved = 0 any eps will do; near float64's smallest numbers the quotient may be 0
        some = moved > LEAST_MOVEMENT
        moved = torch.where(some, moved, 0)
        eps = torch.where(some, moved_eps / torch.where(some, moved, 1), 1)
        ways = torch.stack([*ways[:3], moved, eps])
        decay, of_mean, of_square, moved, eps = beside(ways, weight)
        direction = mean / square.sqrt().add_(eps)
        weight.mul_(decay).addcmul_(direction, moved, value=-1)
        mean.mul_(of_mean)
        square.mul_(of_square)


class RowAdamW(RowOptimizer):
    """``torch.optim.AdamW`` for row-sparse gradients of class centres; dense ones are taken too.

    ``unsampled`` is as in :class:`fastmargin.optim.RowSGD`. A parameter counts one ``step`` for
    all its rows, and the bias corrections follow that count in every mode, so a row that is first
    sampled late starts with a small step, as it does under ``torch.optim.AdamW``.

    "lazy" sums the movements of the missed steps in closed form with one mean eps for all of them,
    right to first order in ``eps / sqrt(v)`` and exact for one missed step. Weight decay, m and v
    are exact. A sum is never too large; with the default betas and a weight decay of up to a
    thousandth per step it is too small, relative to itself and however many steps were missed, by
    at most

    ====================  ==================  ==============  ===============
    gradients of the row  missed from step 2  from step 101   from step 1001
    ====================  ==================  ==============  ===============
    1000 eps              3e-6                3e-9            1e-10
    10 eps                2e-2                3e-5            1e-6
    any size              3e-1                3e-3            1e-4
    ====================  ==================  ==============  ===============

    State per parameter: ``step``; ``exp_avg`` and ``exp_avg_sq`` as the parameter (float32 for a
    16-bit one); ``last_step`` (C,) int32, but not with "frozen".

    Args:
        params: tensors or groups, as for any optimiser. A sparse gradient has one sparse
            dimension, the rows.
        lr: learning rate, a Python number, not a tensor.
        betas, eps, weight_decay: as ``torch.optim.AdamW``, with ``betas[1] > 0``. "lazy" needs
            ``betas[0] <= betas[1]`` and ``lr * weight_decay < 1``.
        unsampled: "dense", "lazy" or "frozen".
        stochastic_rounding: of 16-bit weights, see :mod:`fastmargin.rounding`. With rounding
            to nearest, an update below half the distance to the next 16-bit number is lost.
        seed: of that rounding, an integer; the same on processes that hold the same rows.

    Raises:
        ValueError: a number out of its range, in a group or, changed since, at the step.
        TypeError: a number that is a tensor, or a seed that is no integer; at the step, a DTensor
            to round stochastically.
        RuntimeError: at the step, during CUDA graph capture.
    """

    _step_type = AdamWStep
    _row_states = ("exp_avg", "exp_avg_sq")
    _numbers = ("lr", "eps", "weight_decay")
    _counts = True

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        unsampled: str = "lazy",
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        self.rounding = Rounding.of(seed) if stochastic_rounding else None
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "unsampled": unsampled,
            },
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        beta1, beta2 = group["betas"]
        if not (0 <= beta1 < 1 and 0 < beta2 < 1):
            raise ValueError(f"betas must be in [0, 1) and (0, 1), got {beta1} and {beta2}")
        if group["unsampled"] != "lazy":
            return
        if beta1 > beta2:
            raise ValueError(
                f"betas: unsampled='lazy' needs betas[0] <= betas[1], got {beta1} and {beta2}; "
                "use 'dense'"
            )
        if group["lr"] * group["weight_decay"] >= 1:
            raise ValueError(
                "weight_decay: unsampled='lazy' needs lr * weight_decay below 1, got "
                f"{group['lr']} * {group['weight_decay']}; use 'dense'"
            )

    def _needed_states(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._row_states

    def _make_step(self, group: dict[str, Any], count: int) -> AdamWStep:
        lr, eps, weight_decay = (float(group[name]) for name in self._numbers)
        beta1, beta2 = map(float, group["betas"])
        return AdamWStep(lr, beta1, beta2, eps, weight_decay, count)
