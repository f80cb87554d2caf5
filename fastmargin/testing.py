"""Cases and comparisons for testing a margin or a backend against plain PyTorch.

Errors are relative, ``||a - b|| / ||b||``, against float64; the tolerance is a multiple of plain
PyTorch's own error in the same dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmargin.margins import ClassMargin, KappaFace, Margin, NearestMargin

REGIMES = (
    "random",
    "confident",
    "aligned",
    "antipodal",
    "ragged",
    "one_row",
    "one_class",
    "two_classes",
    "all_ignored",
    "some_ignored",
    "repeated",
    "zero_rows",
)


@dataclass(frozen=True)
class Case:
    """Embeddings (B, D), centres (C, D), labels (B,); float64 with values exact in float32."""

    x: Tensor
    weight: Tensor
    labels: Tensor

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Case:
        return Case(self.x.to(device, dtype), self.weight.to(device, dtype), self.labels.to(device))


def make_case(
    regime: str, batch: int = 24, classes: int = 70, dim: int = 24, seed: int = 0
) -> Case:
    """A batch in one of :data:`REGIMES`.

    ``confident``: p_y -> 1, as at the end of training. ``aligned``: target cosines of exactly +-1.
    ``antipodal``: target cosines near -1. ``ragged``: one class more than a multiple of 64, and it
    is a label. ``repeated``: more rows than classes. ``zero_rows``: one embedding and one centre
    are 0.

    Raises:
        ValueError: another regime.
    """
    g = torch.Generator().manual_seed(seed)
    if regime == "ragged":
        classes = 64 * max(1, classes // 64) + 1
    batch = {"one_row": 1, "repeated": 3 * classes}.get(regime, batch)
    classes = {"one_class": 1, "two_classes": 2}.get(regime, classes)
    weight = torch.randn(classes, dim, generator=g)
    labels = torch.randint(0, classes, (batch,), generator=g)
    x = torch.randn(batch, dim, generator=g) * (1 + 9 * torch.rand(batch, 1, generator=g))
    own = F.normalize(weight[labels])
    length = 5 + 20 * torch.rand(batch, 1, generator=g)
    noise = torch.randn(batch, dim, generator=g) / dim**0.5
    if regime == "confident":
        x = length * (own + 0.2 * noise)
    elif regime == "antipodal":
        x = -length * (own + 1e-3 * noise)
    elif regime == "aligned":
        signs = torch.where(torch.arange(batch) % 2 == 0, 1.0, -1.0)
        x = weight[labels] * signs[:, None] * 2
    elif regime == "ragged":
        labels[::2] = classes - 1
    elif regime == "all_ignored":
        labels[:] = -1
    elif regime == "some_ignored":
        labels[::3] = -1
    elif regime == "zero_rows":
        x[0] = 0
        weight[-1] = 0
        labels[1] = classes - 1
    elif regime not in REGIMES:
        raise ValueError(f"regime must be one of {REGIMES}, got {regime!r}")
    return Case(x.double(), weight.double(), labels)


def plain_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Margin,
    reduction: str = "mean",
    stable: bool = False,
) -> Tensor:
    """The loss in plain PyTorch, with all (B, C) logits: independent of fastmargin's operators.

    Does not advance the margin's norm statistics. ``stable`` keeps 1 - p_y accurate as p_y -> 1,
    which ``F.cross_entropy`` does not even in float64: for reference values.
    """
    cos = F.normalize(x) @ F.normalize(weight).t()
    valid = labels >= 0
    own = labels.clamp_min(0)[:, None]
    cos_y = cos.gather(1, own).squeeze(1)
    norm = torch.linalg.vector_norm(x, dim=1)
    if isinstance(margin, NearestMargin):
        negatives = cos.masked_fill(torch.zeros_like(cos).scatter(1, own, 1).bool(), -torch.inf)
        nearest = negatives.sort(dim=1, descending=True, stable=True).values
        nearest = F.pad(nearest, (0, margin.top_k), value=-torch.inf)[:, : margin.top_k]
        rows = margin(cos_y, nearest) * valid
    else:
        psi = margin(cos_y, norm, labels)
        rule = margin.hard(cos_y.detach(), labels)
        if rule is not None:
            a, b, d = rule.coefficients
            hard = cos > rule.threshold[:, None]
            cos = torch.where(hard, (a * cos + b) * cos + d, cos)
        if stable:
            negatives = (margin.s * cos).scatter(1, own, -torch.inf)
            rows = -F.logsigmoid(margin.s * psi - negatives.logsumexp(1)) * valid
        else:
            logits = margin.s * cos.scatter(1, own, psi[:, None])
            rows = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    penalty = margin.penalty(norm)
    rows = rows if penalty is None else rows + penalty * valid
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / valid.sum().clamp_min(1)


def shape_table(margin: Margin, classes: int, dim: int, seed: int = 0) -> Margin:
    """Binds a margin, with random class weights or margins in [0, 1); returns the margin."""
    table = torch.rand(classes, generator=torch.Generator().manual_seed(seed))
    if isinstance(margin, ClassMargin):
        margin.m = table
    margin.bind(classes, dim)
    if isinstance(margin, KappaFace):
        margin.class_weights.copy_(table)
    return margin


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """``||actual - truth|| / ||truth||``; infinite if actual is not finite.

    Differences below 1e-30 count as 0, since float32 cannot represent e.g. exp(-200).
    """
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    size, error = float(truth.norm()), float((actual - truth).norm())
    if error < 1e-30:
        return 0.0
    return error / size if size > 0 else float("inf")


def assert_close_as_torch(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    factor: float = 2.0,
    floor: float = 0.0,
    name: str = "value",
) -> None:
    """Raises AssertionError if the error of ``actual`` exceeds ``factor`` times plain PyTorch's.

    Args:
        actual: the result under test. plain: plain PyTorch in the same dtype. truth: float64.
        factor: allowed multiple of plain PyTorch's relative error.
        floor: relative error that is always allowed, in case plain PyTorch happens to be exact.
        name: of the value, for the message.
    """
    if actual.shape != truth.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, not {tuple(truth.shape)}")
    error, own = relative_error(actual, truth), relative_error(plain, truth)
    allowed = max(floor, factor * own if own < float("inf") else 0.0)
    if not error <= allowed:
        raise AssertionError(
            f"{name}: relative error {error:.3g} against float64, allowed {allowed:.3g} "
            f"(plain PyTorch in {plain.dtype}: {own:.3g})"
        )
