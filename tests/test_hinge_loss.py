"""The loss on the nearest negatives as one operator: the formula of the margin, and its slopes."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS_AND_DTYPES, device_for

import fastmargin as fm
from fastmargin import ops

CLASSES = 50


def rows(b, k, dtype, on, seed=0):
    """Cosines, some rows with free places, ignored, of unknown label, or exactly at the edge."""
    generator = torch.Generator().manual_seed(seed)
    cos_y = torch.rand(b, generator=generator, dtype=dtype) * 2 - 1
    nearest = torch.rand(b, k, generator=generator, dtype=dtype) * 2 - 1
    nearest = nearest.sort(dim=1, descending=True).values
    labels = torch.arange(b) % CLASSES
    labels[3::7] = -1
    nearest[4::5, k // 2 :] = -torch.inf
    cos_y[1::6], nearest[1::6, 0] = 0.5, 0.25  # with a margin of 0.25 a gap of 0
    return cos_y.to(on), nearest.to(on), labels.to(on)


def plain(cos_y, nearest, labels, margin, reduction):
    """As the losses of Python are reduced; with their gradients."""
    cos_y, nearest = cos_y.double().requires_grad_(), nearest.double().requires_grad_()
    loss = torch.where(labels >= 0, margin(cos_y, nearest), 0)
    loss = torch.where(labels < CLASSES, loss, torch.nan)
    upstream = torch.linspace(0.5, 2, len(labels), device=loss.device, dtype=torch.float64)
    total = {
        "none": (loss * upstream).sum(),
        "sum": loss.sum() * 3,
        "mean": loss.sum() / (labels >= 0).sum().clamp_min(1) * 3,
    }[reduction]
    return loss, total, *torch.autograd.grad(total, (cos_y, nearest))


def ours(cos_y, nearest, labels, margin, reduction, backend):
    cos_y, nearest = cos_y.clone().requires_grad_(), nearest.clone().requires_grad_()
    loss, each, valid = ops.hinge_loss(
        cos_y, nearest, labels, CLASSES, margin.form(), reduction, backend
    )
    assert torch.equal(valid, labels >= 0) and not each.requires_grad
    assert loss.shape == (labels.shape if reduction == "none" else ())
    upstream = torch.linspace(0.5, 2, len(labels), device=loss.device, dtype=loss.dtype)
    total = (loss * upstream).sum() if reduction == "none" else loss * 3
    return each, total, *torch.autograd.grad(total, (cos_y, nearest))


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("zero_slot", [False, True])
@pytest.mark.parametrize(("b", "k"), [(1, 1), (20, 3), (300, 16), (513, 5)])
def test_formula_and_slopes(backend, dtype, reduction, zero_slot, b, k):
    given = rows(b, k, dtype, device_for(backend))
    margin = fm.NPT(delta=0.25, top_k=k, r=0.55, zero_slot=zero_slot)
    expected = plain(*given, margin, reduction)
    eps = torch.finfo(dtype).eps
    for found, truth in zip(ours(*given, margin, reduction, backend), expected, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=20 * eps, atol=20 * eps)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_rows_that_do_not_count(backend, dtype):
    cos_y, nearest, labels = rows(30, 2, dtype, device_for(backend))
    margin = fm.NPT(top_k=2)
    loss, total, *slopes = ours(cos_y, nearest, labels * 0 - 1, margin, "mean", backend)
    assert total == 0 and (loss == 0).all() and not any(slope.any() for slope in slopes)
    labels[5] = CLASSES  # out of range
    loss, total, *slopes = ours(cos_y, nearest, labels, margin, "sum", backend)
    assert total.isnan() and loss.isnan().nonzero().tolist() == [[5]]
    assert not any(slope.isnan().any() or slope[5].any() for slope in slopes)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("zero_slot", [False, True])
def test_nan_is_kept(backend, dtype, zero_slot):
    cos_y, nearest, labels = rows(30, 2, dtype, device_for(backend))
    cos_y[8], nearest[12, 1] = torch.nan, torch.nan
    margin = fm.NPT(top_k=2, zero_slot=zero_slot)
    loss, total, *_ = ours(cos_y, nearest, labels, margin, "mean", backend)
    assert total.isnan() and loss.isnan().nonzero().tolist() == [[8], [12]]


def test_slopes_do_not_have_the_default_dtype(monkeypatch):
    given = rows(20, 3, torch.float64, "cpu")
    margin = fm.NPT(delta=0.25, top_k=3, r=0.55)
    expected = plain(*given, margin, "sum")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = ours(*given, margin, "sum", "reference")
    finally:
        torch.set_default_dtype(before)
    for ours_, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_, truth, rtol=1e-14, atol=1e-14)


def test_more_than_the_triton_kernel_takes():
    cos_y, nearest, labels = rows(5, 20, torch.float32, device_for("triton"))
    with pytest.raises(fm.backends.BackendError, match="16"):
        ops.hinge_loss(cos_y, nearest, labels, CLASSES, fm.NPT(top_k=20).form(), "mean", "triton")


@pytest.mark.gradcheck
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    cos_y, nearest, labels = rows(12, 3, torch.float64, "cpu")
    nearest = nearest.clamp_min(-0.9).requires_grad_()  # finite differences of -inf are none
    form = fm.NPT(delta=0.3, zero_slot=True).form()

    def loss(cos_y, nearest):
        return ops.hinge_loss(cos_y, nearest, labels, CLASSES, form, reduction)[0]

    assert torch.autograd.gradcheck(loss, (cos_y.requires_grad_(), nearest))


def test_a_margin_that_has_only_a_formula_keeps_it():
    class Squared(fm.NPT):
        def forward(self, cos_y, nearest):
            return super().forward(cos_y, nearest) ** 2

    learned = fm.NPT()
    learned.delta = torch.nn.Parameter(torch.tensor(0.4))
    assert fm.NPT().kernel_form() is not None
    assert Squared().kernel_form() is None and learned.kernel_form() is None
    fm.margin_loss(torch.randn(4, 8), torch.randn(9, 8), torch.arange(4), learned).backward()
    assert learned.delta.grad > 0
