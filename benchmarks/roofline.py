"""Ceilings of the machine, measured in the same run, and the minimal cost of a case."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cases import Case

REPEATS = 7


@dataclass(frozen=True)
class Ceilings:
    """flops: FLOP/s of a large matrix product in ``dtype``. bytes: bytes/s of a large copy, read
    plus written. The best of REPEATS."""

    flops: float
    bytes: float
    dtype: str


@dataclass(frozen=True)
class Floor:
    """flops and bytes that every implementation of a case needs in a step.

    Products: cosines, gradient of the embeddings, gradient of the centres, 2 B K D each; an
    implementation that keeps no logits needs a fourth. Bytes: the K centres of the step read and
    their gradient written; or, with an optimiser, centres and any momentum read and written once.
    """

    flops: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        """The longer of the two, as if they overlapped perfectly."""
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bytes)


def floor(case: Case) -> Floor:
    """For one process."""
    rows, columns = case.batch * case.world, case.sampled / case.world
    item = getattr(torch, case.dtype).itemsize
    touched = 4 if case.momentum else 2
    return Floor(6.0 * rows * columns * case.dim, touched * columns * case.dim * item)


def measure(device: torch.device, clock, small: bool = False) -> Ceilings:
    """Measures both ceilings, with all threads of a CPU, or in fp16 on a GPU."""
    gpu = device.type == "cuda"
    dtype = torch.float16 if gpu else torch.float32
    n = 8192 if gpu else 512 if small else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    size = (4 << 30) if gpu else (8 << 20) if small else (256 << 20)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    product = _best(lambda: torch.mm(a, b), clock)
    copy = _best(lambda: target.copy_(source), clock)
    return Ceilings(2 * n**3 / product, 2 * size / copy, str(dtype).removeprefix("torch."))


def _best(work, clock) -> float:
    found = []
    for _ in range(REPEATS + 1):
        start = clock.mark()
        work()
        found += clock.laps([start, clock.mark()])
    return min(found[1:])
