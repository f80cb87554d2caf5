"""The CPU backend by itself: every operation, regime, dtype and instruction set against float64.

The yardstick is the error of the reference backend (plain PyTorch) in the same dtype. Run as a
script, this file prints the largest ratio to that yardstick, which is how the instruction sets
that this process does not use are tested.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastmargin import backends, testing
from fastmargin.backends.reference import BACKEND as REFERENCE
from fastmargin.rows import take
from fastmargin.spec import GradientFactors, HardRule, SgdUpdate

CPU = backends.get("cpu")
LEVELS = ("scalar", "avx2", "avx512")

pytestmark = pytest.mark.skipif(CPU.unavailable() is not None, reason=f"cpu: {CPU.unavailable()}")

# (rows, classes, columns), a reason each
SHAPES = {
    "small": (5, 7, 3),  # less than a vector in every direction
    "ragged": (33, 65, 17),  # one more than a panel, a block of rows, a vector
    "blocks": (70, 900, 96),  # several blocks of centres, several threads
    "wide": (9, 40, 600),  # few centres fit a block
}
RULES = {
    "plain": None,
    "curricular": (0.1, 1.0, 0.3, 0.0),  # threshold, a, b, d
    "mv_softmax": (0.0, 0.0, 1.2, 0.2),
    "filter": (0.3, 0.0, 0.0, 0.0),
}
UPDATE = SgdUpdate(0.5, 0.9, 0.1, True)
DTYPES = {
    "fp64": (torch.float64, torch.float64),  # embeddings, centres
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.float32, torch.bfloat16),
    "fp16": (torch.float32, torch.float16),
}
REGIMES = (
    "random",
    "confident",
    "antipodal",
    "aligned",
    "ragged_last",
    "foreign",
    "no_label",
    "zero_rows",
    "one_class",
    "two_classes",
    "no_classes",
)


def make(regime: str, shape: str = "ragged"):
    """Unit rows, raw centres with values that every dtype holds, labels, and class_start."""
    rows, classes, dim = SHAPES[shape]
    classes = {"one_class": 1, "two_classes": 2, "no_classes": 0}.get(regime, classes)
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(classes, dim, generator=g, dtype=torch.float64)
    weight = (weight * 64).round() / 64
    x = torch.randn(rows, dim, generator=g, dtype=torch.float64)
    labels = torch.randint(0, max(classes, 1), (rows,), generator=g)
    start = 0
    if regime == "confident":
        x = F.normalize(weight[labels]) + 0.1 * x / dim**0.5
    elif regime == "antipodal":
        x = -F.normalize(weight[labels]) + 1e-3 * x / dim**0.5
    elif regime == "aligned":
        x = weight[labels] * torch.where(torch.arange(rows) % 2 == 0, 1.0, -1.0)[:, None]
    elif regime == "ragged_last":
        labels[:] = classes - 1
    elif regime == "foreign":
        start = 10**12  # a shard far inside
        labels = labels + start + torch.randint(-1, 2, (rows,), generator=g) * classes
        labels[0], labels[-1] = -(2**63), 2**63 - 1
    elif regime == "no_label":
        labels[:] = -1
    elif regime == "zero_rows":
        x[0], weight[-1], labels[1] = 0, 0, classes - 1
    x_hat = F.normalize(x)
    return (x_hat.float().double() if regime != "aligned" else x_hat), weight, labels, start


def hard_rule(name: str, rows: int) -> HardRule | None:
    if RULES[name] is None:
        return None
    threshold, *parameters = RULES[name]
    spread = torch.linspace(-0.2, 0.2, rows, dtype=torch.float64).float().double()
    return HardRule.of(threshold + spread, *parameters)


def make_index(name: str, weight, labels, start):
    """Half of the rows in random order, empty places among them, and labels that count places."""
    if name == "none":
        return None, labels
    g = torch.Generator().manual_seed(2)
    classes = weight.shape[0]
    index = torch.randperm(classes, generator=g)[: (classes + 1) // 2]
    if name == "gaps":
        index = torch.cat([index, torch.tensor([-1, classes, 2**62, -(2**63)])])
        index = index[torch.randperm(len(index), generator=g)]
    columns = torch.randint(0, len(index) + 1, labels.shape, generator=g)
    return index, torch.where(labels >= start, columns + start, labels)


def run(backend, x_hat, weight, labels, start, scale, hard, index=None):
    """All outputs of the operations by name; what is stepped, of the columns."""
    stats = backend.row_stats(x_hat, weight, index, labels, scale, hard, start, True, "auto")
    rows = torch.arange(x_hat.shape[0], dtype=x_hat.dtype)
    d_lse, d_cos = (rows % 7 + 1) / 8, (rows % 5 - 2) / 4
    part = GradientFactors(
        d_lse=d_lse,
        d_cos=d_cos,
        x_hat=x_hat,
        labels=labels,
        lse_neg=stats.lse_neg,
        scale=scale,
        index=index,
        class_start=start,
        hard=hard,
    )
    gradient = backend.row_stats_backward(weight, part)
    stepped, momentum = weight.clone(), (weight / 8).to(x_hat.dtype)
    backend.centre_step(stepped, momentum, UPDATE, part)
    if index is not None:
        stepped, momentum = take(stepped, index, 0), take(momentum, index, 0)
    names = ("lse_neg", "cos_y", "max_neg", "pull")
    return {name: getattr(stats, name) for name in names} | {
        "d_weight": gradient,
        "stepped": stepped,
        "momentum": momentum,
    }


def compare(
    regime="random",
    shape="ragged",
    dtype="fp32",
    scale=64.0,
    rule="plain",
    index="none",
    edit=None,
):
    """Largest error relative to what is allowed; ``edit`` plants an error into the inputs."""
    x_hat, weight, labels, start = make(regime, shape)
    index, labels = make_index(index, weight, labels, start)
    hard = hard_rule(rule, x_hat.shape[0])
    x_type, w_type = DTYPES[dtype]
    narrow = (x_hat.to(x_type), weight.to(w_type), labels, start, scale, hard)
    truth = run(REFERENCE, narrow[0].double(), weight, labels, start, scale, hard, index)
    plain = run(REFERENCE, *narrow, index)
    actual = run(CPU, *(edit(*narrow) if edit else narrow), index)
    worst = 0.0
    for name, expected in truth.items():
        value = actual[name]
        of_weight = name in ("d_weight", "stepped")
        assert value.dtype == (w_type if of_weight else x_type), name
        assert value.shape == expected.shape, name
        infinite = torch.isinf(expected)
        if not torch.equal(infinite, torch.isinf(value)):
            return math.inf
        expected, value = (torch.where(infinite, 0, t.double()) for t in (expected, value))
        own = torch.where(infinite, 0, plain[name].double())
        size = float(expected.norm())
        error, usual = float((value - expected).norm()), float((own - expected).norm())
        if not math.isfinite(error):
            return math.inf
        # where plain PyTorch happens to be exact, a few roundings of the logit are allowed
        eps = torch.finfo(x_type).eps
        steep = name in ("pull", "momentum") or of_weight
        floor = 4 * eps * (1 + scale * steep) * max(size, 1e-30)
        if of_weight and dtype in ("bf16", "fp16"):
            usual = max(usual, torch.finfo(w_type).eps * size / 2)
        worst = max(worst, error / max(2 * usual, floor))
    return worst


def grid():
    """Every regime, every rule, every dtype, every shape: not all at once."""
    for regime, dtype in itertools.product(REGIMES, DTYPES):
        yield {"regime": regime, "dtype": dtype}
    for rule, scale, dtype in itertools.product(RULES, (1.0, 64.0, 256.0), ("fp64", "fp32")):
        yield {"rule": rule, "scale": scale, "dtype": dtype}
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        yield {"shape": shape, "dtype": dtype}
    for shape, dtype, index in itertools.product(SHAPES, DTYPES, ("full", "gaps")):
        yield {"shape": shape, "dtype": dtype, "index": index}
    for regime, index in itertools.product(REGIMES, ("full", "gaps")):
        yield {"regime": regime, "rule": "curricular", "index": index}
    for regime in ("confident", "ragged_last"):
        yield {"regime": regime, "scale": 256.0, "rule": "curricular", "shape": "ragged"}


@pytest.mark.parametrize("case", list(grid()), ids=lambda case: "-".join(map(str, case.values())))
def test_as_good_as_plain_pytorch(case):
    worst = compare(**case)
    assert worst <= 1, worst


def in_process_of(level: str, command: list[str]) -> subprocess.CompletedProcess:
    # one thread: many short runs of several threads wait for each other on a busy machine
    environment = {**os.environ, "FASTMARGIN_CPU_CAPABILITY": level, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_sets(level):
    done = in_process_of(level, [sys.executable, str(Path(__file__).resolve())])
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("FASTMARGIN_CPU_CAPABILITY"):
        pytest.skip(done.stdout.strip())
    used, worst = done.stdout.split()
    assert used == level and float(worst) <= 1


def test_unknown_instruction_set_is_refused():
    code = "import fastmargin as fm; print(fm.backends.available()['cpu'])"
    done = in_process_of("sse9", [sys.executable, "-c", code])
    assert "must be scalar, avx2 or avx512, not sse9" in done.stdout


PLANTED = {
    "scale": lambda x, w, y, start, s, hard: (x, w, y, start, s * 1.0001, hard),
    "label": lambda x, w, y, start, s, hard: (x, w, y.roll(1), start, s, hard),
    "shard": lambda x, w, y, start, s, hard: (x, w, y, start + 1, s, hard),
    "row": lambda x, w, y, start, s, hard: (x.roll(1, 0), w, y, start, s, hard),
    "sign": lambda x, w, y, start, s, hard: (x, -w, y, start, s, hard),
    "precision": lambda x, w, y, start, s, hard: (x.bfloat16().float(), w, y, start, s, hard),
    "nan": lambda x, w, y, start, s, hard: (x / (x.abs() > 1e-3), w, y, start, s, hard),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_found(name):
    assert compare(edit=PLANTED[name]) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential(dtype):
    """Centres across all embeddings make every cosine 0, so that d_weight is exp(-lse_neg)."""
    low, high = (-85, 86) if dtype == torch.float32 else (-700, 700)
    lse = torch.linspace(low, high, 500, dtype=dtype)
    count = lse.numel()
    x_hat = torch.eye(count, count + 1, dtype=dtype)
    weight = torch.zeros(1, count + 1, dtype=dtype)
    weight[0, -1] = 1
    nobody, one, zero = torch.full((count,), -1), torch.ones_like(lse), torch.zeros_like(lse)

    part = GradientFactors(
        d_lse=one, d_cos=zero, x_hat=x_hat, labels=nobody, lse_neg=lse, scale=1.0
    )

    def exps(lse):
        return CPU.row_stats_backward(weight, replace(part, lse_neg=lse))[0, :count]

    truth = torch.exp(-lse.double())
    error = ((exps(lse).double() - truth) / truth).abs().max()
    assert error < 2 * torch.finfo(dtype).eps
    assert (exps(lse.abs() + 1000) == 0).all()
    assert (exps(torch.full_like(lse, -math.inf)) == 0).all()  # no negatives
    assert torch.isnan(exps(torch.full_like(lse, math.nan))).all()


def assert_same(name, value, other):
    """Bits, but of a step, which is taken outside of the pass if columns are apart."""
    if name in ("stepped", "momentum"):
        close = 8 * torch.finfo(value.dtype).eps
        torch.testing.assert_close(value, other, rtol=close, atol=close, msg=name)
    else:
        assert torch.equal(value, other), name


@pytest.mark.parametrize(
    "layout", ["transposed", "every_other_column", "every_other_row", "expanded"]
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_layouts_give_the_same_bits(layout, dtype):
    x_hat, weight, labels, start = make("random", "blocks")
    x_hat, weight = x_hat.float(), weight.to(DTYPES[dtype][1])
    if layout == "expanded":
        weight = weight[:1].expand_as(weight)
        strided = weight
    elif layout == "transposed":
        strided = weight.t().contiguous().t()
    elif layout == "every_other_column":
        strided = torch.stack([weight, -weight], 2).flatten(1)[:, ::2]
    else:
        strided = torch.stack([weight, -weight], 1).flatten(0, 1)[::2]
    assert not strided.is_contiguous() and torch.equal(strided, weight)
    a = run(CPU, x_hat, weight.contiguous(), labels, start, 64.0, None)
    b = run(CPU, x_hat, strided, labels, start, 64.0, None)
    for name, value in a.items():
        assert_same(name, value, b[name])
    assert b["d_weight"].is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_index_gives_the_bits_of_a_copy(dtype, shape):
    x_hat, weight, labels, start = make("random", shape)
    x_type, w_type = DTYPES[dtype]
    x_hat, weight = x_hat.to(x_type), weight.to(w_type)
    index, labels = make_index("full", weight, labels, start)
    for rows in (weight, weight.t().contiguous().t()):
        ours = run(CPU, x_hat, rows, labels, start, 64.0, None, index)
        for name, value in run(CPU, x_hat, weight[index], labels, start, 64.0, None).items():
            assert_same(name, ours[name], value)


def test_runs_are_bit_equal_for_every_number_of_threads():
    x_hat, weight, labels, start = make("random", "blocks")
    index = torch.cat([torch.randperm(len(weight)), torch.full((300,), -1)])
    case = (x_hat.float(), weight.float(), labels, start, 64.0, None, index)
    threads = torch.get_num_threads()
    try:
        results = {}
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            first, second = run(CPU, *case), run(CPU, *case)
            assert all(torch.equal(first[name], second[name]) for name in first)
            results[count] = first
    finally:
        torch.set_num_threads(threads)
    for count, result in results.items():
        for name, value in result.items():
            assert testing.relative_error(value, results[1][name]) < 1e-5, (count, name)


@pytest.mark.parametrize("threads", [1, 2, 5, 7])
def test_many_rows_are_shared_between_threads(threads):
    """So many rows that groups of them are work of their own, in the forward and the backward."""
    case = testing.make_case("random", batch=2100, classes=331, dim=21)
    x_hat = torch.nn.functional.normalize(case.x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        ours = run(CPU, x_hat, case.weight, case.labels, 0, 64.0, None)
    finally:
        torch.set_num_threads(before)
    truth = run(backends.get("reference"), x_hat, case.weight, case.labels, 0, 64.0, None)
    for name, value in ours.items():
        torch.testing.assert_close(value, truth[name], rtol=1e-9, atol=1e-9, msg=name)


def test_no_gradient_gives_the_same_statistics():
    x_hat, weight, labels, start = make("random")
    with_pull = CPU.row_stats(x_hat, weight, None, labels, 64.0, None, start, True, "auto")
    without = CPU.row_stats(x_hat, weight, None, labels, 64.0, None, start, False, "auto")
    assert torch.equal(with_pull.lse_neg, without.lse_neg)
    assert without.pull.shape == (0, x_hat.shape[1])


def test_not_a_number_is_passed_on():
    x_hat, weight, labels, start = make("random")
    x_hat[3, 1] = math.nan
    stats = CPU.row_stats(x_hat, weight, None, labels, 64.0, None, start, True, "auto")
    assert torch.isnan(stats.lse_neg[3]) and torch.isnan(stats.cos_y[3])
    assert torch.isfinite(stats.lse_neg[4:]).all() and torch.isnan(stats.pull[3]).all()


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("k", [1, 3, 80])
def test_nearest(regime, k):
    x_hat, weight, labels, start = make(regime, "ragged")
    got = CPU.row_topk(x_hat, weight, None, labels, k, start, "auto")
    want = REFERENCE.row_topk(x_hat, weight, None, labels, k, start, "auto")
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[2], want[2])
    # equal up to the order of cosines that differ by a rounding only
    cos = F.pad(x_hat @ F.normalize(weight).t(), (0, 1), value=-math.inf)
    torch.testing.assert_close(cos.gather(1, got[1] % cos.shape[1]), want[0])
    assert ((got[1] == -1) == (want[1] == -1)).all()


def test_nearest_ties_go_to_the_lower_index():
    x_hat, weight, labels, start = make("random", "blocks")
    weight[:] = weight[:1]  # all alike
    labels[:] = 1
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        _, index, _ = CPU.row_topk(x_hat, weight, None, labels, 4, start, "auto")
        torch.set_num_threads(before)
        assert (index == torch.tensor([0, 2, 3, 4])).all()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account")
def test_memory_does_not_grow_with_the_classes():
    from benchmarks import memory  # not above: as a script this file has only its folder
    from benchmarks.cases import Case

    def peak(classes):
        case = Case("memory", 64, classes, 16)
        found = memory.in_fresh_process(case, "fastmargin cpu fp32", threads=1)
        return found.peak_bytes - found.gradient_bytes

    assert peak(100_000) < peak(10_000) + 2**20  # logits alone would be 25 MB


def test_bad_tensors_are_refused():
    x_hat, weight, labels, _ = make("random", "small")
    with pytest.raises(RuntimeError, match="do not fit"):
        CPU.row_stats(x_hat, weight[:, 1:], None, labels, 64.0, None, 0, True, "auto")
    with pytest.raises(RuntimeError, match="weight must be float"):
        CPU.row_stats(x_hat, weight.int(), None, labels, 64.0, None, 0, True, "auto")
    with pytest.raises(RuntimeError, match="index has the wrong dtype"):
        CPU.row_stats(x_hat, weight, labels.int(), labels, 64.0, None, 0, True, "auto")
    with pytest.raises(RuntimeError, match="labels"):
        CPU.row_stats(x_hat, weight, None, labels[1:], 64.0, None, 0, True, "auto")


if __name__ == "__main__":
    if CPU.unavailable():
        print(CPU.unavailable())
    else:
        ratio = max(compare(**case) for case in grid())
        print(torch.ops.fastmargin.cpu_capability(), ratio)
