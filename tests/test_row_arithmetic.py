"""The row arithmetic that CPU and CUDA share (csrc/*.h), compiled by g++, against the reference.

Float64 must agree with it to rounding; float32 must be no farther from it than the reference in
float32 is, and agree with that element by element.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from dataclasses import replace

import pytest
import torch
from cuda_on_cpu import harness
from torch import Tensor

from fastmargin.backends import _extension, _rows
from fastmargin.backends.reference import BACKEND as REFERENCE
from fastmargin.spec import GRAD_MODES, GUARDS, SOURCES, MarginForm, NormEma
from fastmargin.testing import assert_close_as_torch

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler (g++, c++)")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors here are small: waking a second thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


OUTPUTS = ("loss", "by_cos", "by_lse", "by_norm", "margin")
CLASSES = 50
ROWS = 120


def make_form(source: str, guard: str, grad: str, scale: float = 64.0) -> MarginForm:
    """A margin of this kind with both m2 and m3, and m2 on both sides of zero where u allows."""
    g = torch.Generator().manual_seed(1)
    by_source = {
        "constant": dict(m2=0.5, m3=0.1),
        "adaface": dict(m2_u=-0.4, m3=0.4, m3_u=0.4, h=0.333, low=1e-3, high=100.0, eps=1e-3),
        "norm": dict(m2=0.35, m2_u=0.0045, m3=-0.05, m3_u=0.001, low=10.0, high=60.0),
        "class": dict(m2=-0.1, m2_u=0.9, m3=0.05, m3_u=-0.1),
        "row": dict(m2=-0.1, m2_u=0.9, m3=0.05, m3_u=-0.1),
    }
    return MarginForm(
        scale=scale,
        source=source,
        guard=guard,
        grad=grad,
        cos_eps=1e-3 if source == "adaface" else 0.0,
        angle_eps=1e-3 if source == "adaface" else 0.0,
        mean=torch.tensor([22.5]),
        std=torch.tensor([8.25]),
        table=torch.rand(ROWS if source == "row" else CLASSES, generator=g),
        **by_source[source],
    )


def of_rows(form: MarginForm, count: int) -> MarginForm:
    """The form for the first rows, if it has a number for each."""
    return replace(form, table=form.table[:count]) if form.source == "row" else form


def make_rows(regime: str, form: MarginForm, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """cos_y, lse_neg, norm, labels; the same numbers, exact in float32, for both types."""
    g = torch.Generator().manual_seed(2)

    def uniform(low, high):
        return low + (high - low) * torch.rand(ROWS, generator=g)

    cos, norm = uniform(-1, 1), uniform(12, 50)
    lse = form.scale * uniform(-0.2, 0.9)
    labels = torch.randint(0, CLASSES, (ROWS,), generator=g)
    if regime == "confident":
        cos, lse = uniform(0.85, 1), form.scale * uniform(-1, 0.3) - 40
    elif regime == "hopeless":
        cos, lse = uniform(-1, 0), form.scale * uniform(0.5, 1) + 30
    elif regime == "ends":
        ends = [1.0, 1 - 2**-24, 1 - 2**-23, 1 - 1e-6, 1 + 2**-23, 0.0]
        cos = torch.tensor([*ends, *(-c for c in ends)]).repeat(ROWS // 12)
        norm = norm[: len(cos)].sort().values
    elif regime == "antipodal":
        cos = -1 + uniform(0, 1e-3)
    elif regime == "no_negative":
        lse = torch.full((ROWS,), -torch.inf)
    elif regime == "all_ignored":
        labels[:] = -1
        cos[::2] = torch.nan
    elif regime == "some_ignored":
        labels[::3] = -1
    elif regime == "wild_norms":
        norm = torch.cat([uniform(0, 10)[:40], uniform(60, 1e4)[:40], torch.zeros(40)])
    elif regime == "one_row":
        return cos[:1].to(dtype), lse[:1].to(dtype), norm[:1].to(dtype), labels[:1]
    return cos.to(dtype), lse.to(dtype), norm.to(dtype), labels


REGIMES = (
    *("random", "confident", "hopeless", "ends", "antipodal", "no_negative", "all_ignored"),
    *("some_ignored", "wild_norms", "one_row"),
)
KINDS = list(itertools.product(SOURCES, GUARDS, GRAD_MODES))
SCALES = (1.0, 64.0, 256.0)


def assert_near(actual: Tensor, expected: Tensor, rtol: float, name: str) -> None:
    """Element by element; a slope near its zero is as exact as the largest of its terms."""
    size = float(torch.nan_to_num(expected, 0.0, 0.0, 0.0).abs().max())
    if name == "margin":
        size = max(size, 1.0)  # a difference of two cosines
    # the reference's sigmoid flushes what float32 could still hold
    atol = max(rtol * size, 1e-37)
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def assert_rows_match(actual, plain, truth, scale: float) -> None:
    """float32: close to float32 PyTorch element by element, and no farther from the truth."""
    # an error of one ulp in psi moves the gap by scale * eps, and by that much relatively what is
    # proportional to exp(gap)
    tolerance = 4 * (1 + scale) * torch.finfo(torch.float32).eps
    for name, ours, torchs, exact in zip(OUTPUTS, actual, plain, truth, strict=True):
        assert_near(ours, torchs, tolerance, name)
        assert_close_as_torch(ours, torchs, exact, factor=2, floor=tolerance, name=name)


def check_margin_rows(run, source: str, guard: str, grad: str, double: bool = True) -> None:
    """``run(cos_y, lse_neg, norm, labels, form)`` against the reference in every regime."""
    for regime, scale in itertools.product(REGIMES, SCALES):
        form = make_form(source, guard, grad, scale)
        exact = make_rows(regime, form, torch.float64)
        form = of_rows(form, len(exact[0]))
        truth = REFERENCE.margin_rows(*exact, form)
        try:
            if double:
                for name, ours, right in zip(OUTPUTS, run(*exact, form), truth, strict=True):
                    torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-13, msg=name)
            single = make_rows(regime, form, torch.float32)
            plain = REFERENCE.margin_rows(*single, form)
            assert_rows_match(run(*single, form), plain, truth, scale)
        except AssertionError as error:
            raise AssertionError(f"{regime}, scale {scale}: {error}") from error


def host(rows: harness.Rows):
    return lambda *args: rows.margin_rows("host", *args)


@pytest.mark.parametrize("source, guard, grad", KINDS)
def test_margin_rows(source, guard, grad):
    check_margin_rows(host(harness.load()), source, guard, grad)


@pytest.mark.parametrize("source, guard", list(itertools.product(SOURCES, GUARDS)))
def test_finite_differences(source, guard):
    """The derivatives are those of the loss, wherever it has one."""
    form = make_form(source, guard, "exact", scale=16.0)
    cos, lse, norm, labels = make_rows("random", form, torch.float64)
    cos, step = cos * 0.98, 1e-7
    run = host(harness.load())
    at = run(cos, lse, norm, labels, form)
    for k, name in enumerate(("by_cos", "by_lse", "by_norm")):
        if name == "by_norm" and source == "adaface":
            assert not at[3].any()  # its statistics and the norm carry no gradient
            continue
        shift = [torch.full_like(cos, step) * (j == k) for j in range(3)]
        up = run(cos + shift[0], lse + shift[1], norm + shift[2], labels, form)[0]
        down = run(cos - shift[0], lse - shift[1], norm - shift[2], labels, form)[0]
        # a step across a guard's border has no derivative
        smooth = (up - 2 * at[0] + down).abs() / step < 0.05
        assert smooth.float().mean() > 0.95
        slope = (up - down) / (2 * step)
        torch.testing.assert_close(at[1 + k][smooth], slope[smooth], rtol=1e-6, atol=1e-6)


def test_margin_rows_hands_on_nan():
    form = make_form("norm", "mm", "exact")
    for k in range(3):
        rows = list(make_rows("random", form, torch.float32))
        rows[k][7] = torch.nan
        loss = harness.load().margin_rows("host", *rows, form)[0]
        assert loss.isnan().nonzero().flatten().tolist() == [7]


def test_planted_errors_are_found(tmp_path):
    """The comparisons above notice one wrong sign and one wrong divisor."""
    csrc = harness.mutated(
        tmp_path,
        ("margin_rows.h", "-(m.sin + m2 * m.cos)", "(m.sin + m2 * m.cos)"),
        ("row_prologue.h", "(batch.count - 1)", "(batch.count)"),
    )
    wrong = harness.load(csrc)
    with pytest.raises(AssertionError, match="by_norm"):
        check_margin_rows(host(wrong), "norm", "mm", "exact")
    with pytest.raises(AssertionError, match="std"):
        check_row_prologue(lambda *a: wrong.row_prologue("host", *a), torch.float32, 33, 31)


# ---- row_prologue -------------------------------------------------------------------------------


def make_x(rows: int, cols: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """(rows, cols): norms around 20, one zero row, one of norm 1e-13, one far above ``high``."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(rows, cols, generator=g) * 20 / cols**0.5
    if rows > 4:
        x[1], x[2] = 0, 0
        x[2, 0] = 1e-13
        x[3] *= 30
    x = x.to(dtype)
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "strided":
        return torch.full((rows, 2 * cols + 3), torch.nan, dtype=dtype)[
            :, 1 : 2 * cols + 1 : 2
        ].copy_(x)
    if layout == "offset":  # contiguous rows, none of them aligned
        return torch.full((rows, cols + 1), torch.nan, dtype=dtype)[:, 1:].copy_(x)
    return x


