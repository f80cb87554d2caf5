"""The CPU backend against the plain PyTorch head: time and peak memory of forward and backward.

Both heads run in turns in one process, so that a busy machine slows both, and each in fresh
processes for its peak memory. Writes ``results/cpu_head.json`` beside this file.

    python benchmarks/cpu_head.py
    python benchmarks/cpu_head.py --classes 20000 --dim 512 --repeats 5 --output -
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import fastmargin as fm
from fastmargin.build_info import build_info

MARGIN, SCALE = 0.5, 64.0
HERE = Path(__file__).resolve().parent


def plain(x, weight, labels):
    """The head as five lines of PyTorch."""
    cos = F.normalize(x) @ F.normalize(weight).t()
    target = cos.gather(1, labels[:, None]).clamp(-1 + 1e-7, 1 - 1e-7)
    cos = cos.scatter(1, labels[:, None], torch.cos(torch.acos(target) + MARGIN))
    return F.cross_entropy(SCALE * cos, labels)


def fused(x, weight, labels):
    margin = fm.ArcFace(m=MARGIN, s=SCALE, guard="none")
    return fm.margin_loss(x, weight, labels, margin, backend="cpu")


HEADS = {"plain": plain, "fused": fused}


def make_case(batch, classes, dim):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, dim, generator=g).requires_grad_()
    weight = torch.randn(classes, dim, generator=g).requires_grad_()
    return x, weight, torch.randint(0, classes, (batch,), generator=g)


def step(head, case):
    """Forward and backward; seconds and the loss. Gradients are fresh, as in training."""
    x, weight, labels = case
    x.grad = weight.grad = None
    start = time.perf_counter()
    loss = HEADS[head](x, weight, labels)
    loss.backward()
    return time.perf_counter() - start, float(loss.detach())


def status(key: str) -> int:
    """A line of this process's memory account, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def peak_memory(head: str, size: tuple[int, int, int]) -> int:
    """Bytes at the peak of one step beyond centres, embeddings and the gradient of the centres."""
    step(head, make_case(8, 1024, 16))  # libraries and threads start
    case = make_case(*size)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step(head, case)
    gradient = case[1].numel() * case[1].element_size()
    return status("VmHWM") - before - gradient


def peak_memory_fresh(head: str, size: tuple[int, int, int]) -> int:
    command = [sys.executable, __file__, "--peak-of", head]
    for name, value in zip(("--batch", "--classes", "--dim"), size, strict=True):
        command += [name, str(value)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def cpu_model() -> str:
    """Of /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()


def machine(script: str) -> dict:
    """Hardware, versions, commit, date and command of this run."""
    return {
        "machine": {
            "cpu": cpu_model(),
            "threads": torch.get_num_threads(),
            "capability": torch.ops.fastmargin.cpu_capability(),
            "system": platform.system(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "build": build_info(),
        },
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", ":/csrc", ":/fastmargin")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join([f"python {script}", *sys.argv[1:]]),
    }


def compare(size: tuple[int, int, int], repeats: int) -> dict:
    case = make_case(*size)
    losses = {head: step(head, case)[1] for head in HEADS}
    if not math.isclose(losses["plain"], losses["fused"], rel_tol=1e-4):
        raise SystemExit(f"the heads disagree: {losses}")
    seconds = {head: [] for head in HEADS}
    load = os.getloadavg()[0]
    for _ in range(repeats):
        for head in HEADS:
            seconds[head].append(step(head, case)[0])
    peaks = {
        head: statistics.median(peak_memory_fresh(head, size) for _ in range(3)) for head in HEADS
    }
    median = {head: statistics.median(times) for head, times in seconds.items()}
    best = {head: min(times) for head, times in seconds.items()}
    return {
        "batch": size[0],
        "classes": size[1],
        "dim": size[2],
        "dtype": "float32",
        "repeats": repeats,
        "seconds_median": median,
        "seconds_min": best,
        "time_ratio_median": median["fused"] / median["plain"],
        "time_ratio_min": best["fused"] / best["plain"],
        "peak_extra_bytes": peaks,
        "memory_ratio": peaks["fused"] / peaks["plain"],
        "loss": losses,
        "load_average_before": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--classes", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", default=str(HERE / "results" / "cpu_head.json"))
    parser.add_argument("--peak-of", choices=HEADS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = (arguments.batch, arguments.classes, arguments.dim)
    if arguments.peak_of:
        print(peak_memory(arguments.peak_of, size))
        return
    reason = fm.backends.available()["cpu"]
    if reason:
        raise SystemExit(reason)
    result = compare(size, arguments.repeats)
    result |= machine("benchmarks/cpu_head.py")
    text = json.dumps(result, indent=2) + "\n"
    if arguments.output == "-":
        print(text, end="")
    else:
        Path(arguments.output).write_text(text)
    ratios = [result[key] for key in ("time_ratio_median", "time_ratio_min", "memory_ratio")]
    summary = "of plain PyTorch: time {:.3f} (best {:.3f}), peak memory {:.4f}"
    print(summary.format(*ratios), file=sys.stderr)


if __name__ == "__main__":
    main()
