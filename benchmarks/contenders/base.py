"""Contenders of a benchmark: each makes a head for a case."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cases import Case

SCALE = 64.0
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
ALLOWED = {"fp32": 3e-4, "fp16": 2e-3, "tf32": 2e-3, "bf16": 8e-3, "bf16 stored": 0.3}
"""Largest allowed relative error of loss and gradients against float64, by arithmetic.

In float32 the loss of a confident row is a small difference of logits near 64, with a relative
error of 1e-4 in plain PyTorch. Rounding the operands of the gate's cases (512 dimensions, 4,097
classes) to fp16 or tf32 gives errors of 3e-4, to bf16 3e-3. "bf16 stored": logits or probabilities
are rounded to bfloat16, whose spacing near 64 is 0.25, so p and 1 - p have relative errors of up to
exp(0.25) - 1.
"""


@dataclass
class Head:
    """A contender's head for one case.

    loss: from embeddings (B, D) and labels (B,) to the mean loss. weight: the centres' parameter,
    (C, D), or (D, C) if ``transposed``. optimiser: None if the case has no state. columns: returns
    the rows of the centres used by the last loss, in order, or None for all. left: returns the
    gradient (C, D) if the backward pass leaves it to the optimiser.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    weight: nn.Parameter
    optimiser: torch.optim.Optimizer | None = None
    transposed: bool = False
    columns: Callable[[], Tensor | None] = lambda: None
    left: Callable[[], Tensor] | None = None

    def gradient(self) -> Tensor:
        """(C, D) dense gradient of the centres."""
        grad = self.weight.grad if self.left is None else self.left()
        grad = grad.to_dense() if grad.is_sparse else grad
        return grad.t() if self.transposed else grad

    def gradient_bytes(self) -> int:
        """Bytes of the gradient stored by the backward pass."""
        grad = self.weight.grad
        if grad is None:
            return 0
        parts = [grad._indices(), grad._values()] if grad.is_sparse else [grad]
        return sum(part.numel() * part.element_size() for part in parts)

    def zero_grad(self) -> None:
        self.weight.grad = None


@dataclass(frozen=True)
class Contender:
    """One implementation.

    ours: of this package. computes: key of ALLOWED. margin: the fastmargin margin equivalent to
    what it computes, for the float64 truth; None if it computes softmax on inputs that are already
    of unit length, which is less work. settings and limits are for the reader.
    """

    name: str
    computes: str
    make: Callable[[Case, Tensor], Head]
    margin: Callable[[str], nn.Module] | None
    settings: str
    limits: str = ""
    ours: bool = False
    loss_cap: float | None = None
    """Largest loss it reports for a row; its gradient is not capped."""
    refuses: Callable[[Case, torch.device], str | None] = lambda case, device: None
    """Why it cannot run a case, or None."""
    applies: Callable[[Case], bool] = lambda case: True
    """Whether the case concerns it at all; False makes no row."""

    @property
    def prenormalised(self) -> bool:
        return self.margin is None


def sgd_numbers(case: Case) -> dict[str, float]:
    """Hyper-parameters of the case's optimiser."""
    return SGD if case.momentum else SGD | {"momentum": 0.0}


def sgd(case: Case, parameters) -> torch.optim.Optimizer | None:
    """torch's SGD over all rows; foreach or fused as torch chooses."""
    return None if case.state == "none" else torch.optim.SGD(parameters, **sgd_numbers(case))


def missing(package: str, distribution: str) -> str | None:
    """A message if a package is not installed, else None."""
    if importlib.util.find_spec(package) is None:
        return f"not installed: pip install {distribution}, or the extra fastmargin[peers]"
    return None


def not_sampled(case: Case) -> str | None:
    return None if case.rate == 1 else "it has no sampling of classes"


def one_process(case: Case) -> str | None:
    return None if case.world == 1 else "run in one process here"
