"""The memory that ``fastmargin plan`` counts, against tensors and against measured peaks."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from conftest import device_for
from typer.testing import CliRunner

import fastmargin as fm
from fastmargin import plan
from fastmargin.cli import app
from fastmargin.plan import Problem, estimate_memory, plain_memory

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "cpu.json"
CPU = [torch.profiler.ProfilerActivity.CPU]
HERE = Problem(classes=3000, embedding_size=64, batch=16)


def problems():
    return [HERE, Problem(3000, 64, 16, sample_rate=0.1)]


def made(setup):
    """Head and optimiser of a setup's code after two steps, and bytes of the last gradient."""
    names = {"fm": fm, "torch": torch, "margin": fm.ArcFace(), "lr": 0.1}
    exec(setup.code, names)
    head, optimiser = names["head"], names["optimiser"]
    for _ in range(2):
        optimiser.zero_grad()
        head(torch.randn(16, 64, requires_grad=True), torch.arange(16)).backward()
        grad = head.weight.grad
        optimiser.step()
    size = 0 if grad is None else bytes_of(grad)
    return head, optimiser, size


def bytes_of(tensor):
    if tensor.is_sparse:
        return bytes_of(tensor._values()) + bytes_of(tensor._indices())
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("problem", problems(), ids=["all", "sampled"])
def test_what_stays_is_what_the_code_makes(problem):
    found = list(plan.setups(problem))
    assert len(found) == 6 + (problem.sample_rate < 1)
    for setup in found[1:]:
        head, optimiser, gradient = made(setup)
        assert bytes_of(head.weight) == setup.memory.centres, setup.name
        state = optimiser.state[head.weight].values()
        kept = sum(bytes_of(v) for v in state if isinstance(v, torch.Tensor) and v.dim() > 0)
        assert setup.memory.state * 0.99 <= kept <= setup.memory.state, setup.name
        assert gradient == setup.memory.gradient, setup.name


def peak_of(work):
    """Most bytes that torch allocates at a time beyond what was there before."""
    gc.collect()  # what is freed while it is measured would lower the peak
    with torch.profiler.profile(profile_memory=True, activities=CPU) as profiler:
        work()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("problem", problems(), ids=["all", "sampled"])
def test_a_step_needs_no_more(problem, fused, monkeypatch):
    if device_for("triton") != "cpu":
        pytest.skip("torch counts another device's memory otherwise")
    monkeypatch.setattr(plan, "PROCESSORS", 6)  # of the interpreter
    monkeypatch.setattr(plan, "TILE_ROWS", 16)
    rate = problem.sample_rate
    head = fm.MarginHead(64, 3000, fm.AdaFace(), sample_rate=rate, backend="triton")
    optimiser = fm.optim.RowSGD(head.parameters(), lr=0.1, momentum=0.9, fused=fused)
    x, labels = torch.randn(16, 64, requires_grad=True), torch.arange(16)

    def step():
        head(x, labels).backward()
        optimiser.step()

    step()
    optimiser.zero_grad()  # not in the measured step, whose peak it would lower
    peak = peak_of(step)
    counted = estimate_memory(problem, fused=fused)
    # operands of 32 bits here, instead of 16
    most = counted.gradient + counted.working + 2 * 64 * problem.columns
    assert counted.gradient < peak <= most
    if fused and rate == 1:  # no temporaries of the optimiser, which need not all be alive
        assert most < 1.1 * peak


def test_the_plain_head_is_the_measured_one():
    rows = json.loads(RESULTS.read_text())["rows"]
    found = 0
    for row in rows:
        case = row["case"]
        if row["contender"] != "insightface-like" or case["classes"] < 80_000:
            continue
        found += 1
        problem = Problem(case["classes"], case["dim"], case["batch"], sample_rate=case["rate"])
        counted = plain_memory(problem)
        assert row["peak_bytes"] == pytest.approx(counted.gradient + counted.working, rel=0.02)
    assert found >= 3


def test_the_buffers_are_those_of_the_kernels():
    centres = pytest.importorskip("fastmargin.backends.triton.centres")
    assert plan.STAGED_BYTES == centres.STAGED_BYTES


def test_ours_does_not_grow_with_batch_times_classes():
    working = [estimate_memory(Problem(c), fused=True).working for c in (10**6, 10**8)]
    assert working[1] == working[0]
    assert plain_memory(Problem(10**8)).working > 1000 * working[1]


def test_processes_share_the_centres_and_see_all_rows():
    one, eight = Problem(10**6, batch=512), Problem(10**6, batch=64, processes=8)
    assert one.rows == eight.rows
    for field in ("centres", "state", "gradient"):
        assert getattr(estimate_memory(eight), field) * 8 == getattr(estimate_memory(one), field)


def test_most_classes_are_the_most():
    limit = 10**10
    for which in range(6):
        most = plan.most_classes(HERE, which, limit)
        below, above = (list(plan.setups(Problem(c, 64, 16)))[which] for c in (most, most + 1))
        assert below.memory.total <= limit < above.memory.total
    assert plan.most_classes(HERE, 0, 10) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optimiser": "lion"}, "optimiser must be one of"),
        ({"optimiser": "adamw", "fused": True}, "fused: only SGD"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(HERE, **options)


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_command():
    done = run("100000000", "--memory", "141", "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    fits = {setup["name"]: setup["fits"] for setup in found["setups"]}
    assert fits["RowSGD, fused, centres in 16 bits, no momentum"]
    assert not fits["plain PyTorch, SGD with momentum"]
    table = run("100000000", "--memory", "141")
    assert "dtype=torch.float16" in table.stdout and "stochastic_rounding=True" in table.stdout
    assert "Nothing fits" in run("100000000", "--memory", "1").stdout
    assert "most classes" not in run("1000").stdout


@pytest.mark.parametrize(
    "arguments",
    [("0",), ("10", "--sample-rate", "0"), ("10", "--memory", "-1"), ("10", "--memory", "inf")],
)
def test_command_refuses(arguments):
    done = run(*arguments)
    assert done.exit_code != 0 and "Traceback" not in done.output
