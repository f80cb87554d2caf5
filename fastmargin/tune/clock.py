"""Timing a piece of work; median and spread of several times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class Clock(Protocol):
    """Times a piece of work."""

    def seconds(self, work: Callable[[], object]) -> float:
        """Runs the work once; returns its time."""


class DeviceClock:
    """CUDA events around the work; the L2 cache is flushed before."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(2 * size, 128 << 20), dtype=torch.int8, device=device)

    def seconds(self, work: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Spread:
    """median, and low and high: the 10th and 90th percentile of the times."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        shares = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
        return Spread(*torch.tensor(values, dtype=torch.float64).quantile(shares).tolist())

    def below(self, other: Spread) -> bool:
        """Whether this is less by more than the spread of both."""
        return self.high < other.low
