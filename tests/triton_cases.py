"""Problems of the passes over the centres, solved by Triton's kernels and by the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from conftest import device_for

from fastmargin.backends.reference import BACKEND as REFERENCE
from fastmargin.backends.triton import BACKEND as TRITON
from fastmargin.norms import inverse_norm
from fastmargin.rows import take
from fastmargin.spec import GradientFactors, HardRule, RowStats
from fastmargin.testing import assert_close_as_torch, make_case

OPERANDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# roundings of the logit, s * eps a few times over, where the yardstick happens to be exact
FLOOR = {"fp32": 2e-5, "fp16": 1e-4, "bf16": 1e-3}
RULES = {
    "none": None,
    "curricular": (1.0, 0.3, 0.0),
    "mv_softmax": (0.0, 1.2, 0.2),
    "filter": (0.0, 0.0, 0.0),
    # meets the plain logits at its threshold, so that rounding to 16 bits may cross it
    "continuous": (0.0, 1.5, -0.1),
}


@dataclass(frozen=True)
class Problem:
    """Inputs of ``row_stats``, exact in float32: what both sides start from."""

    x_hat: torch.Tensor  # (B, D) fp32
    weight: torch.Tensor  # (C, D) as the kernels get it
    labels: torch.Tensor  # (B,)
    index: torch.Tensor | None = None  # (K,)
    scale: float = 64.0
    rule: str = "none"
    class_start: int = 0
    d_lse: torch.Tensor | None = None  # (B,) fp32
    d_cos: torch.Tensor | None = None

    def hard(self, dtype: torch.dtype) -> HardRule | None:
        if RULES[self.rule] is None:
            return None
        g = torch.Generator().manual_seed(5)
        # not a value that any cosine takes: which side of it one falls must not hang on rounding
        threshold = 0.1 + 0.2 * torch.rand(len(self.labels), generator=g)
        if self.rule == "continuous":
            threshold = torch.full_like(threshold, 0.2)
        return HardRule.of(threshold.to(self.labels.device, dtype), *RULES[self.rule])

    def factors(self, lse_neg: torch.Tensor, precision: str) -> GradientFactors:
        return GradientFactors(
            d_lse=self.d_lse,
            d_cos=self.d_cos,
            x_hat=self.x_hat,
            labels=self.labels,
            lse_neg=lse_neg,
            scale=self.scale,
            index=self.index,
            class_start=self.class_start,
            hard=self.hard(self.x_hat.dtype),
            precision=precision,
        )


def problem(regime="random", batch=20, classes=70, dim=24, dtype=torch.float32, **changes):
    case = make_case(regime, batch, classes, dim)
    g = torch.Generator().manual_seed(1)
    d_lse, d_cos = (torch.randn(len(case.labels), generator=g) for _ in range(2))
    x_hat = (case.x * inverse_norm(case.x)).float()
    made = Problem(x_hat, case.weight.to(dtype), case.labels, d_lse=d_lse, d_cos=-d_cos.abs())
    if "class_start" in changes:
        made = replace(made, labels=made.labels + changes["class_start"])
    return replace(made, **changes)


def through_index(p: Problem) -> Problem:
    """The same centres at random rows among others, in another order, with empty places."""
    g = torch.Generator().manual_seed(4)
    count, spare = len(p.weight), len(p.weight) // 3 + 1
    rows = torch.randperm(3 * count, generator=g)[:count]
    weight = torch.randn(3 * count, p.weight.shape[1], generator=g).to(p.weight.dtype)
    weight[rows] = p.weight
    places = torch.randperm(count + spare, generator=g)
    index = torch.full((count + spare,), -1)
    index[places[:count]] = rows
    known = p.labels >= p.class_start
    labels = places[torch.where(known, p.labels - p.class_start, 0)] + p.class_start
    return replace(p, weight=weight, index=index, labels=torch.where(known, labels, p.labels))


def moved(p: Problem, backend, dtype: torch.dtype) -> Problem:
    """Where the backend runs, and for the reference in this dtype, centres too."""
    on = device_for("triton") if backend is TRITON else "cpu"
    return replace(
        p,
        x_hat=p.x_hat.to(on, dtype),
        weight=p.weight.to(on) if backend is TRITON else p.weight.to(dtype),
        labels=p.labels.to(on),
        index=None if p.index is None else p.index.to(on),
        d_lse=p.d_lse.to(on, dtype),
        d_cos=p.d_cos.to(on, dtype),
    )


def solve(backend, p: Problem, precision, dtype, lse_neg=None, want_pull=True):
    """``RowStats`` and the gradient of the centres, both on the CPU."""
    p = moved(p, backend, dtype)
    rest = p.scale, p.hard(dtype), p.class_start, want_pull, precision
    stats = backend.row_stats(p.x_hat, p.weight, p.index, p.labels, *rest)
    lse_neg = stats.lse_neg if lse_neg is None else lse_neg
    d_weight = backend.row_stats_backward(p.weight, p.factors(lse_neg, precision))
    parts = (stats.lse_neg, stats.cos_y, stats.max_neg, stats.pull)
    return RowStats(*(t.cpu() for t in parts)), d_weight.cpu()


def yardstick(p: Problem, precision):
    """The reference with operands rounded as the precision has it, d_weight as the weight is."""
    stats, d_weight = rounded_reference(p, precision)
    return stats, d_weight.to(p.weight.dtype)


def as_operands(values, precision):
    """What the products see of them, in float64. tf32 has the bits of fp16 and fp32's range."""
    if precision != "tf32":
        return values.to(OPERANDS[precision]).double()
    fraction, exponent = torch.frexp(values.double())
    return torch.ldexp((fraction * 2**11).round(), exponent - 11)


