"""Checks of the settings of margins, run whenever one is set, e.g. by a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

from fastmargin.spec import GRAD_MODES, GUARDS

Limit = Callable[[str, object], None]
"""Called with the name and value of a setting; raises TypeError or ValueError if invalid."""


def anything(name: str, value: object) -> None:
    """No check: done elsewhere, or every value is valid."""


def number(name: str, value: object) -> None:
    """A finite number, not a tensor: kernels take it by value, without gradient."""
    if not isinstance(value, Real):
        raise TypeError(
            f"{name} must be a number, got {type(value).__name__}: pass float({name}); "
            "to learn it, write your own margin, see docs/margins.md"
        )
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def positive(name: str, value: object) -> None:
    """A number above 0."""
    number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def count(name: str, value: object) -> None:
    """An integer of at least 1."""
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Within:
    """A number in [low, high]; ``what`` describes it in the error message."""

    low: float
    high: float
    what: str

    def __call__(self, name: str, value: object) -> None:
        number(name, value)
        if not self.low <= value <= self.high:
            raise ValueError(f"{name} must be {self.what}, got {value}")


@dataclass(frozen=True)
class Choice:
    """One of the allowed strings."""

    allowed: tuple[str, ...]

    def __call__(self, name: str, value: object) -> None:
        if value not in self.allowed:
            raise ValueError(f"{name} must be one of {self.allowed}, got {value!r}")


angle = Within(0, math.pi, "an angle in radians, in [0, pi] (math.radians() helps)")
cosine_difference = Within(-2, 2, "a difference of cosines, in [-2, 2], before the scale s")
fraction = Within(0, 1, "a fraction, in [0, 1]")
not_negative = Within(0, math.inf, "0 or more")
cos_eps = Within(0, 0.5, "a difference of cosines, in [0, 0.5]")

GUARDED: dict[str, Limit] = {
    "guard": Choice(GUARDS),
    "grad": Choice(GRAD_MODES),
    "cos_eps": cos_eps,
    "angle_eps": Within(0, math.pi / 4, "an angle in radians, in [0, pi/4]"),
}
"""Settings of margins that use :func:`fastmargin.margins.guards.add_angle`."""
