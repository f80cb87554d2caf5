"""The problem a tile is tried on: one operation of the Triton backend on random inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmargin.backends.reference import BACKEND as REFERENCE
from fastmargin.backends.triton import BACKEND as TRITON
from fastmargin.backends.triton import tuned
from fastmargin.backends.triton.configs import OPERAND_DTYPES
from fastmargin.spec import GradientFactors, SgdUpdate

EMPTY_EVERY = 7
"""One in this many slots of an index is padding."""


@dataclass(frozen=True)
class Shape:
    """B, C and D."""

    batch: int
    classes: int
    dim: int


@dataclass(frozen=True)
class Variant:
    """The variant a kernel is compiled for.

    stored: centres are stored in the operand type, else in fp32. indexed: columns are rows of an
    index. scale: s; from about 70 on sums need a running shift. counted: rows without a gradient
    are left out. step: the pass takes an SGD step with momentum. k: nearest negatives.

    With a rule for hard negatives the user's table is not used.
    """

    stored: bool = False
    indexed: bool = False
    scale: float = 64.0
    counted: bool = False
    step: bool = False
    k: int = 1


PLAIN = Variant()
_FULL = {
    "stats_pull": Variant(scale=100.0),
    "stats_sum": Variant(scale=100.0),
    "centre_pass": Variant(counted=True),
    "topk": Variant(k=16),
}


def variants(kernel: str) -> tuple[Variant, ...]:
    """The plain one, then those that take the most registers."""
    full = _FULL[kernel]
    found = PLAIN, full, replace(full, stored=True), replace(full, indexed=True)
    if kernel == "centre_pass":  # another epilogue of the same pass
        return *found, replace(full, step=True), replace(full, stored=True, step=True)
    return found


@dataclass(frozen=True)
class Problem:
    """Inputs of an operation, as in the backend's interface."""

    kernel: str
    precision: str
    variant: Variant
    x_hat: Tensor  # (B, D) fp32
    weight: Tensor  # (C, D) fp32, or the operand type
    index: Tensor | None  # (K,)
    labels: Tensor  # (B,)
    d_lse: Tensor  # (B,) fp32
    d_cos: Tensor  # (B,) fp32
    lse_neg: Tensor | None  # (B,) fp32, for the centre pass


def make_problem(
    kernel: str, shape: Shape, precision: str, variant: Variant, device: torch.device
) -> Problem:
    """Random unit rows and centres, the same every time."""
    g = torch.Generator(device).manual_seed(0)
    batch, classes, dim = shape.batch, shape.classes, shape.dim
    weight = torch.randn(classes, dim, generator=g, device=device)
    x_hat = F.normalize(torch.randn(batch, dim, generator=g, device=device))
    labels = torch.randint(classes, (batch,), generator=g, device=device)
    # of a magnitude that 16-bit gradients can represent
    d_lse, d_cos = torch.rand(2, batch, generator=g, device=device)
    d_cos = -variant.scale * d_cos
    if variant.stored:
        weight = weight.to(OPERAND_DTYPES[precision])
    index = None
    if variant.indexed:
        index = torch.randperm(classes, generator=g, device=device)
        empty = EMPTY_EVERY - 1
        index[empty::EMPTY_EVERY] = -1
        labels -= (labels % EMPTY_EVERY == empty).long()
    if variant.counted:
        d_lse[::3] = d_cos[::3] = 0
    made = Problem(
        kernel, precision, variant, x_hat, weight, index, labels, d_lse, d_cos, lse_neg=None
    )
    if kernel != "centre_pass":
        return made
    with tuned.using({}):
        lse_neg = _stats(made, TRITON, torch.float32, False, precision).lse_neg
    return replace(made, lse_neg=lse_neg)


def run(problem: Problem) -> object:
    """Runs the operation with the currently chosen tiles; pass the result to :func:`outputs`."""
    return _operation(problem, TRITON, torch.float32, problem.precision)


def outputs(problem: Problem) -> dict[str, Tensor]:
    """All results by name, each (rows, ...)."""
    return _named(problem, run(problem))


def truth(problem: Problem) -> dict[str, Tensor]:
    """The same in float64 by the reference backend, which is dense: for small problems."""
    return _named(problem, _operation(problem, REFERENCE, torch.float64, "auto"))