def make_ema(alpha: float = 0.3) -> NormEma:
    return NormEma(torch.tensor([20.0]), torch.tensor([100.0]), alpha, 1e-3, 100.0)


PROLOGUE_OUTPUTS = ("x_hat", "norm", "mean", "std")


def check_row_prologue(run, dtype, rows, cols, layout="contiguous", labels=None) -> None:
    """``run(x, labels, ema)`` against the reference, with statistics and without."""
    x = make_x(rows, cols, dtype, layout)
    if labels is None:
        labels = torch.arange(rows) % 5 - 1
        labels[0] = 2
    x[labels < 0] = torch.nan  # an ignored row may hold anything
    for ema in (make_ema(), make_ema(1.0), None):
        truth = REFERENCE.row_prologue(x.double(), labels, ema)
        plain = REFERENCE.row_prologue(x, labels, ema)
        ours = run(x, labels, ema)
        # the two sum in different orders: a few roundings, over many terms
        floor = 8 * torch.finfo(plain[0].dtype).eps
        for name, mine, torchs, exact in zip(PROLOGUE_OUTPUTS, ours, plain, truth, strict=True):
            assert mine.dtype == torchs.dtype, name
            if ema is None and name in ("mean", "std"):
                continue
            # the deviation takes over the absolute error of the norms
            wider = float(truth[2] / truth[3]) if name == "std" and truth[3] > 0 else 1.0
            assert_close_as_torch(mine, torchs, exact, factor=2, floor=floor * wider, name=name)
        small = truth[1] <= 1e-12
        assert not ours[0][small].any()
    x[labels < 0] = 1
    for mine, torchs in zip(run(x, None, None), REFERENCE.row_prologue(x, None, None), strict=True):
        if len(torchs):
            torch.testing.assert_close(mine, torchs)


