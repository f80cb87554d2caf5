"""The contenders: fastmargin's backends and their peers."""

from __future__ import annotations

import torch

from benchmarks.cases import Case
from benchmarks.contenders import heads, libraries, ours
from benchmarks.contenders.base import ALLOWED, Contender, Head

__all__ = ["ALLOWED", "BASELINE", "Contender", "Head", "by_name", "contenders", "everybody"]

BASELINE = ("insightface-like", "AdaFace-like")
"""Others are compared with the first of these that takes part in a case."""


def everybody(device: torch.device) -> tuple[Contender, ...]:
    """All contenders for a device, ours first; the reference takes part only if named."""
    if device.type == "cuda":
        # on a GPU the compiled head is measured under autocast only
        plain = [head for head in heads.FLOAT32 if head.name != "insightface-like, compiled"]
        return (*ours.GPU, *plain, *heads.AMP, *libraries.CONTENDERS, *ours.REFERENCE)
    return (*ours.CPU, *heads.FLOAT32, *libraries.CONTENDERS, *ours.REFERENCE)


def contenders(case: Case, device: torch.device, only: list[str] | None) -> list[Contender]:
    """The contenders of a case.

    ``only`` keeps those whose names contain one of these; a full name selects that one only.
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
