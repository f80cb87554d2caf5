"""``fastmargin doctor``: environment, backends, a self-test, and compiled kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import fastmargin as fm
from fastmargin import testing
from fastmargin.backends.triton import tuned
from fastmargin.build_info import build_info

ALLOWED = {"fp32": 3e-5, "fp16": 3e-3}
"""Largest allowed relative error of loss and gradients against float64, by operand type."""


def environment() -> dict[str, object]:
    """Versions and devices."""
    has_gpu = torch.cuda.is_available()
    return {
        "fastmargin": fm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "capability": list(torch.cuda.get_device_capability()) if has_gpu else None,
        "cpu_threads": torch.get_num_threads(),
        "build": build_info(),
    }


def self_test(backend: str) -> dict[str, object]:
    """Compares loss and gradients with float64, in several regimes, on the backend's device.

    Returns ``errors`` (relative, by operand type) and ``passed``.
    """
    device = "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    margin = fm.ArcFace(s=64.0, guard="mmm")
    errors = {}
    for precision in ("fp32", "fp16") if device == "cuda" else ("fp32",):
        worst = 0.0
        for regime in ("random", "confident", "ragged"):
            case = testing.make_case(regime, batch=24, classes=130, dim=48)
            truth = _solve(case, lambda *a: testing.plain_loss(*a, margin, stable=True))

            def loss(*tensors, precision=precision):
                return fm.margin_loss(*tensors, margin, backend=backend, precision=precision)

            ours = _solve(case.to(torch.float32, device), loss)
            found = (testing.relative_error(a, t) for a, t in zip(ours, truth, strict=True))
            worst = max(worst, *found)
        errors[precision] = worst
    return {"errors": errors, "passed": all(errors[p] <= ALLOWED[p] for p in errors)}


def _solve(case: testing.Case, loss_of):
    x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
    loss = loss_of(x, weight, case.labels)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


def kernels() -> list[dict]:
    """Registers, stack, shared memory and products of the Triton kernels on sm_80, sm_90, sm_100.

    Needs Triton but no GPU; takes minutes the first time.

    Raises:
        RuntimeError: Triton is missing, or a kernel does not compile.
    """
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastmargin.backends.triton.aot", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    if not done.stdout.strip():
        raise RuntimeError(f"compiling the kernels failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def cuda_kernels() -> list[dict] | str:
    """Registers, stack, spills and shared memory of the compiled CUDA kernels; needs no GPU.

    One record per kernel, operand types and architecture, sizes in bytes; or the reason why they
    cannot be read.
    """
    compiled = sorted(Path(fm.__file__).parent.glob("_cuda*.so"))
    if not compiled:
        return "the CUDA extension is not compiled"
    tool = _cuobjdump()
    if tool is None:
        return "cuobjdump is missing; CUDA and Triton include it"
    command = [tool, "--dump-resource-usage", str(compiled[0])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"cuobjdump failed: {done.stderr.strip()[-200:]}"
    return read_resource_usage(done.stdout)


def _cuobjdump() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [f"{home}/bin", os.environ.get("PATH", "")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


_TYPES = {"f": "fp32", "d": "fp64", "4Half": "fp16", "8BFloat16": "bf16"}


def read_resource_usage(text: str) -> list[dict]:
    """Parses ``cuobjdump --dump-resource-usage`` for the kernels of this package."""
    found, arch, name = [], "", ""
    for line in text.splitlines():
        if hit := re.match(r"arch = sm_(\w+)", line):
            arch = hit[1]
        elif hit := re.match(r" *Function (\S+):", line):
            name = hit[1]
        elif "REG:" in line and name:
            usage = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
            sizes = {"stack": usage["STACK"], "spilled": usage["LOCAL"], "shared": usage["SHARED"]}
            fits = usage["STACK"] == usage["LOCAL"] == 0
            found.append(
                {"name": _kernel_name(name), "arch": arch, "registers": usage["REG"], **sizes}
                | {"fits": fits}
            )
            name = ""
    return found


def _kernel_name(mangled: str) -> str:
    """E.g. ``unit_rows_kernel fp16 x8`` from a mangled name; other names are not changed."""
    rest, name = mangled.removeprefix("_ZN"), ""
    while hit := re.match(r"\d+", rest):  # namespaces and name, each preceded by its length
        start, length = hit.end(), int(hit[0])
        name, rest = rest[start : start + length], rest[start + length :]
    hit = re.match(r"I(?:NS_)?(f|d|4Half|8BFloat16)E?(?:Li(\d+)E)?", rest)
    if hit is None:
        return name or mangled
    return f"{name} {_TYPES[hit[1]]}" + (f" x{hit[2]}" if hit[2] else "")


def examine(with_kernels: bool = False) -> dict[str, object]:
    """The whole report, as ``fastmargin doctor --json`` prints it; ``healthy`` is the verdict."""
    reasons = fm.backends.available()
    tests = {name: self_test(name) for name, reason in reasons.items() if reason is None}
    compiled = kernels() if with_kernels else None
    cuda = cuda_kernels()
    return {
        "environment": environment(),
        "backends": reasons,
        "notes": fm.backends.notes(),
        "self_test": tests,
        "tuned": tuned.describe(),
        "kernels": compiled,
        "cuda_kernels": cuda,
        "advice": advice(reasons),
        "healthy": all(t["passed"] for t in tests.values())
        and all(kernel["fits"] for kernel in compiled or ())
        and (isinstance(cuda, str) or all(kernel["fits"] for kernel in cuda)),
    }


def advice(reasons: dict[str, str | None]) -> list[str]:
    """What would make training faster here."""
    found = []
    if reasons["cpu"] is not None:
        found.append("Training on the CPU uses plain PyTorch: " + reasons["cpu"])
    if torch.cuda.is_available() and reasons["triton"] is not None:
        found.append("No fused backend uses the GPU: " + reasons["triton"])
    threads, cores = torch.get_num_threads(), _cores()
    if threads < cores:
        found.append(
            f"torch uses {threads} of {cores} cores: unset OMP_NUM_THREADS, or call "
            f"torch.set_num_threads({cores})"
        )
    return found


def _cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def tile_shapes(table: dict) -> list[str]:
    """Lines about the user's table of tile shapes; see ``tuned.describe``."""
    if table["file"] is None:
        return [f"Tile shapes of the Triton kernels: as shipped; {tuned.why_none()}"]
    if not table["exists"]:
        lines = ["Tile shapes of the Triton kernels: as shipped; fastmargin tune measures others"]
        if os.environ.get(tuned.VARIABLE):
            lines.append(f"{tuned.VARIABLE} names {table['file']}, which does not exist")
        return lines
    applied, entries = table["applied"], table["entries"]
    count = f"{applied} of {entries} {'entry' if entries == 1 else 'entries'} in use here"
    left_out = [f"left out: {reason}" for reason in table["left_out"]]
    return [f"Tile shapes of the Triton kernels: {table['file']}, {count}", *left_out]


