"""Provenance of results: hardware, versions, commit, command."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import ROOT
from fastmargin.backends import _extension
from fastmargin.backends.triton import tuned
from fastmargin.build_info import build_info

PACKAGES = (
    *("torch", "triton", "numpy", "pytorch-metric-learning", "cut-cross-entropy", "liger-kernel"),
    *("quack-kernels", "nvidia-cutlass-dsl"),
)
ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "FASTMARGIN_CPU_CAPABILITY")


def git(*arguments: str) -> str:
    """Output of a git command in the checkout; empty if it fails or there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_model() -> str:
    """From /proc/cpuinfo."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, object]:
    query = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        told = [part.strip() for part in done.stdout.split("\n")[0].split(",")]
    except (OSError, subprocess.TimeoutExpired):
        told = []
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver_and_limits": dict(zip(query.split(","), told, strict=False)),
        "cuda": torch.version.cuda,
    }


def machine(device: torch.device) -> dict[str, object]:
    """The hardware."""
    found: dict[str, object] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": torch.get_num_threads(),
        "capability": None,
        "system": platform.platform(),
    }
    if _extension.reason() is None:
        found["capability"] = torch.ops.fastmargin.cpu_capability()
    if device.type == "cuda":
        found["gpu"] = _gpu()
    return found


def provenance(command: str, device: torch.device) -> dict[str, object]:
    """Everything needed to reproduce a run."""
    return {
        "device": device_name(device),
        "machine": machine(device),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "build": build_info(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "own_tiles": tuned.describe()["applied"],  # 0: tile shapes as shipped
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(
            git("status", "--porcelain", "--", "csrc", "fastmargin", "benchmarks/*.py")
        ),
        "load_average_before": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def device_name(device: torch.device) -> str:
    """Name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_model()}, {torch.get_num_threads()} threads"
