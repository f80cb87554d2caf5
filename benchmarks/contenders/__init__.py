"""Who takes part: fastmargin's backends and their peers."""

from __future__ import annotations

import torch

from benchmarks.cases import Case
from benchmarks.contenders import heads, libraries, ours
from benchmarks.contenders.base import ALLOWED, Contender, Head

__all__ = ["ALLOWED", "BASELINE", "Contender", "Head", "by_name", "contenders", "everybody"]

BASELINE = ("insightface-like", "AdaFace-like")
"""What others are compared with, the first that takes part in a case."""


def everybody(device: torch.device) -> tuple[Contender, ...]:
    """All that could take part on a device, ours first; by default without the reference."""
    if device.type == "cuda":
        # a GPU's own way to compile the float32 head is under autocast
        plain = [head for head in heads.FLOAT32 if head.name != "insightface-like, compiled"]
        return (*ours.GPU, *plain, *heads.AMP, *libraries.CONTENDERS, *ours.REFERENCE)
    return (*ours.CPU, *heads.FLOAT32, *libraries.CONTENDERS, *ours.REFERENCE)


def contenders(case: Case, device: torch.device, only: list[str] | None) -> list[Contender]:
    """Who takes part in a case.

    ``only`` keeps the names that contain one of these; a whole name means that one alone.
    """
    found = [contender for contender in everybody(device) if contender.applies(case)]
    if only:
        names = {contender.name for contender in everybody(device)}

        def wanted(name: str) -> bool:
            return any(part == name if part in names else part in name for part in only)

        return [contender for contender in found if wanted(contender.name)]
    return [c for c in found if c not in ours.REFERENCE]


def by_name(name: str, device: torch.device) -> Contender:
    """The contender of this name."""
    return next(found for found in everybody(device) if found.name == name)
