"""What the tests of ``fastmargin tune`` share: tiles, a clock set by the tile, a spoiler."""

from __future__ import annotations

import time
from dataclasses import asdict

import pytest
import torch
from conftest import device_for

pytest.importorskip("triton")

from fastmargin.backends.triton import BACKEND, tuned
from fastmargin.backends.triton.configs import TileConfig, choose
from fastmargin.tune.problem import Shape
from fastmargin.tune.trial import Machine, Trial

SHAPE = Shape(18, 40, 40)
GOOD = TileConfig(32, 16, 64, 64, 4, 1)
OTHER = TileConfig(16, 64, 32, 64, 4, 1)
HERE = tuned.Here({90: frozenset({"gpu"}), 80: frozenset({"a", "b"})}, "3.7", "1.0")
ENTRY = tuned.Entry("topk", 512, "fp16", "gpu", 90, "3.7", "1.0", asdict(GOOD), {"turns": 9})


class HostClock:
    """For work that is over when the call returns."""

    def seconds(self, work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


def interpreted_machine():
    """A :class:`Machine` of this process; skips where there is a GPU."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    device_for("triton")
    return Machine(torch.device("cpu"), tuned.INTERPRETER, 0, HostClock())


class Bars:
    """A progress that remembers: what was begun, and steps of each."""

    def __init__(self):
        self.begun, self.steps = [], []

    def begin(self, what, steps):
        self.begun.append((what, steps))
        self.steps.append(0)

    def advance(self, steps=1):
        self.steps[-1] += steps


class TileClock:
    """Says how long a tile takes, by the numbers that are chosen when it would run."""

    def __init__(self, times, problem=("stats_sum", 40, "fp32", 0)):
        self.times, self.problem, self.asked = times, problem, []

    def seconds(self, _):
        numbers = tuned.lookup(*self.problem)
        tile = TileConfig(**numbers)
        self.asked.append(tile)
        value = self.times.get(tile, 1.0)
        return value if isinstance(value, float) else value[len(self.asked) % len(value)]


def pick(kernel, d=40, precision="fp32", arch=0):
    return choose(kernel, d, precision, arch)


OPERATIONS = {
    "stats_pull": ("row_stats", lambda stats: stats.pull[3].mul_(1.01)),
    "stats_sum": ("row_stats", lambda stats: stats.lse_neg[3].add_(0.01)),
    "centre_pass": ("row_stats_backward", lambda d_weight: d_weight[39].neg_()),
    "topk": ("row_topk", lambda found: found[1][3].add_(1).remainder_(40)),
}


def broken(monkeypatch, kernel, tile, spoil, when=lambda arguments: True):
    """The operation of a kernel, its result spoilt where this tile is chosen, or any if None."""
    name, _ = OPERATIONS[kernel]
    right = getattr(type(BACKEND), name)

    def wrong(self, *arguments):
        result = right(self, *arguments)
        chosen = tuned.lookup(kernel, 40, "fp32", 0)
        if (tile is None or chosen == asdict(tile)) and when(arguments):
            spoil(result)
        return result

    monkeypatch.setattr(type(BACKEND), name, wrong)


def trial_with(times):
    return Trial(
        "stats_sum",
        SHAPE,
        "fp32",
        Machine(torch.device("cpu"), tuned.INTERPRETER, 0, TileClock(times)),
    )
