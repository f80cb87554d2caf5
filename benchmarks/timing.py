"""Times the phases of a step: heads take turns, batches rotate, and a canary detects load."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.contenders import Head

PHASES = ("forward", "backward", "update")
WARM_UP = 2
"""Untimed first steps of each head: compilation, creation of optimiser state."""
LEAST_TURNS = 3
DISTURBED = 1.25
"""A canary is disturbed if it took longer than the run's best times this factor."""


class CpuClock:
    """Marks are readings of ``perf_counter``."""

    def mark(self) -> float:
        return time.perf_counter()

    def laps(self, marks: list[float]) -> list[float]:
        """Seconds between neighbouring marks."""
        return [b - a for a, b in itertools.pairwise(marks)]

    def flush(self) -> None:
        """Does nothing: other heads and the canary run between two steps of a head."""


class GpuClock:
    """Marks are CUDA events, so that only device time counts; the L2 cache is flushed before."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(2 * size, 128 << 20), dtype=torch.int8, device="cuda")

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def laps(self, marks: list[torch.cuda.Event]) -> list[float]:
        marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]

    def flush(self) -> None:
        """Overwrites the L2 cache."""
        self._flush.zero_()


def clock_for(device: torch.device) -> CpuClock | GpuClock:
    return GpuClock() if device.type == "cuda" else CpuClock()


class Canary:
    """A fixed piece of work. If it takes longer, something else is using the machine."""

    def __init__(self, clock, work: Callable[[], object]) -> None:
        self._clock, self._work, self.seconds = clock, work, []

    def sing(self) -> int:
        """Times the work once; returns the index of this measurement."""
        marks = [self._clock.mark()]
        self._work()
        self.seconds.append(self._clock.laps([*marks, self._clock.mark()])[0])
        return len(self.seconds) - 1

    def disturbed(self, time: int) -> bool:
        """Whether the ``time``-th canary took much longer than the best so far."""
        return self.seconds[time] > DISTURBED * min(self.seconds)


def canary_for(device: torch.device, clock) -> Canary:
    """A matrix product of about 10 ms on two cores, less than 1 ms on a GPU."""
    n = 4096 if device.type == "cuda" else 768
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    canary = Canary(clock, lambda: a @ b)
    for _ in range(3):
        canary.sing()
    canary.seconds.clear()
    return canary


@dataclass
class Times:
    """Measurements of one head.

    phases: name -> seconds, one per turn. around: indices of the canaries before and after each
    turn. error: the exception that stopped it, or None.
    """

    phases: dict[str, list[float]] = field(default_factory=dict)
    around: list[tuple[int, int]] = field(default_factory=list)
    error: BaseException | None = None

    def extend(self, more: Times) -> None:
        """Appends the turns of another measurement of the same head."""
        for phase, laps in more.phases.items():
            self.phases.setdefault(phase, []).extend(laps)
        self.around += more.around

    @property
    def step(self) -> list[float]:
        """Seconds of the whole step, one per turn."""
        return [sum(laps) for laps in zip(*self.phases.values(), strict=True)]


def one_step(head: Head, x: Tensor, labels: Tensor, clock) -> dict[str, float]:
    """Seconds by phase. The gradient is freed in the update, or untimed if there is none."""
    x.grad = None
    marks = [clock.mark()]
    loss = head.loss(x, labels)
    marks.append(clock.mark())
    loss.backward()
    marks.append(clock.mark())
    if head.optimiser is not None:
        head.optimiser.step()
        head.zero_grad()
        marks.append(clock.mark())
    laps = clock.laps(marks)
    head.zero_grad()
    return dict(zip(PHASES, laps, strict=False))


def measure(
    heads: dict[str, Head],
    batches: dict[str, list[tuple[Tensor, Tensor]]],
    clock,
    canary: Canary,
    repeats: int,
    seconds: float = float("inf"),
    least: int = LEAST_TURNS,
    before_step: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Times all heads, taking turns so that other load slows all of them.

    Args:
        heads: by name. batches: by the same names, each taken in rotation.
        repeats: timed turns. seconds: no further turn starts after this time, including warm-up,
            but at least ``least`` are run.
        before_step: e.g. a barrier.

    Returns:
        Times by name. A head that raises gets ``error`` and takes no further turn.
    """
    names, found = list(heads), {name: Times() for name in heads}
    start, last = time.monotonic(), canary.sing()
    for turn in range(-WARM_UP, repeats):
        if turn >= least and time.monotonic() - start > seconds:
            break
        first = turn % max(1, len(heads))  # they take turns going first
        for name in [*names[first:], *names[:first]]:
            head, times = heads[name], found[name]
            if times.error is not None:
                continue
            x, labels = batches[name][turn % len(batches[name])]
            try:
                clock.flush()
                before_step()
                laps = one_step(head, x, labels, clock)
            except Exception as error:
                times.error = error.with_traceback(None)  # its frames hold tensors
                head.zero_grad()
                continue
            before, last = last, canary.sing()
            if turn >= 0:
                times.around.append((before, last))
                for phase, lap in laps.items():
                    times.phases.setdefault(phase, []).append(lap)
    return found


def disturbed_share(times: Times, canary: Canary) -> float:
    """Fraction of turns with a disturbed canary before or after."""
    marks = [any(map(canary.disturbed, pair)) for pair in times.around]
    return sum(marks) / len(marks) if marks else 0.0