def rounded_reference(p: Problem, precision):
    if precision == "fp32":
        return solve(REFERENCE, p, "auto", torch.float32)
    inverse = inverse_norm(p.weight.double())
    rounded = replace(
        p,
        x_hat=as_operands(p.x_hat, precision),
        weight=as_operands(p.weight.double() * inverse, precision),
    )
    stats, d_weight = solve(REFERENCE, rounded, "auto", torch.float64)
    return stats, d_weight * (inverse if p.index is None else take(inverse, p.index, 0))


def check(p: Problem, precision="fp32", factor=4.0, floor=None):
    truth, own = solve(REFERENCE, p, "auto", torch.float64), yardstick(p, precision)
    ours = solve(TRITON, p, precision, torch.float32)
    compare(ours, own, truth, precision, factor, floor)


def compare(ours, own, truth, precision="fp32", factor=4.0, floor=None):
    floor = FLOOR[precision if precision != "tf32" else "fp16"] if floor is None else floor
    for name in ("lse_neg", "cos_y", "max_neg", "pull"):
        a, b, t = (getattr(stats, name) for stats in (ours[0], own[0], truth[0]))
        assert torch.equal(torch.isneginf(a), torch.isneginf(t)), f"{name}: -inf"
        a, b, t = (torch.where(torch.isneginf(t), 0, v) for v in (a, b, t))
        at_least = 1e-6 if name == "cos_y" else floor  # the target cosine is fp32 always
        assert_close_as_torch(a, b, t, factor, at_least, name)
    # the radial part that the projection takes away leaves a rounding of its own size
    if float(truth[1].norm()) > 1e-4 * float(truth[0].pull.norm()):
        assert_close_as_torch(ours[1], own[1], truth[1], factor, floor, "d_weight")


def check_topk(p: Problem, k, precision="fp32"):
    on = device_for("triton")
    truth = REFERENCE.row_topk(
        p.x_hat.double(), p.weight.double(), p.index, p.labels, k, p.class_start, "auto"
    )
    index = None if p.index is None else p.index.to(on)
    got = TRITON.row_topk(
        p.x_hat.to(on), p.weight.to(on), index, p.labels.to(on), k, p.class_start, precision
    )
    value, index, cos_y = (t.cpu() for t in got)
    torch.testing.assert_close(cos_y, truth[2].float())
    atol = 1e-6 if precision == "fp32" else 2e-3
    torch.testing.assert_close(value, truth[0].float(), rtol=0, atol=atol)
    assert torch.equal(index == -1, torch.isneginf(value))
    assert (value[:, :-1] >= value[:, 1:]).all()
    if precision == "fp32":
        assert torch.equal(index, truth[1])
    else:
        taken = index.sort(dim=1).values
        assert ((taken[:, 1:] != taken[:, :-1]) | (taken[:, 1:] == -1)).all(), "one twice"


def staged_in_pieces(monkeypatch, columns=23):
    """Not a multiple of a tile, and the last piece is a small one."""
    from fastmargin.backends.triton import centres

    monkeypatch.setattr(centres, "columns_at_a_time", lambda row_bytes: columns)
