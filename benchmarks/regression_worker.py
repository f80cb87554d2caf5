"""Worker that runs one version of fastmargin; started by path, to import only from its tree.

    python benchmarks/regression_worker.py TREE THREADS

Reads lines of JSON: ``{"case": {...}}`` makes a head, ``{"steps": n}`` runs n steps and returns
their seconds. Answers are lines of JSON, ``{"error": ...}`` on failure.
"""

from __future__ import annotations

import json
import sys
import time

TREE, THREADS = sys.argv[1], int(sys.argv[2])
sys.path[0] = TREE  # instead of the folder of this file

import torch  # noqa: E402

import fastmargin as fm  # noqa: E402

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
MARGINS = {"arcface": fm.ArcFace, "cosface": fm.CosFace, "adaface": fm.AdaFace}


class Work:
    """A head and its batches."""

    def __init__(self, batch, classes, dim, margin, rate, state, **_) -> None:
        torch.manual_seed(0)
        sampled = {} if rate == 1 else {"sample_rate": rate, "sparse_grad": True}
        self.head = fm.MarginHead(dim, classes, MARGINS[margin](), backend="cpu", **sampled)
        kind = torch.optim.SGD if rate == 1 else fm.optim.RowSGD
        self.optimiser = kind(self.head.parameters(), **SGD) if state == "sgd" else None
        self.batches = [
            (torch.randn(batch, dim).requires_grad_(), torch.randint(0, classes, (batch,)))
            for _ in range(4)
        ]
        self.turn = 0

    def step(self) -> float:
        """Runs one step; returns its seconds."""
        x, labels = self.batches[self.turn % len(self.batches)]
        self.turn += 1
        x.grad = self.head.weight.grad = None
        start = time.perf_counter()
        self.head(x, labels).backward()
        if self.optimiser is not None:
            self.optimiser.step()
        return time.perf_counter() - start


def answer(line: dict, work: Work | None) -> tuple[dict, Work | None]:
    if "case" in line:
        return {}, Work(**line["case"])
    return {"seconds": [work.step() for _ in range(line["steps"])]}, work


def main() -> None:
    torch.set_num_threads(THREADS)
    print(json.dumps({"file": fm.__file__}), flush=True)
    work = None
    for line in sys.stdin:
        try:
            found, work = answer(json.loads(line), work)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
