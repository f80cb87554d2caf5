"""A model, not a measurement: bytes, time and memory of a head whose classes GPUs share out.

Prints the tables of the scaling section of docs/distributed.md, as Markdown. Every assumption is a
constant below; replace them by measurements where there are any.

    python benchmarks/scaling_model.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

# one H200; rates are what large operations get, not what the data sheet says
FLOPS = 600e12  # matrix products of 16-bit operands, inner dimension 512
HBM = 4.3e12  # bytes/s
MEMORY = 141e9  # bytes
# links of a GPU, bytes/s in each direction, and seconds a hop
NODE = 8
NVLINK, NVLINK_HOP = 350e9, 2e-6  # of 450e9
INFINIBAND, INFINIBAND_HOP = 40e9, 5e-6  # of 400 Gb/s = 50e9

DIM = 512
ROWS = 128  # of each GPU in a step
EMBEDDING = 2  # bytes of a number that is gathered: 16 bits, as autocast makes it
FLOAT, DOUBLE, LABEL = 4, 8, 8
FLOPS_PER_PAIR = 8 * DIM  # of a row and a class: cosine and pull forward, cosine and dW backward
ROW_TRAFFIC = 62 * DIM  # bytes a gathered row reads and writes outside the passes, as the code is
ROW_WORKSPACE = (EMBEDDING + 6 * FLOAT) * DIM  # bytes a gathered row takes at most, as the code is
OPTIMISER_WORKSPACE = 6 * 32e6  # RowSGD
LIVE_LOGITS = 4 * FLOAT  # bytes of a (row, class) pair at the peak of an eager head, traced


@dataclass(frozen=True)
class Exchange:
    """What a GPU receives in one collective, over each kind of link."""

    nvlink: float
    infiniband: float
    hops: float

    @property
    def seconds(self) -> float:
        """One kind of link after the other."""
        return self.hops + self.nvlink / NVLINK + self.infiniband / INFINIBAND


def gather(gpus: int, own: float) -> Exchange:
    """All-gather of ``own`` bytes of each, or reduce-scatter that leaves each with ``own``.

    Among the GPUs of one place in all nodes first, then inside the node.
    """
    inside, nodes = min(gpus, NODE), max(1, gpus // NODE)
    hops = (inside - 1) * NVLINK_HOP + (nodes - 1) * INFINIBAND_HOP
    return Exchange((inside - 1) * nodes * own, (nodes - 1) * own, hops)


def total(gpus: int, size: float) -> Exchange:
    """All-reduce of ``size`` bytes: scattered in the node, trees over the nodes, gathered."""
    inside, nodes = min(gpus, NODE), max(1, gpus // NODE)
    hops = 2 * (inside - 1) * NVLINK_HOP + 2 * math.log2(nodes) * INFINIBAND_HOP
    return Exchange(2 * (inside - 1) / inside * size, 2 * (nodes - 1) / nodes * size / inside, hops)


def with_embeddings(labels: Exchange) -> Exchange:
    """Bytes that travel in an exchange which is under way anyhow."""
    return replace(labels, hops=0)


def exchanges(gpus: int) -> dict[str, Exchange]:
    """The collectives of a step of a head whose classes all GPUs share out."""
    rows = gpus * ROWS
    return {
        "embeddings, gathered": gather(gpus, ROWS * DIM * EMBEDDING),
        "labels, in the same exchange": with_embeddings(gather(gpus, ROWS * LABEL)),
        "(B, 2) float64, added": total(gpus, rows * 2 * DOUBLE),
        "(B,) float32, maximum": total(gpus, rows * FLOAT),
        "dX float32, added and scattered": gather(gpus, ROWS * DIM * FLOAT),
    }


def passes(rows: int, centres: float) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass over the centres of one GPU."""
    flops = rows * centres * FLOPS_PER_PAIR / 2
    read = centres * DIM * FLOAT
    return max(flops / FLOPS, read / HBM), max(flops / FLOPS, 2 * read / HBM)


def flat(gpus: int, classes: float, rate: float) -> tuple[float, float]:
    """Seconds of a step whose classes all GPUs share out, and of its useful part.

    Useful: the passes, and what the GPU's own rows need besides.
    """
    forward, backward = passes(gpus * ROWS, classes * rate / gpus)
    by_row = ROWS * ROW_TRAFFIC / HBM
    *before, last = (exchange.seconds for exchange in exchanges(gpus).values())
    # the scatter is under way while the backward pass runs
    whole = sum(before) + gpus * by_row + forward + max(backward, last)
    return whole, by_row + forward + backward


