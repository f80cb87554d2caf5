"""The per-row CUDA kernels without a GPU: their source run on the CPU, and what nvcc makes of it.

The checks are those of the shared arithmetic in test_row_arithmetic.py; here they go through the
kernels and launchers of csrc/cuda, executed by tests/cuda_on_cpu/cuda_runtime.h.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import device_for
from cuda_on_cpu import harness
from test_row_arithmetic import (
    KINDS,
    check_margin_rows,
    check_row_prologue,
    ema_rules,
    make_ema,
    make_form,
    make_rows,
    make_x,
    one_thread,  # noqa: F401  an autouse fixture
)

from fastmargin import backends
from fastmargin.backends import _extension
from fastmargin.backends import cuda as cuda_backend
from fastmargin.spec import MarginForm

needs_compiler = pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler (g++, c++)")


@pytest.fixture
def rows():
    loaded = harness.load()
    yield loaded
    loaded.set_order(0)


# ---- the kernels, executed on the CPU -----------------------------------------------------------


def cuda_prologue(rows, max_blocks=65536):
    return lambda *args: rows.row_prologue("cuda", *args, max_blocks=max_blocks)


# B: one row, one warp and a row, more than one block; D: less than a warp, ragged, a multiple of
# every pack, several rounds of the warp
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 33, 257])
def test_row_prologue(rows, dtype, count):
    for cols in (1, 31, 128, 512, 1000):
        check_row_prologue(cuda_prologue(rows), dtype, count, cols)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["strided", "transposed", "offset"])
def test_row_prologue_strides(rows, dtype, layout):
    check_row_prologue(cuda_prologue(rows), dtype, 33, 128, layout)


@needs_compiler
def test_row_prologue_of_many_rows(rows):
    """Several rounds of the statistics block, and of the grid."""
    check_row_prologue(cuda_prologue(rows, max_blocks=100), torch.float32, 3001, 3)


@needs_compiler
def test_row_prologue_rules(rows):
    ema_rules(cuda_prologue(rows))
    x, labels = make_x(5, 8, torch.float32), torch.tensor([0, 1, -1, 3, 2])
    assert all(t.isnan().all() for t in cuda_prologue(rows)(x, labels, None)[2:])
    # no rows at all: the statistics stay as they were
    _, _, mean, std = cuda_prologue(rows)(x[:0], labels[:0], make_ema())
    assert (mean.item(), std.item()) == (20.0, 100.0)


@needs_compiler
def test_row_prologue_is_deterministic(rows):
    """Bit for bit the same for any number of blocks and any order of threads and blocks."""
    x, labels = make_x(600, 36, torch.float32), torch.arange(600) % 7 - 1
    first = cuda_prologue(rows)(x, labels, make_ema())
    for order, max_blocks in ((0, 1), (0, 7), (1, 65536), (5, 65536), (6, 3)):
        rows.set_order(order)
        again = cuda_prologue(rows, max_blocks)(x, labels, make_ema())
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_compiler
@pytest.mark.parametrize("source, guard, grad", KINDS)
def test_margin_rows(rows, source, guard, grad):
    def run(*args):
        return rows.margin_rows("cuda", *args)

    check_margin_rows(run, source, guard, grad, double=False)


@needs_compiler
@pytest.mark.parametrize("source", ["class", "row"])
def test_margin_rows_over_many_blocks(rows, source):
    form = replace(make_form(source, "mm", "exact"), table=torch.rand(1000))
    inputs = [t.repeat(9)[:1000] for t in make_rows("random", form, torch.float32)]
    whole = rows.margin_rows("host", *inputs, form)
    for order, max_blocks in ((0, 65536), (0, 1), (1, 3), (9, 65536)):
        rows.set_order(order)
        again = rows.margin_rows("cuda", *inputs, form, max_blocks=max_blocks)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    empty = [t[:0] for t in inputs]
    assert all(len(t) == 0 for t in rows.margin_rows("cuda", *empty, form))


# ---- the executor itself ------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("order", [0, 1, 3])
def test_sound_kernel_runs(rows, order):
    rows.set_order(order)
    reversed_ = torch.arange(63.0, -1, -1)
    expected = reversed_ + reversed_.view(-1, 2).flip(1).flatten()
    assert torch.equal(rows.faulty(0), expected)


@needs_compiler
@pytest.mark.parametrize(
    "fault, message",
    [
        (1, r"deadlock: in block 0; 63 threads \(the first is 0\) wait in __syncthreads at "
            r"rows_harness.cpp:\d+; 1 threads \(the first is 5\) left the kernel"),
        (2, r"divergent barrier: in block 0; 32 threads \(the first is 0\) wait in __syncthreads "
            r"at rows_harness.cpp:(\d+); 32 threads \(the first is 32\) wait in __syncthreads at "
            r"rows_harness.cpp:(?!\1)\d+"),
        (4, r"deadlock: .*32 threads \(the first is 1\) wait in __shfl_xor_sync at .*"
            r"\(mask ffffffff\)"),
        (5, r"block 0, thread \d+: __shfl_xor_sync at .*: reads lane \d+, not in the mask"),
    ],
    ids=["thread_leaves", "two_barriers", "partial_shuffle", "foreign_lane"],
)  # fmt: skip
def test_planted_fault_is_reported(rows, fault, message):
    with pytest.raises(harness.LaunchError, match=message):
        rows.faulty(fault)
    assert rows.faulty(0).isfinite().all()  # and the next launch is not harmed


@needs_compiler
def test_missing_barrier_reads_poison(rows):
    """Shared memory that nobody has written yet is NaN, in any order of the threads."""
    for order in (0, 1, 3):
        rows.set_order(order)
        assert rows.faulty(3).isnan().any()


@needs_compiler
def test_planted_kernel_errors_are_found(tmp_path):
    """The checks above notice a lost barrier, and a block that does not stride over the grid."""
    csrc = harness.mutated(
        tmp_path,
        ("cuda/row_prologue.cuh", "  __syncthreads();\n", ""),
        ("cuda/margin_rows.cuh", "row += step", "row += args.rows"),
    )
    wrong = harness.load(csrc)
    with pytest.raises(AssertionError):
        test_row_prologue_is_deterministic(wrong)
    wrong.set_order(0)
    with pytest.raises(AssertionError):
        test_margin_rows_over_many_blocks(wrong, "class")


# ---- nvcc ---------------------------------------------------------------------------------------

ARCHITECTURES = ("sm_80", "sm_90a")
SOURCES = sorted((harness.ROOT / "csrc" / "cuda").glob("*.cu"))


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    path = os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ.get("PATH", "")])
    return shutil.which("nvcc", path=path)


def ptxas_report(source: Path) -> str:
    """What ``-Xptxas -v`` says of this file, for every architecture; kept in the build folder."""
    nvcc, csrc = find_nvcc(), harness.ROOT / "csrc"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    gencode = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in ARCHITECTURES]
    flags = ["-std=c++20", "-O3", *gencode, "-Xptxas", "-v", "-DUSE_CUDA"]
    # device code only: what the host side compiles to is the build's business
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-fatbin"]
    used = [source, *harness.sources_below(csrc)]
    report = harness.cached(".ptxas", " ".join([version, torch.__version__, *flags]), used)
    if not report.exists():
        include = [f"-I{csrc}", f"-I{Path(torch.__file__).parent / 'include'}"]
        made = report.with_suffix(f".{os.getpid()}")
        command = [nvcc, *flags, *include, str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        made.unlink()
        report.write_text(done.stderr + done.stdout)
    return report.read_text()


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc in CUDA_HOME, CUDA_PATH or PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source):
    text = ptxas_report(source)
    entries = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", text)
    memory = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
    )
    assert {arch for _, arch in entries} == set(ARCHITECTURES)
    assert len(memory) >= len(entries)
    for name, numbers in itertools.zip_longest(entries, memory):
        assert set(numbers) == {"0"}, f"{name}: stack, spill stores, spill loads {numbers}"


# ---- the backend --------------------------------------------------------------------------------


def test_backend_says_what_it_does():
    cuda = backends.get("cuda")
    assert "row_prologue and margin_rows" in cuda.note and "Triton" in cuda.note
    if not torch.cuda.is_available():
        reason = cuda.unavailable()
        assert "not compiled" in reason or "CUDA" in reason
        with pytest.raises(backends.BackendError, match=re.escape(reason)):
            backends.select("cuda", torch.device("cuda"), torch.float32)
    assert "float64" in cuda.refuses(torch.device("cuda"), torch.float64)
    assert "cpu" in cuda.refuses(torch.device("cpu"), torch.float32)


def test_operators_are_those_of_the_cpu_and_a_stream():
    for module in ("_C", "_cuda"):
        if _extension.reason(module):
            pytest.skip(_extension.reason(module))
    for name in ("row_prologue", "margin_rows"):
        on_cpu = str(getattr(torch.ops.fastmargin, f"cpu_{name}").default._schema)
        on_cuda = str(getattr(torch.ops.fastmargin, f"cuda_{name}").default._schema)
        assert on_cuda == on_cpu.replace("cpu_", "cuda_").replace(") -> ()", ", int stream) -> ()")


@pytest.fixture
def streams(monkeypatch):
    """Of every call of the CUDA operators, in whose place are the CPU ones."""
    if _extension.reason("_C"):
        pytest.skip(_extension.reason("_C"))
    streams = []

    def stand_in(op):
        def run(*args):
            streams.append(args[-1])
            op(*args[:-1])

        return run

    ops = torch.ops.fastmargin
    for name in ("row_prologue", "margin_rows"):
        monkeypatch.setattr(
            ops, f"cuda_{name}", stand_in(getattr(ops, f"cpu_{name}")), raising=False
        )
    monkeypatch.setattr(cuda_backend, "_stream", lambda tensor: 4711)
    return streams


def test_backend_hands_over_the_current_stream(streams):
    backend = cuda_backend.BACKEND
    check_row_prologue(backend.row_prologue, torch.bfloat16, 33, 31, "strided")
    check_margin_rows(backend.margin_rows, "adaface", "clip", "exact", double=False)
    assert set(streams) == {4711}


def test_a_step_takes_its_own_kernels(streams):
    """Before and after Triton's pass over the centres, whose backend would take others of its."""
    if device_for("triton") == "cuda":
        pytest.skip("the operators in place of the CUDA ones run on the CPU")
    x, weight, labels = torch.randn(6, 8), torch.randn(9, 8), torch.arange(6)
    about = None, labels, labels, 0, 9, MarginForm(8.0, m2=0.3), None, "mean", True, "fp32"
    made = cuda_backend.BACKEND.softmax_loss(x, weight, *about)
    assert streams == [4711] * 2
    expected = backends.get("reference").softmax_loss(x, weight, *about)
    torch.testing.assert_close((made.loss, made.pull), (expected.loss, expected.pull))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_the_device(dtype):
    cuda = backends.get("cuda")
    if cuda.unavailable():
        pytest.skip(cuda.unavailable())

    def to_device(args):
        return [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]

    def prologue(x, labels, ema):
        if ema is not None:
            ema = type(ema)(ema.mean.cuda(), ema.std.cuda(), ema.alpha, ema.low, ema.high)
        return tuple(t.cpu() for t in cuda.row_prologue(x.cuda(), labels.cuda(), ema))

    def margin(*args):
        *tensors, form = args
        state = {k: getattr(form, k).cuda() for k in ("mean", "std", "table")}
        moved = type(form)(**{**form.__dict__, **state})
        return tuple(t.cpu() for t in cuda.margin_rows(*to_device(tensors), moved))

    for count, cols, layout in (
        (1, 31, "contiguous"),
        (4097, 512, "offset"),
        (300, 128, "strided"),
    ):
        check_row_prologue(prologue, dtype, count, cols, layout)
    ema_rules(prologue)
    for kind in KINDS:
        check_margin_rows(margin, *kind, double=False)
