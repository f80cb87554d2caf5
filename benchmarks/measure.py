"""Times and peak memory of a step on a GPU, the same way for everybody."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def provenance() -> dict:
    """Hardware, versions, commit and command of this run."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    triton = sys.modules.get("triton")
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": getattr(triton, "__version__", None),
        "python": platform.python_version(),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }


def time_gpu(step, repeats: int = 20, warmup: int = 3) -> dict:
    """Median and spread, in ms, of ``step()`` between CUDA events, with the L2 cache cold."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(warmup):
        step()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    times.sort()
    return {
        "ms": statistics.median(times),
        "ms_p10": times[len(times) // 10],
        "ms_p90": times[-1 - len(times) // 10],
        "repeats": repeats,
    }


def peak_bytes(step) -> int:
    """Most memory that ``step()`` allocates on top of what there is."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def matmul_ceiling(dtype: torch.dtype, n: int = 8192) -> float:
    """TFLOP/s of torch's own product of two n x n matrices: what this card gives today."""
    a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
    return 2 * n**3 / time_gpu(lambda: a @ b, repeats=10)["ms"] / 1e9


def copy_ceiling(gib: int = 4) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(gib << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / time_gpu(lambda: target.copy_(source), repeats=10)["ms"] * 1e3
