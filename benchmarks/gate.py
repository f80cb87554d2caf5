"""The gate: compares the loss and both gradients of each contender with float64.

The truth is the formula that the contender claims, over the centres it used, in float64 with
PyTorch's autograd (``fastmargin.testing.plain_loss``); the package's tests compare the margins with
their papers. A contender that fails is not timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import data
from benchmarks.cases import Case, gate_case
from benchmarks.contenders import ALLOWED, Contender, Head
from benchmarks.contenders.base import SCALE
from fastmargin import testing

REGIMES = {"start": None, "confident": 5.0}
"""Name -> target logit minus the log-sum-exp of the others, or None for random embeddings.

5 gives a loss of 0.007, as at the end of training: 1 - p is small, and plain softmax in a short
format loses it.
"""
FLOOR_16BIT = 4e-3
"""Allowed if gradients of the centres are in 16 bits: half a unit in the last place."""
PARTS = ("loss", "d_embeddings", "d_weight")


@dataclass(frozen=True)
class Verdict:
    """errors: regime -> part -> relative error. allowed: the largest that passes."""

    errors: dict[str, dict[str, float]]
    allowed: float

    @property
    def worst(self) -> float:
        return max(error for parts in self.errors.values() for error in parts.values())

    @property
    def passed(self) -> bool:
        return self.worst <= self.allowed  # False for NaN

    @property
    def reason(self) -> str:
        where = max(
            ((name, part) for name, parts in self.errors.items() for part in parts),
            key=lambda place: self.errors[place[0]][place[1]],
        )
        return (
            f"wrong: {where[1]} differs by {self.worst:.2g} from float64 in the regime "
            f"{where[0]!r}, allowed {self.allowed:.2g}"
        )


def allowed(contender: Contender, case: Case) -> float:
    """Largest relative error attributed to rounding."""
    found = ALLOWED[contender.computes]
    return found if case.dtype == "float32" else max(found, FLOOR_16BIT)


def truth_margin(contender: Contender, case: Case, x: Tensor):
    """The margin in float64, with its statistics after this batch; or None."""
    if contender.prenormalised:
        return None
    margin = contender.margin(case.margin).to(x.device).double()
    if case.margin == "adaface":
        norm = x.norm(dim=1).clamp(1e-3, 100)
        old = margin.batch_mean, margin.batch_std
        new = [
            margin.t_alpha * v + (1 - margin.t_alpha) * o
            for v, o in zip((norm.mean(), norm.std()), old, strict=True)
        ]
        margin.set_norm_ema(*new)
    return margin


def plain(x: Tensor, weight: Tensor, labels: Tensor, margin) -> Tensor:
    """(B,) losses in the operands' dtype, from all (B, C) logits."""
    if margin is not None:
        return testing.plain_loss(x, weight, labels, margin, reduction="none", stable=True)
    logits = SCALE * x @ weight.t()
    own = labels[:, None]
    negatives = logits.scatter(1, own, -torch.inf).logsumexp(1)
    return -F.logsigmoid(logits.gather(1, own).squeeze(1) - negatives)


def gaps(x: Tensor, weight: Tensor, labels: Tensor, margin) -> Tensor:
    """(B,) target logit minus the log-sum-exp of the other logits."""
    x, weight = (x, weight) if margin is None else (F.normalize(x), F.normalize(weight))
    cos, own = x @ weight.t(), labels[:, None]
    target = cos.gather(1, own).squeeze(1)
    if margin is not None:
        target = margin(target, torch.full_like(target, 20.0), labels)
    return SCALE * target - (SCALE * cos).scatter(1, own, -torch.inf).logsumexp(1)


def at_gap(weight: Tensor, labels: Tensor, margin, gap: float, seed: int = 0) -> Tensor:
    """(B, D) float64 embeddings with this logit gap, of length 20 (1 without a margin).

    Between the own centre and a random direction, by bisection on the angle; the closest possible
    if the gap cannot be reached.
    """
    g = torch.Generator(weight.device).manual_seed(seed)
    own = F.normalize(weight[labels])
    noise = torch.randn(own.shape, generator=g, device=weight.device, dtype=weight.dtype)
    noise = F.normalize(noise - (noise * own).sum(1, keepdim=True) * own)
    low = torch.zeros(len(labels), 1, device=weight.device, dtype=weight.dtype)
    high = torch.full_like(low, torch.pi)  # angles in radians; the gap decreases with the angle
    for _ in range(50):
        angle = (low + high) / 2
        x = angle.cos() * own + angle.sin() * noise
        near = (gaps(x, weight, labels, margin) > gap)[:, None]
        low, high = torch.where(near, angle, low), torch.where(near, high, angle)
    return x if margin is None else 20 * x


def solve(head: Head, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The head's loss, and gradients of embeddings (B, D) and centres (C, D)."""
    x = x.detach().requires_grad_()
    head.zero_grad()
    loss = head.loss(x, labels)
    loss.backward()
    gradient = head.gradient().detach().clone()
    head.zero_grad()
    return loss.detach(), x.grad, gradient


def solve_truth(
    contender: Contender, case: Case, weight: Tensor, x: Tensor, labels: Tensor, columns
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64, over the sampled rows of ``weight``."""
    x, weight = x.detach().double().requires_grad_(), weight.double().requires_grad_()
    margin, used = truth_margin(contender, case, x.detach()), weight
    cap = torch.inf if contender.loss_cap is None else contender.loss_cap
    if columns is not None:
        columns = columns[columns >= 0]
        place = torch.full((len(weight),), -1, device=weight.device, dtype=torch.int64)
        place[columns] = torch.arange(len(columns), device=weight.device)
        used, labels = weight[columns], place[labels]
    rows = plain(x, used, labels, margin)
    return rows.detach().clamp_max(cap).mean(), *torch.autograd.grad(rows.mean(), (x, weight))


def errors(
    contender: Contender, case: Case, head: Head, weight: Tensor, x: Tensor, labels: Tensor
) -> dict[str, float]:
    """Relative error of each part."""
    found = solve(head, x, labels)
    truth = solve_truth(contender, case, weight, x, labels, head.columns())
    pairs = zip(PARTS, found, truth, strict=True)
    return {name: testing.relative_error(value, exact) for name, value, exact in pairs}


def check(contender: Contender, case: Case, device: torch.device) -> Verdict:
    """Runs the contender on a small case in both regimes; passes on what it raises."""
    small = gate_case(case)
    unit = contender.prenormalised
    weight = data.centres(small, device, unit)
    found, head = {}, None
    for regime, gap in REGIMES.items():
        if head is None or case.margin == "adaface":  # a batch changes its statistics
            head = contender.make(small, weight.clone())
        x, labels = data.batches(small, device, unit)[0]
        if gap is not None:
            margin = truth_margin(contender, small, x.detach().double())
            x = at_gap(weight.double(), labels, margin, gap).float()
        found[regime] = errors(contender, small, head, weight, x, labels)
    return Verdict(found, allowed(contender, case))