def _centres(problem: Problem, dtype: torch.dtype) -> Tensor:
    """The centres as stored, or in float64 for the reference."""
    return problem.weight.to(dtype) if dtype == torch.float64 else problem.weight


def _stats(problem: Problem, backend, dtype: torch.dtype, want_pull: bool, precision: str):
    return backend.row_stats(
        problem.x_hat.to(dtype),
        _centres(problem, dtype),
        problem.index,
        problem.labels,
        problem.variant.scale,
        None,
        0,
        want_pull,
        precision,
    )


def _operation(problem: Problem, backend, dtype: torch.dtype, precision: str):
    if problem.kernel in ("stats_pull", "stats_sum"):
        return _stats(problem, backend, dtype, problem.kernel == "stats_pull", precision)
    if problem.kernel == "topk":
        return backend.row_topk(
            problem.x_hat.to(dtype),
            _centres(problem, dtype),
            problem.index,
            problem.labels,
            problem.variant.k,
            0,
            precision,
        )
    d_lse, d_cos, x_hat = (t.to(dtype) for t in (problem.d_lse, problem.d_cos, problem.x_hat))
    weight, variant = _centres(problem, dtype), problem.variant
    part = GradientFactors(
        d_lse=d_lse,
        d_cos=d_cos,
        x_hat=x_hat,
        labels=problem.labels,
        lse_neg=problem.lse_neg.to(dtype),
        scale=variant.scale,
        index=problem.index,
        precision=precision,
        skip_zero_rows=variant.counted,
    )
    if not variant.step:
        return backend.row_stats_backward(weight, part)
    # a buffer of zeros becomes the gradient
    weight, buffer = weight.clone(), torch.zeros_like(weight, dtype=dtype)
    step = SgdUpdate(0.1, 0.9, 0.0, False)
    backend.centre_step(weight, buffer, step, part)
    return buffer


def _named(problem: Problem, result) -> dict[str, Tensor]:
    if problem.kernel in ("stats_pull", "stats_sum"):
        found = {"lse_neg": result.lse_neg, "max_neg": result.max_neg}
        return found | ({"pull": result.pull} if problem.kernel == "stats_pull" else {})
    if problem.kernel == "centre_pass":
        return {"d_weight": result}
    cosines, columns, _ = result
    # near ties may swap, so compare the cosines of the columns, not the columns
    count = len(problem.weight)  # of an index, too
    rows = columns.clamp(0, count - 1)
    rows = rows if problem.index is None else problem.index[rows]
    centres = F.normalize(problem.weight[rows.clamp_min(0)].double(), dim=-1)
    own = (centres * problem.x_hat.double()[:, None]).sum(-1)
    own = own.masked_fill(columns == -1, -torch.inf)
    own = own.masked_fill((columns < -1) | (columns >= count) | (rows < 0), torch.nan)
    return {"cosines": cosines, "columns": own}


def worst_row(actual: Tensor, expected: Tensor, chunk: int = 1 << 16) -> float:
    """Largest row error: its norm over that of the row, or of the median row if that is larger.

    Inputs are (rows, ...). Infinite where finiteness differs from the expected. Synchronises.
    """
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = (t.reshape(len(t), -1) for t in (actual, expected))
    typical = _sizes(expected, chunk).median()
    worst = torch.zeros((), dtype=torch.float64, device=expected.device)
    for a, b in zip(actual.split(chunk), expected.split(chunk), strict=True):
        a, b = a.double(), b.double()
        same = (a == b) & torch.isinf(b)
        a, b = torch.where(same, 0, a), torch.where(same, 0, b)
        error = torch.linalg.vector_norm(a - b, dim=1)
        size = torch.linalg.vector_norm(b, dim=1).clamp_min(typical)
        share = torch.where(error == 0, 0, error / size)
        worst = torch.maximum(worst, share.nan_to_num(torch.inf, torch.inf).max())
    return float(worst)


def _sizes(rows: Tensor, chunk: int) -> Tensor:
    parts = [torch.where(torch.isinf(t), 0, t).double() for t in rows.split(chunk)]
    return torch.cat([torch.linalg.vector_norm(t, dim=1) for t in parts])
