"""Every backend, dtype, regime and margin against float64, by plain PyTorch's own error."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, BACKENDS_AND_DTYPES, MARGINS, ON_GPU, device_for

import fastmargin as fm
from fastmargin import testing
from fastmargin.margins import NearestMargin


def exact(dtype):
    """Operands that are not rounded, which "auto" would do on a GPU."""
    return "auto" if dtype == torch.float64 else "fp32"


# Relative error allowed where plain PyTorch happens to be nearly exact: a few roundings of the
# logit, s * eps, which the loss and p_y inherit.
FLOOR = {torch.float64: 2e-13, torch.float32: 3e-5}


def run(loss_of, case, requires=("x", "weight")):
    """Loss and both gradients (None where not asked)."""
    x = case.x.clone().requires_grad_("x" in requires)
    weight = case.weight.clone().requires_grad_("weight" in requires)
    loss = loss_of(x, weight, case.labels)
    loss.backward()
    return loss.detach(), x.grad, weight.grad


def three_ways(backend, dtype, case, margin, reduction="sum"):
    """(backend, plain in dtype, truth) as loss and gradients."""
    device = device_for(backend)
    testing.shape_table(margin, *case.weight.shape)
    margin.eval()

    truth = run(lambda x, w, y: testing.plain_loss(x, w, y, margin, reduction, stable=True), case)
    own = run(lambda x, w, y: testing.plain_loss(x, w, y, margin, reduction), case.to(dtype))
    margin.to(device)

    def ours(x, w, y):
        return fm.margin_loss(
            x,
            w,
            y,
            margin,
            reduction=reduction,
            backend=backend,
            precision=exact(dtype),
        )

    return run(ours, case.to(dtype, device)), own, truth


@pytest.mark.parametrize(
    "regime", [r for r in testing.REGIMES if r not in ("aligned", "zero_rows")]
)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_loss_and_gradients(backend, dtype, regime, margin):
    case = testing.make_case(regime)
    if isinstance(margin, NearestMargin) and regime == "one_class":
        pytest.skip("no negative centre to be near; test_without_negatives has it")
    ours, own, truth = three_ways(backend, dtype, case, margin)
    # 1 / sin(theta)^2 is 1e6 there, in the truth's own roundings too
    floor = FLOOR[dtype] * (1e4 if regime == "antipodal" and dtype == torch.float64 else 1)
    for name, a, p, t in zip(("loss", "dx", "dW"), ours, own, truth, strict=True):
        testing.assert_close_as_torch(a, p, t, factor=3, floor=floor, name=name)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_confident_rows_keep_their_digits(backend, dtype):
    """1 - p_y of 1e-9 and less: plain PyTorch in float32 has no digit of this gradient left."""
    case = testing.make_case("confident")
    ours, own, truth = three_ways(backend, dtype, case, fm.CosFace(m=0.1, s=64))
    assert float(truth[0]) < 1e-6
    for name, a, t in zip(("loss", "dx", "dW"), ours, truth, strict=True):
        error = testing.relative_error(a, t)
        assert error < (1e-11 if dtype == torch.float64 else 1e-4), (name, error)
    if dtype == torch.float32:
        assert testing.relative_error(own[1], truth[1]) > 0.01


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_every_row_keeps_its_digits(backend, dtype):
    """Hard and confident rows in one batch: no row hides behind the gradients of the others."""
    hard, confident = testing.make_case("random"), testing.make_case("confident")
    case = testing.Case(
        torch.cat([hard.x, confident.x]), hard.weight, torch.cat([hard.labels, confident.labels])
    )
    ours, _, truth = three_ways(backend, dtype, case, fm.CosFace(m=0.1, s=64))
    error = (ours[1].double().cpu() - truth[1]).norm(dim=1) / truth[1].norm(dim=1)
    assert error.max() < (1e-10 if dtype == torch.float64 else 3e-4)


@pytest.mark.parametrize("name", ["cosface", "arcface", "arcface_none", "adaface", "kappaface"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_aligned_rows_are_finite(backend, dtype, name):
    """cos = +-1: value as in float64, gradient finite and small (the tangent direction is gone)."""
    case = testing.make_case("aligned")
    ours, _, truth = three_ways(backend, dtype, case, MARGINS[name]())
    error = testing.relative_error(ours[0], truth[0])
    assert error < (1e-8 if dtype == torch.float64 else 1e-3)
    for gradient in ours[1:]:
        assert torch.isfinite(gradient).all()
        assert gradient.norm() < 100 * len(case.labels)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_zero_rows_get_zero_gradient(backend, dtype):
    device = device_for(backend)
    case = testing.make_case("zero_rows").to(dtype, device)
    loss, dx, dw = run(
        lambda x, w, y: fm.margin_loss(x, w, y, fm.ArcFace(s=16), backend=backend), case
    )
    assert torch.isfinite(loss) and torch.isfinite(dx).all() and torch.isfinite(dw).all()
    assert dx[0].abs().max() == 0 and dw[-1].abs().max() == 0
    assert (dx[1:].abs().amax(1) > 0).all() and (dw[:-1].abs().amax(1) > 0).all()


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_without_negatives(backend, dtype, margin):
    """One class: the softmax is certain, the hinge has nothing to be near to."""
    device = device_for(backend)
    case = testing.make_case("one_class").to(dtype, device)
    margin = testing.shape_table(margin, *case.weight.shape).eval().to(device)
    loss, dx, dw = run(lambda x, w, y: fm.margin_loss(x, w, y, margin, backend=backend), case)
    if margin.penalty(loss) is None and not getattr(margin, "zero_slot", False):
        assert loss == 0 and dx.abs().max() == 0 and dw.abs().max() == 0
    assert torch.isfinite(dx).all() and torch.isfinite(dw).all()


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("name", ["arcface", "npt"])
def test_partial_gradients_and_layouts(backend, dtype, name):
    """Only dx, only dW, transposed and strided inputs, labels (B, 1) int32: the same numbers."""
    device = device_for(backend)
    case = testing.make_case("some_ignored").to(dtype, device)
    options = {"backend": backend, "precision": exact(dtype)}

    def loss_of(x, w, y):
        return fm.margin_loss(x, w, y, MARGINS[name](), **options)

    loss, dx, dw = run(loss_of, case)
    for requires in (("x",), ("weight",)):
        part = run(loss_of, case, requires)
        torch.testing.assert_close(part[0], loss, rtol=0, atol=0)
        for full, one in zip((dx, dw), part[1:], strict=True):
            assert one is None or torch.equal(one, full)
        assert (part[1] is None) != (part[2] is None)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(case.x, case.weight, case.labels), loss)

    wide = torch.stack([case.x, case.x], dim=2).flatten(1)
    strided = run(
        lambda x, w, y: loss_of(wide[:, ::2] * 0 + x, w.t().contiguous().t(), y[:, None].int()),
        case,
    )
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {}
    for a, b in zip(strided, (loss, dx, dw), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("name", ["adaface", "npt_3"])
def test_reductions_and_uneven_upstream_gradient(backend, dtype, name):
    device = device_for(backend)
    case = testing.make_case("some_ignored").to(dtype, device)
    margin = MARGINS[name]().eval().to(device)
    options = {"backend": backend, "precision": exact(dtype)}
    upstream = torch.randn(len(case.labels), dtype=dtype, device=device)

    def weighted(loss_rows):
        return lambda x, w, y: (loss_rows(x, w, y) * upstream).sum()

    ours = run(weighted(lambda x, w, y: fm.margin_loss(x, w, y, margin, "none", **options)), case)
    plain = run(weighted(lambda x, w, y: testing.plain_loss(x, w, y, margin, "none")), case)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {}
    for a, p in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, p, **tolerance)
    rows = fm.margin_loss(case.x, case.weight, case.labels, margin, "none", **options)
    total = fm.margin_loss(case.x, case.weight, case.labels, margin, "sum", **options)
    mean = fm.margin_loss(case.x, case.weight, case.labels, margin, "mean", **options)
    torch.testing.assert_close(rows.sum(), total)
    torch.testing.assert_close(mean, total / (case.labels >= 0).sum())
    assert (rows[case.labels < 0] == 0).all()


@pytest.mark.parametrize("name", ["arcface", "npt", "no_form"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_ignored_rows_may_hold_anything(backend, dtype, name):
    """NaN in a row with label -1 reaches neither the loss nor a gradient."""
    device = device_for(backend)
    case = testing.make_case("some_ignored").to(dtype, device)
    margin = MARGINS[name]()

    def loss_of(x, w, y):
        return fm.margin_loss(x, w, y, margin, backend=backend)

    clean = run(loss_of, case)
    case.x[case.labels < 0] = torch.nan
    for a, b in zip(run(loss_of, case), clean, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["cosface", "adaface", "npt"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_second_order_gradient_is_refused(backend, dtype, name):
    """An error, not a wrong number, also where the rest of what is derived has a derivative."""
    device = device_for(backend)
    case = testing.make_case("random", batch=3, classes=5, dim=4).to(dtype, device)
    inputs = case.x.requires_grad_(), case.weight.requires_grad_()
    for which in inputs:
        loss = fm.margin_loss(*inputs, case.labels, MARGINS[name](), backend=backend)
        (gradient,) = torch.autograd.grad(loss, which, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiate twice|no autograd formula"):
            (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_a_graph_are_the_same(sparse):
    head = fm.MarginHead(
        8, 20, fm.ArcFace(), num_sampled=10 if sparse else None, sparse_grad=sparse
    )
    x, labels = torch.randn(4, 8), torch.arange(4)
    loss = head(x, labels)
    plain = torch.autograd.grad(loss, head.weight, retain_graph=True)[0]
    graph = torch.autograd.grad(loss, head.weight, create_graph=True)[0]
    assert graph.is_sparse == sparse and graph.requires_grad and not plain.requires_grad
    assert torch.equal(graph.detach().to_dense(), plain.to_dense())


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_second_backward_scaled_gradient_and_untouched_inputs(backend, dtype):
    device = device_for(backend)
    case = testing.make_case("random").to(dtype, device)
    before = [t.clone() for t in (case.x, case.weight, case.labels)]
    x = case.x.requires_grad_()
    weight = case.weight.requires_grad_()
    options = {"backend": backend, "precision": exact(dtype)}
    loss = fm.margin_loss(x, weight, case.labels, fm.ArcFace(), **options)
    loss.backward(retain_graph=True)
    first = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    (loss * 1024).backward()
    torch.testing.assert_close(x.grad, first[0] * 1024)
    if backend in ON_GPU:  # which carry the rows' upstream gradients as logarithms
        assert testing.relative_error(weight.grad, first[1] * 1024) < 2e-6
    else:
        torch.testing.assert_close(weight.grad, first[1] * 1024)
    for now, then in zip((x, weight, case.labels), before, strict=True):
        assert torch.equal(now.detach(), then)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_runs_are_bit_equal(backend, dtype):
    device = device_for(backend)
    case = testing.make_case("random", batch=33, classes=301).to(dtype, device)
    runs = [
        run(lambda x, w, y: fm.margin_loss(x, w, y, fm.ArcFace(), backend=backend), case)
        for _ in range(2)
    ]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bit_inputs(backend, x_dtype, weight_dtype):
    """Inputs of 16 bits are read as they are; only the gradient is rounded to their type."""
    device = device_for(backend)
    exact = testing.make_case("random")
    case = testing.Case(
        exact.x.to(x_dtype).double(), exact.weight.to(weight_dtype).double(), exact.labels
    )
    truth = run(lambda x, w, y: testing.plain_loss(x, w, y, fm.ArcFace()), case)
    x = case.x.to(device, x_dtype).requires_grad_()
    weight = case.weight.to(device, weight_dtype).requires_grad_()
    labels = case.labels.to(device)
    loss = fm.margin_loss(x, weight, labels, fm.ArcFace(), backend=backend, precision="fp32")
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == x_dtype
    assert weight.grad.dtype == weight_dtype
    for a, t in zip((loss, x.grad, weight.grad), truth, strict=True):
        rounding = max(torch.finfo(a.dtype).eps, 3e-6)
        assert testing.relative_error(a, t) < rounding


@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize(
    ("precision", "allowed"), [("tf32", 2e-3), ("bf16", 1e-2), ("fp16", 1.5e-3)]
)
def test_low_precision_operands(backend, precision, allowed):
    """Errors of the operands' rounding, and not of anything else."""
    device = device_for(backend)
    case = testing.make_case("random", batch=48, classes=190, dim=64)
    truth = run(lambda x, w, y: testing.plain_loss(x, w, y, fm.ArcFace()), case)
    ours = run(
        lambda x, w, y: fm.margin_loss(x, w, y, fm.ArcFace(), backend=backend, precision=precision),
        case.to(torch.float32, device),
    )
    for a, t in zip(ours, truth, strict=True):
        assert testing.relative_error(a, t) < allowed
