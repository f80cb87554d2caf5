"""Any shape, label, scale and layout: the compiled backend is the plain loss."""

from __future__ import annotations

import torch
from conftest import device_for
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmargin as fm
from fastmargin import ops, testing
from fastmargin.spec import HardRule

# one dimension has cosines of exactly +-1 only: test_backends.py has those
shapes = st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(2, 70))


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    seed=st.integers(0, 1000),
    ignored=st.floats(0, 1),
    s=st.sampled_from([1.0, 16.0, 64.0, 256.0]),
    transposed=st.booleans(),
)
def test_cpu_is_the_plain_loss(shape, seed, ignored, s, transposed):
    device_for("cpu")
    case = testing.make_case("random", *shape, seed=seed)
    g = torch.Generator().manual_seed(seed)
    case.labels[torch.rand(len(case.labels), generator=g) < ignored] = -1
    x = case.x.requires_grad_()
    weight = case.weight.t().contiguous().t() if transposed else case.weight
    weight = weight.requires_grad_()
    margin = fm.ArcFace(s=s, guard="mmm")
    ours = fm.margin_loss(x, weight, case.labels, margin, backend="cpu")
    plain = testing.plain_loss(x, weight, case.labels, margin, stable=True)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(plain, (x, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * s)


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes,
    seed=st.integers(0, 1000),
    k=st.integers(1, 16),
    class_start=st.integers(-5, 5),
    places=st.none() | st.integers(0, 80),
    rule=st.none() | st.tuples(*[st.floats(-2, 2)] * 3),
)
def test_cpu_passes_are_the_reference(shape, seed, k, class_start, places, rule):
    device_for("cpu")
    case = testing.make_case("random", *shape, seed=seed)
    x_hat = torch.nn.functional.normalize(case.x)
    hard = None if rule is None else HardRule.of(case.x[:, 0] * 0.1, *rule)

    index = None
    if places is not None:  # more than there are rows: the rest is empty
        g = torch.Generator().manual_seed(seed)
        index = torch.randperm(2 * len(case.weight) + places, generator=g)[:places]

    def passes(backend):
        rest = {"backend": backend, "index": index}
        stats = ops.row_stats(x_hat, case.weight, case.labels, 30.0, hard, class_start, **rest)
        top = ops.row_topk(x_hat, case.weight, case.labels, k, class_start, **rest)
        return stats.lse_neg, stats.cos_y, stats.max_neg, *top

    for ours, reference in zip(passes("cpu"), passes("reference"), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-10)