def print_report(console, report: dict) -> None:
    """The report as tables on a rich console."""
    from rich.table import Table

    table = Table("", "", title="Environment", show_header=False)
    for name, value in report["environment"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        table.add_row(name, str(value))
    console.print(table)

    table = Table("backend", "", "largest error against float64", title="Backends")
    for name, reason in report["backends"].items():
        test = report["self_test"].get(name)
        errors = ", ".join(f"{p} {e:.1e}" for p, e in test["errors"].items()) if test else ""
        verdict = "runs" if test is None or test["passed"] else "[red]WRONG RESULTS[/red]"
        table.add_row(name, verdict if reason is None else f"no: {reason}", errors)
    console.print(table)
    for line in tile_shapes(report["tuned"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if report["kernels"] is not None:
        head = ("kernel", "sm", "registers", "stack B", "shared KB", "products")
        table = Table(*head, title="Triton kernels")
        for kernel in report["kernels"]:
            style = None if kernel["fits"] else "red"
            size = f"{kernel['shared'] / 1024:.0f}"
            numbers = str(kernel["arch"]), str(kernel["registers"]), str(kernel["stack"]), size
            products = "SERIAL" if kernel["serial"] else kernel["products"]
            table.add_row(kernel["name"], *numbers, products, style=style)
        console.print(table)
    cuda = report["cuda_kernels"]
    if isinstance(cuda, str):
        console.print(f"CUDA kernels: {cuda}", highlight=False)
    else:
        head = ("kernel", "sm", "registers", "stack B", "spilled B", "shared B")
        table = Table(*head, title="CUDA kernels")
        for kernel in cuda:
            names = ("name", "arch", "registers", "stack", "spilled", "shared")
            row = [str(kernel[name]) for name in names]
            table.add_row(*row, style=None if kernel["fits"] else "red")
        console.print(table)
    for line in report["advice"]:
        console.print(line, highlight=False)
