"""What ``fastmargin doctor`` finds out: environment, backends, a self-test, compiled kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from importlib import metadata

import torch

import fastmargin as fm
from fastmargin import testing
from fastmargin.build_info import build_info

ALLOWED = {"fp32": 3e-5, "fp16": 3e-3}
"""Largest relative error of loss and gradients against float64, by operand type."""


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
    """Loss and gradients of hard and confident rows against float64, on the backend's device.

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
    """Registers, stack and shared memory of the Triton kernels for sm_80, sm_90 and sm_100.

    Needs Triton and no GPU; minutes the first time.

    Raises:
        RuntimeError: Triton is missing, or a kernel does not compile.
    """
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastmargin.backends.triton.aot", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    if not done.stdout.strip():
        raise RuntimeError(f"compiling the kernels failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def examine(with_kernels: bool = False) -> dict[str, object]:
    """Everything, as ``fastmargin doctor --json`` prints it. ``healthy`` is the verdict."""
    reasons = fm.backends.available()
    tests = {name: self_test(name) for name, reason in reasons.items() if reason is None}
    compiled = kernels() if with_kernels else None
    return {
        "environment": environment(),
        "backends": reasons,
        "notes": fm.backends.notes(),
        "self_test": tests,
        "kernels": compiled,
        "advice": advice(reasons),
        "healthy": all(t["passed"] for t in tests.values())
        and all(kernel["fits"] for kernel in compiled or ()),
    }


def advice(reasons: dict[str, str | None]) -> list[str]:
    """What would make it faster here."""
    found = []
    if reasons["cpu"] is not None:
        found.append("Training on the CPU runs on plain PyTorch: " + reasons["cpu"])
    if torch.cuda.is_available() and reasons["triton"] is not None:
        found.append("The GPU is not used by a fused backend: " + reasons["triton"])
    return found


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
    if report["kernels"] is not None:
        table = Table("kernel", "sm", "registers", "stack B", "shared KB", title="Triton kernels")
        for kernel in report["kernels"]:
            style = None if kernel["fits"] else "red"
            size = f"{kernel['shared'] / 1024:.0f}"
            numbers = str(kernel["arch"]), str(kernel["registers"]), str(kernel["stack"]), size
            table.add_row(kernel["name"], *numbers, style=style)
        console.print(table)
    for line in report["advice"]:
        console.print(line, highlight=False)
