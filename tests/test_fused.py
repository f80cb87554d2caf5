"""The loss as one step of autograd is the loss of the operators one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import BACKENDS, BACKENDS_AND_DTYPES, MARGINS, device_for

import fastmargin as fm
from fastmargin import functional, ops, testing
from fastmargin.backends.reference import BACKEND as REFERENCE
from fastmargin.norms import advance, moments

KINDS = ("softmax", "cos", "arc", "ada", "from", "elastic", "kappa")
WITH_FORM = [name for name in MARGINS if name.startswith(KINDS)]


class Asked:
    """Counts who asks for the step."""

    def __init__(self, monkeypatch):
        self.count, forward = 0, ops.softmax_loss

        def counting(*args, **kwargs):
            self.count += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(ops, "softmax_loss", counting)


@pytest.fixture
def asked(monkeypatch):
    return Asked(monkeypatch)


def one_by_one(monkeypatch):
    monkeypatch.setattr(functional, "_form_of_one_step", lambda *_: None)


def everything(head, x, labels, reduction, upstream):
    """Loss, gradients, metrics and state after two steps of one head."""
    head, found = copy.deepcopy(head), []
    for _ in range(2):
        x = x.detach().clone().requires_grad_()
        loss = head(x, labels, reduction)
        head.weight.grad = None
        (loss * upstream).sum().backward()
        weight_grad = head.weight.grad
        weight_grad = weight_grad.to_dense() if weight_grad.is_sparse else weight_grad
        found += [loss.detach(), x.grad, weight_grad, *head.metrics.values()]
        found += list(head.margin.state_dict().values())
    return found


def compare(head, x, labels, reduction, monkeypatch, **close):
    upstream = torch.randn(len(x) if reduction == "none" else (), device=x.device, dtype=x.dtype)
    fused = everything(head, x, labels, reduction, upstream)
    with monkeypatch.context() as patch:
        one_by_one(patch)
        plain = everything(head, x, labels, reduction, upstream)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("name", WITH_FORM)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_numbers_are_those_of_the_operators(backend, dtype, name, asked, monkeypatch):
    device = device_for(backend)
    case = testing.make_case("some_ignored").to(dtype, device)
    precision = "auto" if dtype == torch.float64 else "fp32"
    head = fm.MarginHead(24, 70, MARGINS[name](), backend=backend, precision=precision)
    head = head.to(device, dtype)
    head.weight.data.copy_(case.weight)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    compare(head, case.x, case.labels, "mean", monkeypatch, **close)
    assert asked.count == 2
    if name == "adaface":
        compare(head, case.x, case.labels, "none", monkeypatch, **close)
        head.eval()
        compare(head, case.x, case.labels, "sum", monkeypatch, **close)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_sampled_classes(backend, sparse, asked, monkeypatch):
    device = device_for(backend)
    case = testing.make_case("some_ignored").to(torch.float32, device)
    options = {"sample_rate": 0.6, "sparse_grad": sparse, "backend": backend}
    head = fm.MarginHead(24, 70, fm.AdaFace(), precision="fp32", **options).to(device)
    compare(head, case.x, case.labels, "mean", monkeypatch, rtol=1e-4, atol=1e-5)
    assert asked.count == 2


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16])
def test_of_sixteen_bit_embeddings(x_dtype, monkeypatch):
    device = device_for("triton")
    case = testing.make_case("some_ignored").to(torch.float32, device)
    head = fm.MarginHead(24, 70, fm.AdaFace(), backend="triton", precision="fp16").to(device)
    compare(head, case.x.to(x_dtype), case.labels, "mean", monkeypatch, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 1024, 2500])
@pytest.mark.parametrize("reduction", functional.REDUCTIONS)
def test_of_many_rows(batch, reduction):
    """More rows than the one program takes at once, against float64."""
    device = device_for("triton")
    from fastmargin.backends.triton.margin_loss import margin_loss

    g = torch.Generator().manual_seed(batch)
    cos_y, lse_neg = torch.rand(batch, generator=g) * 2 - 1, 60 + torch.randn(batch, generator=g)
    norm, labels = 40 * torch.rand(batch, generator=g), torch.arange(batch) % 9 - 1
    labels[batch // 2] = batch + 5  # counts as a row, but its class is unknown
    known = labels < batch
    margins = [fm.AdaFace(t_alpha=0.3).to(device) for _ in range(2)]
    ours = margin_loss(
        *(t.to(device) for t in (cos_y, lse_neg, norm, labels)),
        batch,
        margins[0].form(),
        margins[0].norm_ema(),
        reduction,
    )
    exact = margins[1].cpu()
    exact.set_norm_ema(
        *advance(exact.norm_ema(), moments(norm.double(), labels, exact.norm_ema())[None])
    )
    for name, state in exact.named_buffers():
        torch.testing.assert_close(getattr(margins[0], name).cpu(), state, rtol=1e-6, atol=0)
    inputs = cos_y.double(), lse_neg.double(), norm.double(), labels
    rows, *slopes, margin = REFERENCE.margin_rows(*inputs, exact.form())
    rows[~known] = torch.nan
    for slope in slopes:
        slope[~known] = 0
    share = 1 / int((labels >= 0).sum()) if reduction == "mean" else 1.0
    total = torch.empty(0).double() if reduction == "none" else rows.sum() * share
    truth = total, torch.tensor([share]).double(), (labels >= 0).double(), rows, *slopes, margin
    for a, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double().cpu(), t, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert total.isnan().all() or reduction == "none"
    known_ours = margin_loss(
        *(t.to(device) for t in (cos_y, lse_neg, norm, labels)),
        batch + 9,
        margins[0].eval().form(),
        None,
        reduction,
    )
    rows = REFERENCE.margin_rows(*inputs, exact.form())[0]
    if reduction != "none":
        torch.testing.assert_close(
            known_ours[0].item(), float(rows.sum() * share), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_label_out_of_range(backend, monkeypatch):
    """NaN in its own loss and in no gradient, as the operators have it."""
    device = device_for(backend)
    case = testing.make_case("random").to(torch.float32, device)
    labels = case.labels.clone()
    labels[3] = 70
    found = []
    for patch in (False, True):
        if patch:
            one_by_one(monkeypatch)
        x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        options = {"backend": backend, "validate": False, "precision": "fp32"}
        loss = fm.margin_loss(x, weight, labels, fm.ArcFace(), "none", **options)
        loss.sum().backward()
        found.append((loss.detach(), x.grad, weight.grad))
    assert found[0][0].isnan().nonzero().tolist() == [[3]]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_one_gradient_or_none():
    """What is not wanted is not computed, and the other does not change."""
    for backend in ("reference", "triton"):
        device = device_for(backend)
        case = testing.make_case("random").to(torch.float32, device)
        both = [t.clone().requires_grad_() for t in (case.x, case.weight)]
        loss = fm.margin_loss(*both, case.labels, fm.ArcFace(), backend=backend)
        expected = torch.autograd.grad(loss, both)
        for i in range(2):
            one = [t.detach().requires_grad_(i == place) for place, t in enumerate(both)]
            loss = fm.margin_loss(*one, case.labels, fm.ArcFace(), backend=backend)
            assert torch.equal(torch.autograd.grad(loss, one[i])[0], expected[i])
        with torch.no_grad():
            assert not fm.margin_loss(*both, case.labels, fm.ArcFace(), backend=backend).grad_fn


class Watching(fm.AdaFace):
    seen = 0

    def observe(self, x_hat, labels):
        self.seen += 1


class Keeping(fm.AdaFace):
    def set_norm_ema(self, mean, std):
        super().set_norm_ema(mean, std)
        self.last = float(mean)


class Penalised(fm.ArcFace):
    def penalty(self, norm):
        return norm * 0.01


class Other(fm.ArcFace):
    def forward(self, cos_y, norm, labels):
        return cos_y - 0.3


def test_hooks_of_a_margin_are_called(asked):
    """A margin that does more than its form takes the long way."""
    case = testing.make_case("random").to(torch.float32)
    watching, keeping = Watching(), Keeping(t_alpha=0.5)
    losses = [
        fm.margin_loss(case.x, case.weight, case.labels, margin)
        for margin in (watching, keeping, Penalised(), Other(), fm.ArcFace())
    ]
    assert watching.seen == 1 and keeping.last == keeping.batch_mean.item() != 20
    penalty = 0.01 * case.x.norm(dim=1).mean()
    torch.testing.assert_close(losses[2], losses[4] + penalty)
    plain = fm.margin_loss(case.x, case.weight, case.labels, fm.CosFace(m=0.3))
    torch.testing.assert_close(losses[3], plain)
    assert asked.count == 2
    margin = fm.ArcFace()
    margin.penalty = lambda norm: 0.01 * norm
    loss = fm.margin_loss(case.x, case.weight, case.labels, margin)
    torch.testing.assert_close(loss, losses[4] + penalty)


@pytest.mark.parametrize("later", [False, True])
def test_order_of_observing(later):
    """Before the step's own margins, or after them where nothing there depends on it."""
    calls = []

    class Noting(fm.ArcFace):
        observes_for_later = later

        def forward(self, cos_y, norm, labels):
            calls.append("forward")
            return super().forward(cos_y, norm, labels)

        def observe(self, x_hat, labels):
            calls.append("observe")

    case = testing.make_case("random").to(torch.float32)
    for margin in (Noting(), fm.Filtered(Noting(), 0.3)):
        calls.clear()
        fm.margin_loss(case.x, case.weight, case.labels, margin)
        assert calls == (["forward", "observe"] if later else ["observe", "forward"])


def test_figures_outlive_the_labels():
    """Labels that the next batch overwrites do not change what was found."""
    for backend in ("reference", "triton"):
        device = device_for(backend)
        case = testing.make_case("some_ignored").to(torch.float32, device)
        head = fm.MarginHead(24, 70, fm.ArcFace(), backend=backend).to(device)
        head(case.x, case.labels)
        before = head.metrics
        case.labels.fill_(-1)
        assert all(torch.equal(before[name], value) for name, value in head.metrics.items())


def test_state_is_left_alone_by_an_error(monkeypatch):
    """The passes that can fail come first."""
    margin = fm.AdaFace()
    case = testing.make_case("random").to(torch.float32)

    def fail(*_):
        raise RuntimeError("out of memory")

    backend = fm.backends.get("reference")
    monkeypatch.setattr(type(backend), "row_stats", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        fm.margin_loss(case.x, case.weight, case.labels, margin, backend="reference")
    assert margin.batch_mean.item() == 20 and margin.batch_std.item() == 100