def host_prologue(*args):
    return harness.load().row_prologue("host", *args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 33, 257, 1000])
def test_row_prologue(dtype, rows):
    for cols, layout in ((1, "contiguous"), (31, "strided"), (128, "offset"), (512, "transposed")):
        check_row_prologue(host_prologue, dtype, rows, cols, layout)


def test_row_prologue_of_many_rows():
    check_row_prologue(host_prologue, torch.float32, 70_001, 3)


def ema_rules(run, dtype=torch.float32) -> None:
    """Which batches may change the running statistics, and which may not."""
    x = make_x(6, 8, dtype)
    mean, std = run(x, torch.full((6,), -1), make_ema())[2:]
    assert (mean.item(), std.item()) == (20.0, 100.0)  # all ignored: nothing is known
    for rows, labels in ((1, [4]), (6, [-1, -1, -1, -1, -1, 4])):
        mean, std = run(x[:rows], torch.tensor(labels), make_ema())[2:]
        assert mean.item() != 20.0 and std.item() == 100.0  # one row has no deviation
    mean, std = run(x, torch.tensor([0, -1, -1, -1, 1, 2]), make_ema(1.0))[2:]
    rows = x[[0, 4, 5]].to(mean.dtype).norm(dim=1)
    torch.testing.assert_close(mean, rows.mean()[None])
    torch.testing.assert_close(std, rows.std()[None])
    same = run(x[:1].repeat(5, 1), torch.zeros(5, dtype=torch.int64), make_ema(1.0))
    assert same[3].item() == 0.0  # equal norms deviate by exactly nothing


def test_ema_rules():
    ema_rules(host_prologue)
    ema_rules(host_prologue, torch.float64)


# ---- pieces -------------------------------------------------------------------------------------


def test_layout_is_that_of_margin_form():
    """Order of parameters and codes, in the header and in fastmargin.spec."""
    text = (harness.ROOT / "csrc" / "margin_rows.h").read_text()
    fields = re.search(r"struct MarginParams \{(.*?)\};", text, re.S)[1]
    assert tuple(re.findall(r"double (\w+);", fields)) == tuple(MarginForm.PARAMS)
    for enum, names in (("Source", SOURCES), ("Guard", GUARDS), ("GradMode", GRAD_MODES)):
        members = re.search(rf"enum class {enum} : int64_t \{{(.*?)\}}", text, re.S)[1]
        members = re.findall(r"k(\w+)", members)
        assert [m.lower() for m in members] == [*(n.replace("_", "") for n in names), "count"]


