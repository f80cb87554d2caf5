"""Checks of the settings of margins, run whenever one is set, e.g. by a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from fastmargin.spec import GRAD_MODES, GUARDS

Limit = Callable[[str, object], object]
"""Called with the name and value of a setting; returns the value, numbers as plain Python numbers,
which ``torch.compile`` needs. Raises TypeError or ValueError if it is invalid."""


def anything(name: str, value: object) -> object:
    """No check: done elsewhere, or every value is valid."""
    return value


def number(name: str, value: object) -> float:
    """A finite number, not a tensor: kernels take it by value, without gradient."""
    if not isinstance(value, Real):
        raise TypeError(
            f"{name} must be a number, got {type(value).__name__}: pass float({name}); "
            "to learn it, write your own margin, see docs/margins.md"
        )
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def positive(name: str, value: object) -> float:
    """A number above 0."""
    found = number(name, value)
    if not found > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return found


def count(name: str, value: object) -> int:
    """An integer of at least 1."""
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


@dataclass(frozen=True)
class Within:
    """A number in [low, high]; ``what`` describes it in the error message."""

    low: float
    high: float
    what: str

    def __call__(self, name: str, value: object) -> float:
        found = number(name, value)
        if not self.low <= found <= self.high:
            raise ValueError(f"{name} must be {self.what}, got {value}")
        return found


@dataclass(frozen=True)
class Table:
    """One number per class within a limit, as a float32 tensor (C,)."""

    limit: Within

    def __call__(self, name: str, value: object) -> Tensor:
        try:
            found = torch.as_tensor(value).detach()
        except (RuntimeError, ValueError) as error:
            raise TypeError(f"{name} must be of numbers, (C,): {error}") from error
        if found.dtype.is_complex or found.dtype == torch.bool:
            raise TypeError(f"{name} must be of numbers, got {found.dtype}")
        if found.dim() != 1 or found.numel() == 0:
            raise ValueError(
                f"{name} must have one number per class, (C,), got shape {tuple(found.shape)}"
            )
        found = found.float()
        # limits in float32, too: that of pi is above pi
        low, high = found.new_tensor([self.limit.low, self.limit.high])
        wrong = ~((found >= low) & (found <= high))  # NaN, too
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0, 0])
            self.limit(f"{name}[{place}]", found[place].item())
        return found


@dataclass(frozen=True)
class OrTensor:
    """Any tensor, for margins that can learn the setting, or a valid number."""

    limit: Limit

    def __call__(self, name: str, value: object) -> object:
        return value if isinstance(value, Tensor) else self.limit(name, value)


@dataclass(frozen=True)
class Choice:
    """One of the allowed strings."""

    allowed: tuple[str, ...]

    def __call__(self, name: str, value: object) -> object:
        if value not in self.allowed:
            raise ValueError(f"{name} must be one of {self.allowed}, got {value!r}")
        return value


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
