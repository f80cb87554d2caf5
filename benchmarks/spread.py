"""Median and spread of measurements, and of ratios."""

from __future__ import annotations

from dataclasses import dataclass


def quantile(values: list[float], share: float) -> float:
    """Quantile ``share``, with linear interpolation between the sorted values."""
    values = sorted(values)
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


@dataclass(frozen=True)
class Spread:
    """The median, and low and high: the 10th and the 90th percentile."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        return Spread(*(quantile(values, share) for share in (0.5, 0.1, 0.9)))

    def overlaps(self, other: Spread) -> bool:
        """Whether the two agree within their spreads."""
        return self.low <= other.high and other.low <= self.high


def paired_ratio(values: list[float], others: list[float]) -> Spread:
    """Ratios of the i-th values: of neighbouring turns, so that drift cancels."""
    return Spread.of([a / b for a, b in zip(values, others, strict=False)])


def ratio_of_runs(values: list[float], others: list[float]) -> Spread:
    """Ratio of the medians of two runs; low and high are the extremes within both spreads."""
    a, b = Spread.of(values), Spread.of(others)
    return Spread(a.median / b.median, a.low / b.high, a.high / b.low)
