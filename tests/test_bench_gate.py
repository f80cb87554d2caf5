"""The gate lets right contenders through and nobody else, and who fails has no number."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from benchmarks import bench, contenders, gate
from benchmarks.cases import Case
from benchmarks.contenders import Head, libraries

CPU = torch.device("cpu")
ARC = Case("arc", 16, 300, 32)
CASES = {
    "arc": ARC,
    "cos": replace(ARC, margin="cosface", state="sgd"),
    "ada": replace(ARC, margin="adaface"),
    "sampled": replace(ARC, margin="cosface", rate=0.2, state="sgd"),
}
OURS = contenders.by_name("fastmargin cpu fp32", CPU)
QUIET = bench.Settings(repeats=3, memory=False, accuracy=False, small_ceilings=True)


@pytest.fixture(autouse=True)
def eager():
    """What the compiled contenders compile, without the compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("name", CASES)
def test_everybody_is_right(name):
    case, able = CASES[name], 0
    for taker in [*contenders.contenders(case, CPU, None), *contenders.ours.REFERENCE]:
        if taker.refuses(case, CPU) is None:
            verdict = gate.check(taker, case, CPU)
            assert verdict.passed, f"{taker.name}: {verdict.reason}"
            assert 0 < verdict.worst < 1e-4, taker.name
            able += 1
    assert able >= 3


def test_rows_of_the_confident_regime_have_the_gap():
    margin = OURS.margin("arcface").double()
    weight = torch.randn(300, 32, dtype=torch.double)
    labels = torch.randint(0, 300, (16,))
    x = gate.at_gap(weight, labels, margin, 5.0)
    cos = F.normalize(x) @ F.normalize(weight).t()
    target = 64 * (cos.gather(1, labels[:, None]).squeeze(1).acos() + 0.5).cos()
    others = torch.stack(
        [
            (64 * torch.cat([row[:y], row[y + 1 :]])).logsumexp(0)
            for row, y in zip(cos, labels, strict=True)
        ]
    )
    torch.testing.assert_close(target - others, torch.full((16,), 5.0, dtype=torch.double))


def broken(part: str, factor: float):
    """Ours with one part of the result multiplied."""

    def make(case, weight):
        head = OURS.make(case, weight)

        def loss(x, labels):
            if part == "d_embeddings":
                x.register_hook(lambda grad: factor * grad)
            value = head.loss(x, labels)
            return value + (factor - 1) * value.detach() if part == "loss" else value

        if part == "d_weight":
            head.weight.register_hook(lambda grad: factor * grad)
        return Head(loss, head.weight, head.optimiser, columns=head.columns)

    return replace(OURS, name=f"broken {part}", make=make)


@pytest.mark.parametrize("part", gate.PARTS)
@pytest.mark.parametrize("factor", [1.01, 0.99, float("nan")])
def test_one_percent_off_is_a_failed_gate_without_numbers(monkeypatch, part, factor):
    taker = broken(part, factor)
    monkeypatch.setattr(contenders, "everybody", lambda device: (OURS, taker))
    report = bench.run([ARC], CPU, QUIET)
    right, wrong = report["rows"]
    assert right["status"] == "measured" and len(right["seconds"]["step"]) == 3
    assert wrong["status"] == "failed gate" and part in wrong["reason"]
    assert not {"seconds", "summary", "flops_per_s", "peak_bytes", "ratio"} & wrong.keys()
    verdict = gate.check(taker, ARC, CPU)
    assert not verdict.passed
    if factor == factor:
        assert verdict.worst == pytest.approx(0.01, rel=0.1)


def test_one_percent_off_fails_with_16_bit_operands_too():
    for computes in ("fp16", "tf32", "bf16"):
        for dtype in ("float32", "bfloat16"):
            allowed = gate.allowed(replace(OURS, computes=computes), replace(ARC, dtype=dtype))
            assert 1e-3 < allowed < 1e-2, (computes, dtype)


def test_a_capped_loss_is_known_and_nothing_else_is_forgiven():
    taker = contenders.by_name("insightface-like", CPU)
    case = replace(ARC, classes=4000)  # some rows of the start cost more than 69
    assert gate.check(taker, case, CPU).passed
    assert not gate.check(replace(taker, loss_cap=None), case, CPU).passed


# ---- libraries whose kernels need a GPU: that they are called as they want ----


def _cross_entropy(x, weight, labels):
    assert x.dtype == weight.dtype == torch.bfloat16
    return F.cross_entropy(x.float() @ weight.float().t(), labels)


@pytest.fixture
def stand_ins(monkeypatch):
    """Modules with the signatures of the libraries, computed by PyTorch."""
    called = {}

    def linear_cross_entropy(e, c, targets, filter_eps="high"):
        called["filter_eps"] = filter_eps
        return _cross_entropy(e, c, targets)

    class Function:
        @staticmethod
        def forward(ctx, _input, weight, target, bias=None, accum_dtype=None, chunk_mem_const=1):
            raise NotImplementedError

        @staticmethod
        def apply(x, weight, labels, bias, accum_dtype, chunk_mem_const):
            called.update(bias=bias, accum_dtype=accum_dtype, chunks=chunk_mem_const)
            return _cross_entropy(x, weight, labels), None

    def chunked(x, weight, target, chunk_size):
        return _cross_entropy(x, weight, target)

    for path, values in {
        "cut_cross_entropy": {"linear_cross_entropy": linear_cross_entropy},
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.fused_linear_cross_entropy": {
            "LigerFusedLinearCrossEntropyFunction": Function
        },
        "quack": {},
        "quack.linear_cross_entropy": {"chunked_linear_cross_entropy": chunked},
    }.items():
        module = ModuleType(path)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, path, module)
    return called


def test_libraries_get_unit_vectors_times_s(stand_ins):
    case = replace(ARC, classes=2000, state="sgd")
    takers = [t for t in libraries.CONTENDERS if t.computes == "bf16 stored"]
    assert len(takers) == 5
    for taker in takers:
        assert taker.prenormalised and "(softmax)" in taker.name
        if "no F.linear_cross_entropy" in (taker.refuses(case, CPU) or ""):
            continue  # PyTorch before 2.13
        verdict = gate.check(taker, case, CPU)
        assert verdict.passed and verdict.worst > 1e-4, taker.name
    assert stand_ins["filter_eps"] == "high"  # the filtered one came last
    assert stand_ins["accum_dtype"] == torch.float32 and stand_ins["bias"] is None
    assert stand_ins["chunks"] == 8  # 2000 classes, 32 dimensions: 8 chunks of the batch


@pytest.mark.parametrize("case", [ARC, replace(ARC, rate=0.5), replace(ARC, world=2)])
def test_refusals_are_reasons(case):
    for taker in contenders.contenders(case, CPU, None):
        reason = taker.refuses(case, CPU)
        assert reason is None or len(reason) > 10, taker.name
        if case is not ARC and taker.prenormalised:
            assert reason
    gpu = [t for t in libraries.CONTENDERS if t.refuses(ARC, CPU) == "needs a GPU"]
    assert len(gpu) == 4


def test_only_by_part_and_by_whole_name():
    def names(*only):
        return [taker.name for taker in contenders.contenders(ARC, CPU, list(only))]

    assert names("insightface-like") == ["insightface-like"]
    assert len(names("insightface")) == 2
    assert names("reference") == ["fastmargin reference fp32"]
    assert "fastmargin reference fp32" not in names()
