"""Constants that originals compute from the margin once; here they follow it."""

from __future__ import annotations

import math
from collections.abc import Callable


def _following(value: Callable[[float], float]) -> property:
    def refuse(self, value: float) -> None:
        raise AttributeError("cos_m, sin_m, th, mm and mmm follow margin here: set margin instead")

    return property(lambda self: value(self.margin), refuse)


class MarginConstants:
    """Of a module with an attribute ``margin`` in radians. Setting one raises AttributeError."""

    cos_m = _following(math.cos)
    sin_m = _following(math.sin)
    th = _following(lambda margin: math.cos(math.pi - margin))
    mm = _following(lambda margin: math.sin(math.pi - margin) * margin)
    mmm = _following(lambda margin: 1 + math.cos(math.pi - margin))
