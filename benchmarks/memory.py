"""Peak memory of a step beyond persistent memory: centres, optimiser state, embeddings.

On a CPU the resident set of a process that does nothing else; on a GPU torch's own count.

    python -m benchmarks.memory '{"name": ..., "batch": ...}' 'fastmargin cpu fp32'
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import ROOT, cases, contenders, data

WARM_UP = 2


class OutOfMemory(RuntimeError):
    """The contender does not fit."""


@dataclass(frozen=True)
class Peak:
    """peak_bytes: beyond persistent memory; includes gradient_bytes, the centres' gradient."""

    peak_bytes: int
    gradient_bytes: int


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on either device."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError, OutOfMemory)) or (
        "can't allocate memory" in text or "out of memory" in text.lower()
    )


def in_fresh_process(case: cases.Case, contender: str, threads: int) -> Peak:
    """Measures in a new process.

    Raises:
        OutOfMemory: the process was killed, or could not allocate.
        RuntimeError: it failed otherwise; with the last line of its output.
    """
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(case)), contender]
    done = subprocess.run([*command, str(threads)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return Peak(**json.loads(done.stdout.splitlines()[-1]))
    error = RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1][:300])
    if done.returncode == -9 or is_out_of_memory(error):
        raise OutOfMemory(f"a process of its own ran out of memory: {error}")
    raise error


def of_step(head: contenders.Head, batches, device: torch.device) -> Peak:
    """Of one step after two warm-up steps, in this process."""
    for turn in range(WARM_UP):
        _step(head, *batches[turn % len(batches)])
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradient = _step(head, *batches[WARM_UP % len(batches)])
        torch.cuda.synchronize()
        return Peak(torch.cuda.max_memory_allocated() - before, gradient)
    _give_back()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    gradient = _step(head, *batches[WARM_UP % len(batches)])
    return Peak(max(0, resident("VmHWM") - before), gradient)


def _step(head: contenders.Head, x: torch.Tensor, labels: torch.Tensor) -> int:
    """Runs one step; returns the bytes of the centres' gradient."""
    x.grad = None
    head.loss(x, labels).backward()
    size = head.gradient_bytes()
    if head.optimiser is not None:
        head.optimiser.step()
    head.zero_grad()
    return size


def resident(field: str) -> int:
    """Resident bytes of this process: now ("VmRSS") or at the peak ("VmHWM"). Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _give_back() -> None:
    """Returns memory freed by the warm-up to the system (glibc): if reused, it would not count."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass


def main(case: str, name: str, threads: str) -> None:
    """Runs in the new process; prints a line of JSON."""
    torch.set_num_threads(int(threads))
    device, case = torch.device("cpu"), cases.from_dict(json.loads(case))
    contender = contenders.by_name(name, device)
    unit = contender.prenormalised
    head = contender.make(case, data.centres(case, device, unit))
    peak = of_step(head, data.batches(case, device, unit), device)
    sys.stdout.write(json.dumps(asdict(peak)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
