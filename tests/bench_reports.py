"""Reports with made-up numbers, for tests of what is made of reports."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from benchmarks import bench, contenders, timing
from benchmarks.cases import Case
from benchmarks.roofline import Ceilings, floor

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e11, 1e10, "float32")
CASES = (
    *(Case(f"arc-{n}", 256, n, 128) for n in (1000, 10_000)),
    Case("arc-200k", 256, 200_000, 128),
    *(Case(f"pfc-{r}", 256, 1000, 128, "cosface", rate=r, state="sgd") for r in (0.1, 0.3, 1.0)),
)


def report(out_of_memory: str = "insightface-like, compiled") -> dict:
    """Ours takes 4 times the floor, everybody else 20 times; one does not fit at 200,000."""
    rows = []
    for case in CASES:
        own = {}
        for taker in contenders.contenders(case, CPU, None):
            row = own[taker.name] = bench._row(case, taker)
            reason = taker.refuses(case, CPU)
            if reason:
                row |= {"status": "not run", "reason": reason}
            elif taker.name == out_of_memory and case.classes == 200_000:
                row |= {"status": "out of memory", "reason": "OutOfMemory: it | was\nkilled"}
            else:
                least = floor(case).seconds(CEILINGS) * (4 if taker.ours else 20)
                laps = [least / 2 * (1 + turn / 100) for turn in range(5)]
                times = timing.Times({"forward": laps, "backward": laps}, [(0, 0)] * 5)
                errors = dict.fromkeys(("loss", "d_embeddings", "d_weight"), 1e-6)
                row |= {"gate": {"errors": {"start": errors}, "allowed": 1e-4}}
                row |= {"peak_bytes": case.classes * (600 if taker.ours else 6000)}
                filler = object.__new__(bench._Bench)
                filler.ceilings = CEILINGS
                filler._fill(row, case, times)
                row.pop("around")
                row |= {"disturbed": taker.ours, "disturbed_share": 0.5}
        bench._Bench._ratios(filler, own)
        rows += own.values()
    points = [{"gap": gap, "loss": 1e-6, "d_embeddings": 1e-6, "d_weight": 1e-5} for gap in (0, 5)]
    found = {
        "provenance": {
            "device": "a made-up CPU, 2 threads",
            "versions": {"torch": "2.13.0"},
            "commit": "0123456789abcdef",
            "uncommitted_changes": False,
            "date": "2026-01-02T03:04:05+00:00",
            "command": "fastmargin bench",
        },
        "schema": bench.SCHEMA,
        "ceilings": asdict(CEILINGS),
        "canary": {"seconds": [1.0], "disturbed_share": 0.25},
        "rows": rows,
        "accuracy": [{"contender": "insightface-like", "margin": "arcface", "points": points}],
    }
    return json.loads(json.dumps(found))
