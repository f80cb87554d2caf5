"""What a head needs of a GPU's memory, before anything is allocated: ``fastmargin plan``.

Counted, not measured: tensors by their shapes, and the buffers that the Triton passes allocate.
Not counted: the backbone, what CUDA and the collectives keep for themselves, and what the allocator
loses to fragmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch

from fastmargin.optim.row_chunks import CHUNK_BYTES

STAGED_BYTES = 256 << 20
"""Unit rows of the operand type that a pass holds at a time (``backends/triton/centres.py``)."""

TILE_ROWS, PROCESSORS = 128, 132
"""Partial sums of the forward pass: so many rows for each multiprocessor (here of an H100)."""

TEMPORARIES = 7
"""Chunks of rows that are alive together in an optimiser's step outside the kernels."""

OPTIMISERS = {"sgd": 0, "momentum": 1, "adamw": 2}
"""Numbers that an optimiser keeps for every number of the centres."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    centres: class centres. state: of the optimiser. gradient: of the centres. working: what a step
    allocates besides and gives back.
    """

    centres: int
    state: int
    gradient: int
    working: int

    @property
    def total(self) -> int:
        """All of it: the peak of a step."""
        return self.centres + self.state + self.gradient + self.working


@dataclass(frozen=True)
class Problem:
    """classes: C, of all processes. embedding_size: D. batch: rows of each process. processes: that
    the classes are sharded over. sample_rate: share of the classes that take part in a step."""

    classes: int
    embedding_size: int = 512
    batch: int = 256
    processes: int = 1
    sample_rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("classes", "embedding_size", "batch", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {self.sample_rate}")

    @property
    def rows(self) -> int:
        """Rows that every process sees: those of all."""
        return self.batch * self.processes

    @property
    def local(self) -> int:
        """Classes of the process with most of them."""
        return -(-self.classes // self.processes)

    @property
    def columns(self) -> int:
        """Of those, the classes that take part in a step."""
        if self.sample_rate == 1:
            return self.local
        return min(self.local, max(int(self.sample_rate * self.local), self.rows))


def plain_memory(problem: Problem, optimiser: str = "momentum") -> Memory:
    """Of the same head in PyTorch's own operations, in float32: at least this.

    The largest tensors that are alive together: cosines, softmax and its gradient (B, C);
    normalised centres, their gradient and that of the centres (C, D); with sampled classes also a
    copy of their rows. ``docs/benchmarks.md`` has measured peaks.
    """
    rows = 4 * problem.embedding_size
    sampled = problem.sample_rate < 1
    working = (3 * 4 * problem.rows + (4 if sampled else 2) * rows) * problem.columns
    return Memory(
        rows * problem.local,
        OPTIMISERS[optimiser] * rows * problem.local,
        rows * problem.local,
        working,
    )


def estimate_memory(
    problem: Problem,
    dtype: torch.dtype = torch.float32,
    optimiser: str = "momentum",
    momentum_dtype: torch.dtype = torch.float32,
    fused: bool = False,
    sparse_grad: bool = False,
) -> Memory:
    """Of a :class:`fastmargin.MarginHead` on the Triton backend with 16-bit operands.

    Args:
        problem: see :class:`Problem`.
        dtype: of the centres.
        optimiser: "sgd" (no momentum), "momentum", or "adamw": :class:`fastmargin.optim.RowSGD` and
            :class:`fastmargin.optim.RowAdamW`.
        momentum_dtype: of what the optimiser keeps.
        fused: the step is taken in the pass over the centres; SGD only.
        sparse_grad: the gradient holds only the rows that take part; with ``sample_rate < 1``.

    Raises:
        ValueError: fused with AdamW, or an unknown optimiser.
    """
    if optimiser not in OPTIMISERS:
        raise ValueError(f"optimiser must be one of {tuple(OPTIMISERS)}, got {optimiser!r}")
    if fused and optimiser == "adamw":
        raise ValueError("fused: only SGD is taken in the pass over the centres")
    d, local, columns = problem.embedding_size, problem.local, problem.columns
    sampled = problem.sample_rate < 1
    state = OPTIMISERS[optimiser] * momentum_dtype.itemsize * d * local + 4 * local  # last_step
    gradient = dtype.itemsize * d * local
    if fused:
        gradient = 0
    elif sampled and sparse_grad:
        gradient = (dtype.itemsize * d + 8) * columns
    # unit rows in fp32 and as operands, negative centres' mean, gradient; sharded: the raw ones too
    rows = (4 + 2 + 4 + 4 + (4 if problem.processes > 1 else 0)) * d * problem.rows
    partial = 4 * d * max(TILE_ROWS * PROCESSORS, problem.rows)
    staged = (2 * d + 4) * min(columns, STAGED_BYTES // (2 * d))  # with their inverse norms
    drawn = local + 24 * columns if sampled else 0
    spread = dtype.itemsize * d * columns if sampled and not fused else 0
    # rows that were not drawn have momentum and decay, which the kernels leave to the optimiser
    stepped = 0 if fused and not sampled else TEMPORARIES * min(CHUNK_BYTES, 4 * d * local)
    working = rows + partial + staged + drawn + max(spread, stepped)
    return Memory(dtype.itemsize * d * local, state, gradient, working)


@dataclass(frozen=True)
class Setup:
    """A way to train the head: what it is called, how it is written, and its memory."""

    name: str
    code: str
    memory: Memory


def setups(problem: Problem) -> Iterator[Setup]:
    """The plain head, then ours, from the most usual to the smallest."""
    sampled = problem.sample_rate < 1
    shape = f"{problem.embedding_size}, {problem.classes}, margin"
    shape += f", sample_rate={problem.sample_rate!r}" if sampled else ""
    shape += ', group="world"' if problem.processes > 1 else ""

    def setup(name: str, options: str = "", step: str = "", **chosen) -> Setup:
        head = f"head = fm.MarginHead({shape}{options})"
        kind = "RowAdamW" if chosen.get("optimiser") == "adamw" else "RowSGD"
        code = f"{head}\noptimiser = fm.optim.{kind}(head.parameters(), lr=lr{step})"
        return Setup(name, code, estimate_memory(problem, **chosen))

    momentum, half = ", momentum=0.9", ", dtype=torch.float16"
    stochastic = ", fused=True, stochastic_rounding=True"
    low = {"fused": True, "dtype": torch.float16, "momentum_dtype": torch.bfloat16}
    yield Setup("plain PyTorch, SGD with momentum", "", plain_memory(problem))
    yield setup("RowSGD with momentum", step=momentum)
    yield setup("RowAdamW", optimiser="adamw")
    if sampled:
        yield setup("RowSGD, sparse gradient", ", sparse_grad=True", momentum, sparse_grad=True)
    yield setup("RowSGD, fused", step=momentum + ", fused=True", fused=True)
    bfloat = momentum + stochastic + ", momentum_dtype=torch.bfloat16"
    yield setup("RowSGD, fused, centres and momentum in 16 bits", half, bfloat, **low)
    name = "RowSGD, fused, centres in 16 bits, no momentum"
    yield setup(name, half, stochastic, **low, optimiser="sgd")


def most_classes(problem: Problem, which: int, limit: int) -> int:
    """How many classes setup number ``which`` of such a problem has within ``limit`` bytes."""

    def fits(classes: int) -> bool:
        return list(setups(replace(problem, classes=classes)))[which].memory.total <= limit

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def report(problem: Problem, limit: int | None = None) -> dict:
    """What ``fastmargin plan --json`` prints; sizes in bytes.

    Args:
        limit: memory of one process; adds whether a setup ``fits`` and its ``most_classes``.
    """
    found = []
    for which, setup in enumerate(setups(problem)):
        entry = asdict(setup)
        entry["memory"]["total"] = setup.memory.total
        if limit is not None:
            entry["fits"] = setup.memory.total <= limit
            entry["most_classes"] = most_classes(problem, which, limit)
        found.append(entry)
    return {"problem": asdict(problem), "limit": limit, "setups": found}


def print_report(console, found: dict) -> None:
    """The report as a table on a rich console, and how the first setup that fits is written."""
    from rich.table import Table

    problem, limit = found["problem"], found["limit"]
    title = f"{problem['classes']:,} classes of {problem['embedding_size']} dimensions, "
    title += f"{problem['batch']:,} rows a process, {problem['processes']:,} of them: GB of each"
    parts = ("centres", "state", "gradient", "working", "total")
    table = Table("", title=title)
    for head in parts if limit is None else (*parts, "most classes"):
        table.add_column(head, justify="right")
    for setup in found["setups"]:
        sizes = [_gigabytes(setup["memory"][part]) for part in parts]
        more = [] if limit is None else [f"{setup['most_classes']:,}"]
        style = "red" if setup.get("fits") is False else None
        table.add_row(setup["name"], *sizes, *more, style=style)
    console.print(table)
    if limit is not None:
        fitting = [setup for setup in found["setups"][1:] if setup["fits"]]
        if fitting:
            console.print(f"Fits in {_gigabytes(limit)} GB:\n\n{fitting[0]['code']}", markup=False)
        else:
            console.print(
                f"Nothing fits in {_gigabytes(limit)} GB: shard over more --processes, or take a "
                "smaller --sample-rate."
            )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3g}" if size < 1e12 else f"{size / 1e9:,.0f}"
