"""A model, not a measurement: bytes, time and memory of a head with classes sharded over GPUs.

Prints the tables of the scaling section of docs/distributed.md, as Markdown. All assumptions are
constants below; replace them by measurements if you have any.

    python benchmarks/scaling_model.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

# one H200; rates that large operations achieve, not those of the data sheet
FLOPS = 600e12  # matrix products of 16-bit operands, inner dimension 512
HBM = 4.3e12  # bytes/s
MEMORY = 141e9  # bytes
# links of a GPU, bytes/s in each direction, and seconds per hop
NODE = 8
NVLINK, NVLINK_HOP = 350e9, 2e-6  # of 450e9
INFINIBAND, INFINIBAND_HOP = 40e9, 5e-6  # of 400 Gb/s = 50e9

DIM = 512
ROWS = 128  # per GPU and step
EMBEDDING = 2  # bytes per gathered number: 16 bits, as with autocast
FLOAT, DOUBLE, LABEL = 4, 8, 8
FLOPS_PER_PAIR = 8 * DIM  # per row and class: cosine and pull forward, cosine and dW backward
ROW_TRAFFIC = 62 * DIM  # bytes read and written per gathered row outside the passes, in the code
ROW_WORKSPACE = (EMBEDDING + 6 * FLOAT) * DIM  # peak bytes per gathered row, in the code
OPTIMISER_WORKSPACE = 6 * 32e6  # RowSGD
LIVE_LOGITS = 4 * FLOAT  # bytes per (row, class) pair at the peak of an eager head, traced


@dataclass(frozen=True)
class Exchange:
    """Bytes a GPU receives in one collective, over each kind of link."""

    nvlink: float
    infiniband: float
    hops: float

    @property
    def seconds(self) -> float:
        """Time, using one kind of link after the other."""
        return self.hops + self.nvlink / NVLINK + self.infiniband / INFINIBAND


def gather(gpus: int, own: float) -> Exchange:
    """All-gather of ``own`` bytes from each GPU, or reduce-scatter to ``own`` bytes each.

    First between the GPUs with the same index in all nodes, then within the node.
    """
    inside, nodes = min(gpus, NODE), max(1, gpus // NODE)
    hops = (inside - 1) * NVLINK_HOP + (nodes - 1) * INFINIBAND_HOP
    return Exchange((inside - 1) * nodes * own, (nodes - 1) * own, hops)


def total(gpus: int, size: float) -> Exchange:
    """All-reduce of ``size`` bytes: reduce-scatter in the node, trees over nodes, all-gather."""
    inside, nodes = min(gpus, NODE), max(1, gpus // NODE)
    hops = 2 * (inside - 1) * NVLINK_HOP + 2 * math.log2(nodes) * INFINIBAND_HOP
    return Exchange(2 * (inside - 1) / inside * size, 2 * (nodes - 1) / nodes * size / inside, hops)


def with_embeddings(labels: Exchange) -> Exchange:
    """Bytes that travel along in another exchange, without further hops."""
    return replace(labels, hops=0)


def exchanges(gpus: int) -> dict[str, Exchange]:
    """The collectives of a step with the classes sharded over all GPUs."""
    rows = gpus * ROWS
    return {
        "embeddings, all-gathered": gather(gpus, ROWS * DIM * EMBEDDING),
        "labels, in the same all-gather": with_embeddings(gather(gpus, ROWS * LABEL)),
        "(B, 2) float64, all-reduced": total(gpus, rows * 2 * DOUBLE),
        "(B,) float32, maximum": total(gpus, rows * FLOAT),
        "dX float32, reduce-scattered": gather(gpus, ROWS * DIM * FLOAT),
    }


def passes(rows: int, centres: float) -> tuple[float, float]:
    """Seconds of the forward and the backward pass over the centres of one GPU."""
    flops = rows * centres * FLOPS_PER_PAIR / 2
    read = centres * DIM * FLOAT
    return max(flops / FLOPS, read / HBM), max(flops / FLOPS, 2 * read / HBM)


def flat(gpus: int, classes: float, rate: float) -> tuple[float, float]:
    """Seconds of a step with the classes sharded over all GPUs, and of its useful part.

    Useful: the passes, and the other work for the GPU's own rows.
    """
    forward, backward = passes(gpus * ROWS, classes * rate / gpus)
    by_row = ROWS * ROW_TRAFFIC / HBM
    *before, last = (exchange.seconds for exchange in exchanges(gpus).values())
    # the reduce-scatter overlaps with the backward pass
    whole = sum(before) + gpus * by_row + forward + max(backward, last)
    return whole, by_row + forward + backward


def meshed(gpus: int, classes: float, rate: float) -> float:
    """Seconds of a step with classes sharded within each node and replicated over the nodes."""
    whole, _ = flat(NODE, classes, rate)
    nodes = gpus // NODE
    gradient = classes * rate / NODE * DIM * FLOAT
    hops = 2 * math.log2(nodes) * INFINIBAND_HOP
    return whole + hops + 2 * (nodes - 1) / nodes * gradient / INFINIBAND


def break_even(gpus: int) -> float:
    """Number of classes per step at which a mesh is as fast as sharding over all GPUs."""
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
    rows.append(["total time, ms", *(f"{1e3 * s:.2f}" for s in seconds)])
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
        f"Both take equally long with {few:,.0f} classes per step on 64 GPUs, and with "
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
    """The tables by the name of their block in the document."""
    return {
        "bytes": bytes_table(),
        "time": time_table(),
        "mesh": mesh_table(),
        "memory": memory_table(),
    }


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