def _array(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("name, dtype", [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_conversions_are_torchs(name, dtype):
    lib = harness.load().lib
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(len(bits))
    getattr(lib, f"widen_{name}")(_array(bits), _array(wide), ctypes.c_int64(len(bits)))
    torch.testing.assert_close(wide, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)

    g = torch.Generator().manual_seed(4)
    some = (
        torch.randint(-(2**31), 2**31, (200_000,), generator=g).to(torch.int32).view(torch.float32)
    )
    near = bits.view(dtype).float()
    # halfway between two neighbours, and one float32 to either side of it
    halfway = (near[:-1] + near[1:]) / 2
    values = torch.cat([some, near, halfway, halfway * (1 + 2**-23), halfway * (1 - 2**-23)])
    narrow = torch.empty(len(values), dtype=torch.int16)
    getattr(lib, f"narrow_{name}")(_array(values), _array(narrow), ctypes.c_int64(len(values)))
    expected = values.to(dtype)
    assert torch.equal(narrow.view(dtype).isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(narrow[known], expected.view(torch.int16)[known])


def test_sin_cos():
    lib = harness.load().lib
    for reach, bound in ((4.0, 9e-8), (1e4, 1.2e-7)):
        angle = torch.linspace(-reach, reach, 100_001)
        sin, cos = torch.empty_like(angle), torch.empty_like(angle)
        lib.sin_cos_float32(_array(angle), _array(sin), _array(cos), ctypes.c_int64(len(angle)))
        assert (sin - angle.double().sin()).abs().max() < bound
        assert (cos - angle.double().cos()).abs().max() < bound
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf])
    lib.sin_cos_float32(_array(odd), _array(sin), _array(cos), ctypes.c_int64(3))
    assert sin[:3].isnan().all() and cos[:3].isnan().all()


# ---- the compiled operators of the CPU ----------------------------------------------------------


@pytest.fixture
def cpu_ops():
    reason = _extension.reason("_C")
    if reason:
        pytest.skip(reason)
    return torch.ops.fastmargin


@pytest.mark.parametrize("source", SOURCES)
def test_cpu_margin_rows(cpu_ops, source):
    def run(*args):
        return _rows.margin_rows(cpu_ops.cpu_margin_rows, *args)

    check_margin_rows(run, source, "mm", "exact")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_cpu_row_prologue(cpu_ops, dtype):
    def run(*args):
        return _rows.row_prologue(cpu_ops.cpu_row_prologue, *args)

    check_row_prologue(run, dtype, 300, 64, "strided")
    ema_rules(run, dtype)
    x, labels = make_x(3, 4, dtype), torch.tensor([0, 1, -1])
    assert all(t.isnan().all() for t in run(x, labels, None)[2:])


def test_cpu_ops_refuse_a_table_of_other_rows(cpu_ops):
    form = make_form("row", "mm", "exact")
    for count in (1, 2, 4):
        rows = [t[:3].contiguous() for t in make_rows("random", form, torch.float32)]
        with pytest.raises(RuntimeError, match=f"table has {count} elements, expected 3"):
            _rows.margin_rows(cpu_ops.cpu_margin_rows, *rows, of_rows(form, count))


def test_cpu_ops_refuse(cpu_ops):
    """What the Python above never hands them: still an error, not a wild read."""
    good = [torch.rand(3) for _ in range(3)]
    form = make_form("class", "mm", "exact")
    labels = torch.tensor([0, 1, 2])
    run = cpu_ops.cpu_margin_rows

    def call(cos=good[0], labels=labels, params=None, codes=None, table=form.table, out=3):
        outputs = [torch.empty(out) for _ in range(5)]
        run(cos, *good[1:], labels, params or form.params(), codes or form.codes(), None, None,
            table, *outputs)  # fmt: skip

    call()
    for wrong, message in (
        (dict(labels=labels.int()), "labels has the wrong dtype"),
        (dict(cos=torch.rand(6)[::2]), "cos_y must be contiguous"),
        (dict(out=4), "loss has 4 elements, expected 3"),
        (dict(table=None), "needs its table"),
        (dict(params=[1.0]), "11 margin parameters expected"),
        (dict(codes=[0, 9, 0]), "guard has no code 9"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)
