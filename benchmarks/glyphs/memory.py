"""Peak memory of a head's step, measured in a process of its own.

python -m benchmarks.glyphs.memory '{"num_classes": 2000, ...}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.glyphs.heads import HEADS, MARGINS, new_optimiser
from benchmarks.memory import resident
from fastmargin.demo.network import EMBEDDING_SIZE

WARM_UP_STEPS = 2
PAGE = 4096
# every tensor of any size goes back to the system when it is freed (glibc), so that the
# high-water mark of one step does not depend on the steps before it
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass(frozen=True)
class Task:
    """What to measure: every pair of a margin and a rate, by every head."""

    num_classes: int
    batch_size: int
    pairs: list[tuple[str, float]]
    device: str
    threads: int


def peaks_in_new_process(task: Task) -> list[dict[str, int]]:
    """For each pair the bytes of each head: see :func:`peak_bytes`."""
    command = [sys.executable, "-m", __spec__.name, json.dumps(asdict(task))]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes(name: str, margin: str, rate: float, task: Task) -> int:
    """The most that a step (forward, backward, optimiser) takes beyond what stays between steps:
    centres, momentum, what the margin keeps, embeddings and their gradient. At least a page, the
    grain of the system's account."""
    device = torch.device(task.device)
    head = HEADS[name](EMBEDDING_SIZE, task.num_classes, MARGINS[margin](), rate).to(device)
    optimiser = new_optimiser(head, lr=0.1, momentum=0.9, weight_decay=5e-4)
    peak = 0
    for _ in range(WARM_UP_STEPS + 1):
        x = torch.randn(task.batch_size, EMBEDDING_SIZE, device=device).requires_grad_()
        x.grad = torch.zeros_like(x)
        labels = torch.randint(task.num_classes, (task.batch_size,), device=device)
        head.prepare(labels)
        before = _start(device)
        head(x, labels).backward()
        optimiser.step()
        peak = max(_peak(device) - before, PAGE)
        optimiser.zero_grad()
    return peak


def _start(device: torch.device) -> int:
    """Bytes in use; the high-water mark starts anew."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM")


if __name__ == "__main__":
    task = Task(**json.loads(sys.argv[1]))
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    found = [
        {name: peak_bytes(name, margin, rate, task) for name in HEADS}
        for margin, rate in task.pairs
    ]
    print(json.dumps(found))
