"""The Triton backend's kernels on rows alone, what it refuses, and how it chooses its tiles."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import device_for

from fastmargin import backends
from fastmargin.backends.reference import BACKEND as REFERENCE
from fastmargin.backends.triton import BACKEND as TRITON
from fastmargin.spec import GRAD_MODES, GUARDS, SOURCES, HardRule, MarginForm, NormEma
from fastmargin.testing import make_case


@pytest.fixture(autouse=True)
def device():
    return device_for("triton")


# ---- row_prologue -------------------------------------------------------------------------------


def ema(on="cpu"):
    mean, std = torch.tensor([20.0], device=on), torch.tensor([100.0], device=on)
    return NormEma(mean, std, 0.1, 0.001, 100.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "regime", ["random", "one_row", "all_ignored", "some_ignored", "zero_rows"]
)
def test_row_prologue(regime, dtype):
    on = device_for("triton")
    case = make_case(regime, dim=40)
    x = case.x.to(dtype)
    x[case.labels < 0] = torch.nan  # an ignored row may hold anything
    for strided in (x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, :40]):
        got = TRITON.row_prologue(strided.to(on), case.labels.to(on), ema(on))
        truth = REFERENCE.row_prologue(x.double(), case.labels, ema())
        for a, t in zip(got, truth, strict=True):
            torch.testing.assert_close(a.cpu(), t.float(), rtol=1e-6, atol=1e-7)
    x_hat, norm, _, _ = TRITON.row_prologue(x.to(on), case.labels.to(on), None)
    assert torch.equal(x_hat, got[0]) and torch.equal(norm, got[1])
    x_hat, norm, _, _ = TRITON.row_prologue(case.x.to(on, dtype), None, None)
    truth = REFERENCE.row_prologue(case.x.to(dtype).double(), None, None)
    torch.testing.assert_close(x_hat.cpu(), truth[0].float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(norm.cpu(), truth[1].float(), rtol=1e-6, atol=0)


def test_statistics_of_many_rows():
    """More rows than one step of the loop, their mean far above their spread."""
    on = device_for("triton")
    labels = torch.arange(2500) % 7 - 1
    norm = 90 + 1e-2 * torch.randn(2500)
    x = norm[:, None] * torch.eye(2500, 2)[torch.zeros(2500, dtype=torch.long)]
    got = TRITON.row_prologue(x.to(on), labels.to(on), ema(on))
    truth = REFERENCE.row_prologue(x.double(), labels, ema())
    torch.testing.assert_close(got[2].cpu(), truth[2].float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(got[3].cpu(), truth[3].float(), rtol=1e-6, atol=0)
    again = TRITON.row_prologue(x.to(on), labels.to(on), ema(on))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


# ---- gradients of rows --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("regime", ["random", "one_row", "zero_rows"])
def test_gradient_of_embeddings(regime, dtype):
    on = device_for("triton")
    case = make_case(regime, dim=40)
    x_hat, norm, _, _ = REFERENCE.row_prologue(case.x.double(), None, None)
    d_x_hat, d_norm = torch.randn_like(x_hat), torch.randn_like(norm)
    for slope in (d_norm, None):
        truth = REFERENCE.row_prologue_backward(d_x_hat, slope, x_hat, norm, torch.float64)
        given = [None if t is None else t.float().to(on) for t in (d_x_hat, slope, x_hat, norm)]
        got = TRITON.row_prologue_backward(*given, dtype)
        assert got.dtype == dtype
        rtol = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.cpu().double(), truth, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rows", "columns", "indexed", "no classes"])
def test_gradient_of_unit_rows(layout, dtype):
    """With rows whose centre is elsewhere, and a centre of zero."""
    on = device_for("triton")
    case = make_case("zero_rows", dim=40)
    weight, index = case.weight.to(dtype), None
    labels = case.labels + 5
    if layout == "columns":
        weight = weight.t().contiguous().t()
    if layout == "indexed":
        index = torch.arange(len(weight)).flip(0)
        index[::3] = -1
    if layout == "no classes":
        weight = weight[:0]
    d_lse, d_cos = torch.randn(2, len(labels), dtype=torch.float64)
    pull = torch.randn(len(labels), 40, dtype=torch.float64)
    for start in (5, 7):
        truth = REFERENCE.row_stats_backward_x(
            d_lse, d_cos, pull, weight.double(), index, labels, 8.0, start
        )
        rows = (t.float().to(on) for t in (d_lse, d_cos, pull))
        places = None if index is None else index.to(on)
        about = weight.to(on), places, labels.to(on), 8.0, start
        got = TRITON.row_stats_backward_x(*rows, *about)
        torch.testing.assert_close(got.cpu().double(), truth, rtol=1e-5, atol=1e-5)


# ---- margin_rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("source", SOURCES)
def test_margin_rows(source, guard):
    on = device_for("triton")
    g = torch.Generator().manual_seed(3)
    n, classes = 300, 50
    cos_y = torch.rand(n, generator=g) * 2 - 1
    cos_y[:6] = torch.tensor([1.0, -1.0, 0.0, 0.9999, -0.9999, 1.0])
    lse_neg = torch.randn(n, generator=g) * 20
    lse_neg[5:8] = -math.inf
    lse_neg[8:20] = 64 * cos_y[8:20] - 30  # 1 - p_y near 1e-13
    norm = torch.rand(n, generator=g) * 1.2
    labels = torch.randint(-1, classes, (n,), generator=g)
    for grad, cos_eps in itertools.product(GRAD_MODES, (0.0, 1e-3)):
        form = MarginForm(
            *(64.0, 0.3, 0.1, 0.4, -0.2, source, guard, grad, cos_eps, 1e-3),
            *(0.333, 0.1, 1.0, 1e-3),
            mean=torch.tensor([0.5]),
            std=torch.tensor([0.3]),
            table=torch.rand(n if source == "row" else classes, generator=g),
        )
        inputs = cos_y, lse_neg, norm
        truth = REFERENCE.margin_rows(*(t.double() for t in inputs), labels, form)
        own = REFERENCE.margin_rows(*inputs, labels, form)
        there = {name: getattr(form, name).to(on) for name in ("mean", "std", "table")}
        got = TRITON.margin_rows(*(t.to(on) for t in inputs), labels.to(on), replace(form, **there))
        for a, b, t in zip(got, own, truth, strict=True):
            a = a.cpu()
            # where a guard's two sides meet, rounding picks one: both are right
            same = torch.isclose(b.double(), t, rtol=1e-3, atol=1e-3)
            error = (a.double() - t).abs() / (t.abs() + 1e-30)
            allowed = 4 * (b.double() - t).abs() / (t.abs() + 1e-30) + 2e-5
            bad = same & (error > allowed) & ((a.double() - t).abs() > 2e-6)
            assert not bad.any(), (source, guard, grad, bad.nonzero()[:4], a[bad][:4], t[bad][:4])
            assert a.isfinite().all() and a[labels < 0].eq(0).all()


def test_sine_and_cosine():
    """Through a margin of one radian value per class: psi = cos(theta + m2)."""
    on = device_for("triton")
    angle = torch.linspace(-20, 20, 1001)
    labels = torch.arange(1001)
    for c in (1.0, 0.0):
        cos_y = torch.full((1001,), c)
        form = MarginForm(1.0, m2_u=1.0, source="class", table=angle.to(on))
        zero = torch.zeros(1001, device=on)
        margin = TRITON.margin_rows(cos_y.to(on), zero, zero, labels.to(on), form)[4]
        truth = c - (math.acos(c) + angle.double()).cos()
        assert (margin.cpu() - truth).abs().max() < 3e-7


# ---- choices and refusals -----------------------------------------------------------------------


def test_refusals(device):
    assert "float64" in TRITON.refuses(torch.device(device), torch.float64)
    assert TRITON.refuses(torch.device("meta"), torch.float32)
    here = torch.device(device)
    for width, k, reason in ((1025, 1, "up to 1024 dimensions"), (4, 17, "up to 16 nearest")):
        with pytest.raises(backends.BackendError, match=reason):
            backends.select("triton", here, torch.float32, "auto", width, k)
        instead = backends.select("auto", here, torch.float32, "auto", width, k)
        assert instead.name in ("reference", "cpu")


def test_reasons_without_interpreter_and_without_triton():
    code = (
        "import sys, os; os.environ.pop('TRITON_INTERPRET', None); {hide}"
        "import torch; from fastmargin import backends; b = backends.get('triton');"
        "torch.cuda.is_available = lambda: False;"
        "sys.stdout.write(str(b.unavailable()) + '|' +"
        "str(b.refuses(torch.device('cpu'), torch.float32)))"
    )
    for hide, reason in (("", "no CUDA device"), ("sys.modules['triton'] = None;", "pip install")):
        run = [sys.executable, "-c", code.format(hide=hide)]
        unavailable, refused = subprocess.run(
            run, capture_output=True, text=True, check=True
        ).stdout.split("|")
        assert reason in unavailable
        assert "TRITON_INTERPRET=1" in refused


def test_splits_cover_every_tile_once():
    from fastmargin.backends.triton.configs import split_classes

    for rows, tiles, processors in itertools.product((1, 3, 16, 200), (1, 5, 33, 10**6), (1, 132)):
        splits = split_classes(rows, tiles, processors)
        each = -(-tiles // splits)
        assert (splits - 1) * each < tiles <= splits * each
        assert splits <= max(1, processors // rows)  # the workspace does not grow with C


def test_precision_and_shift_are_pure_choices():
    from fastmargin.backends.triton.configs import needs_shift, resolve_precision, slope_power

    assert resolve_precision("bf16", True) == "bf16"
    assert resolve_precision("auto", True) == "fp32"
    assert resolve_precision("auto", False) == "fp16"
    assert not needs_shift(64.0, 10**8, "fp32", True)
    assert needs_shift(80.0, 10**8, "fp32", True)
    assert needs_shift(64.0, 10, "fp16", True)
    assert not needs_shift(64.0, 10, "fp16", False)
    assert not needs_shift(64.0, 10, "bf16", True)
    threshold = torch.zeros(1)
    assert slope_power(None) == 1 and slope_power(HardRule.of(threshold, 1.0, 0.3, 0.0)) == 8
    assert slope_power(HardRule.of(threshold, 0.0, 0.0, 0.0)) == 4


def test_every_choice_of_a_tile_is_one_that_triton_takes():
    from fastmargin.backends.triton.configs import choose
    from fastmargin.backends.triton.tuned import MOST_TILE_ROWS

    kernels = ("stats_pull", "stats_sum", "centre_pass", "topk")
    for kernel, d, precision, arch in itertools.product(
        kernels, (1, 16, 100, 192, 512, 1024), ("fp32", "tf32", "fp16"), (0, 80, 86, 90, 100, 120)
    ):
        for crowded in (True, False):
            tile = choose(kernel, d, precision, arch, crowded)
            if kernel == "centre_pass":
                assert tile.block_b <= MOST_TILE_ROWS
            for size in (tile.block_b, tile.block_c, tile.block_k, tile.block_d):
                assert size >= 16 and size & (size - 1) == 0