def meshed(gpus: int, classes: float, rate: float) -> float:
    """Seconds of a step whose classes are shared out in each node and repeated over the nodes."""
    whole, _ = flat(NODE, classes, rate)
    nodes = gpus // NODE
    gradient = classes * rate / NODE * DIM * FLOAT
    hops = 2 * math.log2(nodes) * INFINIBAND_HOP
    return whole + hops + 2 * (nodes - 1) / nodes * gradient / INFINIBAND


def break_even(gpus: int) -> float:
    """Classes that take part at which a mesh is as fast as sharing out over all GPUs."""
    low, high = 1.0, 1e9
    for _ in range(100):
        classes = math.sqrt(low * high)
        mesh_wins = meshed(gpus, classes, 1.0) < flat(gpus, classes, 1.0)[0]
        low, high = (classes, high) if mesh_wins else (low, classes)
    return low


def memory(gpus: int, classes: float, rate: float) -> tuple[float, float, float]:
    """Bytes on a GPU: centres and optimiser, their gradient, workspace."""
    here = classes / gpus
    state = here * 2 * DIM * FLOAT
    gradient = here * rate * DIM * FLOAT
    if rate < 1:
        state += here * (4 + 1)  # steps missed, and the sampler's mark
        gradient += here * rate * 8
    return state, gradient, gpus * ROWS * ROW_WORKSPACE + OPTIMISER_WORKSPACE


# ---- tables ----


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---" for _ in head], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(classes: float) -> str:
    return f"{classes / 1e6:g} million" if classes < 1e9 else f"{classes / 1e9:g} billion"


def size(count: float) -> str:
    """Bytes to two digits."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            amount = count / unit
            return f"{amount:.1f} {name}" if amount < 10 else f"{amount:.0f} {name}"
    return f"{count:.0f}"


GPUS = (8, 64, 256, 1024)
CLASSES = (1e6, 1e7, 1e8, 1e9)
RATES = (1.0, 0.1)


def bytes_table() -> str:
    """Received by each GPU: NVLink + InfiniBand."""
    names = list(exchanges(8))

    def cell(name: str, gpus: int) -> str:
        exchange = exchanges(gpus)[name]
        return f"{size(exchange.nvlink)} + {size(exchange.infiniband)}"

    rows = [[name, *(cell(name, gpus) for gpus in GPUS)] for name in names]
    seconds = [sum(e.seconds for e in exchanges(gpus).values()) for gpus in GPUS]
    rows.append(["time of all, ms", *(f"{1e3 * s:.2f}" for s in seconds)])
    return table(["exchange", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


def time_table() -> str:
    rows = []
    for classes in CLASSES:
        for rate in RATES:
            cells = []
            for gpus in GPUS:
                whole, useful = flat(gpus, classes, rate)
                fits = sum(memory(gpus, classes, rate)) <= MEMORY
                cells.append(f"{1e3 * whole:.3g} ms, {useful / whole:.0%}" if fits else "memory")
            rows.append([number(classes), f"{rate:g}", *cells])
    return table(["identities", "sampled", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


def mesh_table() -> str:
    rows = []
    for classes, rate in ((1e5, 1.0), (1e6, 0.1), (1e6, 1.0), (1e7, 1.0)):
        cells = [
            f"{1e3 * seconds:.3g} ms"
            for gpus in (64, 1024)
            for seconds in (flat(gpus, classes, rate)[0], meshed(gpus, classes, rate))
        ]
        rows.append([number(classes), f"{rate:g}", *cells])
    head = ["64 GPUs", "8 nodes x 8", "1024 GPUs", "128 nodes x 8"]
    few, many = (float(f"{break_even(gpus):.2g}") for gpus in (64, 1024))
    equal = (
        f"Both take as long at {few:,.0f} classes that take part on 64 GPUs, and at "
        f"{many:,.0f} on 1024."
    )
    return f"{table(['identities', 'sampled', *head], rows)}\n\n{equal}"


def memory_table() -> str:
    rows = []
    for classes, gpus, rate in (
        (1e6, 8, 1.0),
        (1e7, 8, 1.0),
        (1e8, 64, 1.0),
        (1e8, 64, 0.1),
        (1e9, 256, 0.1),
        (1e9, 1024, 0.1),
    ):
        parts = memory(gpus, classes, rate)
        alone = sum(memory(1, classes, rate))
        logits = LIVE_LOGITS * ROWS * classes * rate
        cells = [*parts, sum(parts), alone, logits]
        rows.append([number(classes), f"{gpus}", f"{rate:g}", *map(size, cells)])
    head = ["W, momentum", "gradient", "workspace", "sum", "all classes on each", "eager logits"]
    return table(["identities", "GPUs", "sampled", *head], rows)


def tables() -> dict[str, str]:
    """By the name of the place in the document."""
    return {
        "bytes": bytes_table(),
        "time": time_table(),
        "mesh": mesh_table(),
        "memory": memory_table(),
    }


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
