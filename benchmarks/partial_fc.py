"""A whole training step on sampled classes, beside the same written as insightface's PartialFC_V2.

Sampling, forward, backward and SGD with momentum and weight decay, in one process on a CPU. Both
heads run in turns, so that a busy machine slows both, and each in fresh processes for its peak
memory. The plain head is our own writing of that sequence of operations: a gathered copy of the
sampled centres, dense (k, B) logits, a dense gradient and an update of all rows. No time is taken
before a step of both, from the same centres and the same classes, has given the same centres.
Writes ``results/partial_fc_cpu.json`` beside this file.

    python benchmarks/partial_fc.py
    python benchmarks/partial_fc.py --classes 100000 --rate 0.1 --repeats 5 --output -
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from cpu_head import machine, status
from sampling import partial_fc

import fastmargin as fm

SCALE, MARGIN = 64.0, 0.4
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
HERE = Path(__file__).resolve().parent


class Plain:
    """CosFace on sampled classes, dense everywhere else."""

    def __init__(self, classes: int, dim: int, sampled: int):
        self.weight = torch.nn.Parameter(torch.randn(classes, dim) * 0.01)
        self.optimiser = torch.optim.SGD([self.weight], **SETTINGS)
        self.sampled = sampled

    def step(self, x, labels, sample=None):
        index, column = sample or partial_fc(labels, len(self.weight), self.sampled)
        logits = F.linear(F.normalize(x), F.normalize(self.weight[index])).clamp(-1, 1)
        margin = F.one_hot(column, len(index)) * MARGIN
        loss = F.cross_entropy(SCALE * (logits - margin), column)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.detach()


class Fused:
    """The head of this package with lazy rows."""

    def __init__(self, classes: int, dim: int, sampled: int):
        self.head = fm.MarginHead(
            dim, classes, fm.CosFace(MARGIN, SCALE), num_sampled=sampled, sparse_grad=True
        )
        self.optimiser = fm.optim.RowSGD(self.head.parameters(), **SETTINGS)

    def step(self, x, labels):
        loss = self.head(x, labels)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.detach()


HEADS = {"plain": Plain, "fused": Fused}


def batch(rows: int, classes: int, dim: int):
    return torch.randn(rows, dim).requires_grad_(), torch.randint(0, classes, (rows,))


def check(rows: int, classes: int, dim: int, sampled: int) -> float:
    """Three steps of both on the classes that the package draws; the largest difference."""
    fused, plain = Fused(classes, dim, sampled), Plain(classes, dim, sampled)
    plain.weight.data.copy_(fused.head.weight.data)
    drawn, draw = [], fused.head.sampler.draw
    fused.head.sampler.draw = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    for _ in range(3):
        x, labels = batch(rows, classes, dim)
        losses = fused.step(x, labels), plain.step(x, labels, (drawn[-1].index, drawn[-1].column))
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    centres = fused.head.export_centers(normalized=False)
    torch.testing.assert_close(centres, plain.weight.data, rtol=1e-3, atol=1e-6)
    return float((centres - plain.weight.data).abs().max())


def peak_memory(name: str, size: tuple[int, int, int, int]) -> int:
    """Bytes at the peak of a step beyond what stays: centres, momentum and notes on rows."""
    rows, classes, dim, sampled = size
    head = HEADS[name](classes, dim, sampled)
    for _ in range(2):
        head.step(*batch(rows, classes, dim))
    head.optimiser.zero_grad()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    head.step(*batch(rows, classes, dim))
    return status("VmHWM") - before


def peak_memory_fresh(name: str, arguments: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--peak-of", name]
    for option in ("batch", "classes", "dim", "rate"):
        command += [f"--{option}", str(getattr(arguments, option))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(size: tuple[int, int, int, int], repeats: int) -> dict:
    rows, classes, dim, sampled = size
    heads = {name: make(classes, dim, sampled) for name, make in HEADS.items()}
    seconds = {name: [] for name in heads}
    for turn in range(repeats + 1):
        case = batch(rows, classes, dim)
        for name, head in heads.items():
            start = time.perf_counter()
            head.step(*case)
            if turn:  # the first one makes the state of the optimisers
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "seconds_median": median,
        "seconds_min": {name: min(times) for name, times in seconds.items()},
        "seconds_max": {name: max(times) for name, times in seconds.items()},
        "time_ratio_median": median["fused"] / median["plain"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.1, help="share of classes that are sampled")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", default=str(HERE / "results" / "partial_fc_cpu.json"))
    parser.add_argument("--peak-of", choices=HEADS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = arguments.batch, arguments.classes, arguments.dim
    size += (int(arguments.rate * arguments.classes),)
    if arguments.peak_of:
        print(peak_memory(arguments.peak_of, size))
        return
    result = dict(zip(("batch", "classes", "dim", "sampled"), size, strict=True))
    result |= {"dtype": "float32", "repeats": arguments.repeats}
    result["load_average_before"] = os.getloadavg()[0]
    result["largest_difference"] = check(64, 5000, arguments.dim, 500)
    result |= compare(size, arguments.repeats)
    result["peak_extra_bytes"] = {name: peak_memory_fresh(name, arguments) for name in HEADS}
    peaks = result["peak_extra_bytes"]
    result["memory_ratio"] = peaks["fused"] / peaks["plain"]
    result |= machine("benchmarks/partial_fc.py")
    text = json.dumps(result, indent=2) + "\n"
    if arguments.output == "-":
        print(text, end="")
    else:
        Path(arguments.output).write_text(text)
    ratios = result["time_ratio_median"], result["memory_ratio"]
    print("of the plain head: time {:.3f}, peak memory {:.4f}".format(*ratios), file=sys.stderr)


if __name__ == "__main__":
    main()
