"""Error against float64 by logit gap, from wrong to very confident rows."""

from __future__ import annotations

import torch

from benchmarks import data, gate
from benchmarks.cases import Case
from benchmarks.contenders import Contender

GAPS = (-20.0, -10.0, -5.0, 0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
"""Target logit minus the log-sum-exp of the others."""
SIZE = {"batch": 64, "classes": 1024, "dim": 128}


def sweep(contender: Contender, margin: str, device: torch.device) -> list[dict]:
    """Relative errors of loss and gradients at each gap that this margin can reach.

    Raises:
        Whatever the contender raises.
    """
    case = Case("accuracy", **SIZE, margin=margin)
    unit = contender.prenormalised
    weight = data.centres(case, device, unit)
    labels = data.batches(case, device, unit)[0][1]
    found, head = [], None
    for gap in GAPS:
        if head is None or margin == "adaface":  # a batch changes its statistics
            head = contender.make(case, weight.clone())
        truth = None if unit else contender.margin(margin).to(device).double()
        x = gate.at_gap(weight.double(), labels, truth, gap)
        reached = float(gate.gaps(x, weight.double(), labels, truth).median())
        if abs(reached - gap) > 1:
            continue
        errors = gate.errors(contender, case, head, weight, x.float(), labels)
        found.append({"gap": gap, **errors})
    return found
