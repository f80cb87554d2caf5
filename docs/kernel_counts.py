"""Counts of docs/kernels.md from the tiles that ship: ``python docs/kernel_counts.py``.

Arithmetic on shapes only. Nothing here was measured, and nothing is a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastmargin.backends.triton import tuned
from fastmargin.backends.triton.configs import TileConfig, choose, split_classes

SHAPE = (1024, 1_000_000, 512)
PROCESSORS = 132
ARCH = 90
OPERAND = 2  # bytes of fp16


@dataclass(frozen=True)
class Count:
    """Of one pass: FLOPs over BCD; bytes that multiprocessors load and store, in GB."""

    name: str
    tile: TileConfig
    flops: float
    weight: float
    rows: float
    stored: float


def _shape_of(tile: TileConfig, d: int) -> tuple[int, bool, int]:
    """Programs that share D, whether a tile is loaded whole, and once for both products."""
    columns = math.ceil(d / tile.block_d)
    whole = tile.block_k >= d
    return columns, whole, int(not (whole and columns == 1))


def forward(b: int, c: int, d: int, tile: TileConfig, weight_bytes: int) -> Count:
    """stats_forward with the pull."""
    columns, whole, again = _shape_of(tile, d)
    row_blocks = math.ceil(b / tile.block_b)
    splits, _ = split_classes(row_blocks * columns, math.ceil(c / tile.block_c), PROCESSORS)
    loads_of_x = splits if whole else math.ceil(c / tile.block_c)
    return Count(
        "forward",
        tile,
        2 * columns + 2,
        row_blocks * (columns + again) * c * d * weight_bytes / 1e9,
        loads_of_x * columns * b * d * OPERAND / 1e9,
        splits * b * d * 4 / 1e9,
    )


def centre_pass(b: int, c: int, d: int, tile: TileConfig, weight_bytes: int) -> Count:
    """The pass over the batch with a tile of centres at a time."""
    columns, whole, again = _shape_of(tile, d)
    class_blocks = math.ceil(c / tile.block_c)
    # for the norms, for the cosines, and once more for the projection
    loads_of_w = columns + columns * (1 if whole else math.ceil(b / tile.block_b)) + 1
    return Count(
        "centre pass",
        tile,
        2 * columns + 2,
        loads_of_w * c * d * weight_bytes / 1e9,
        class_blocks * (columns + again) * b * d * OPERAND / 1e9,
        c * d * weight_bytes / 1e9,
    )


def table() -> list[str]:
    """The lines of the table."""
    b, c, d = SHAPE
    lines = [
        "| pass | centres | tile (rows, classes, K, D) | FLOP | of the centres | of the rows |"
        " stored |",
        "|---|---|---|---|---|---|---|",
    ]
    for weight, size in (("fp32", 4), ("fp16", 2)):
        for count_of, kernel in ((forward, "stats_pull"), (centre_pass, "centre_pass")):
            tile = choose(kernel, d, "fp16", weight == "fp16", True, False, ARCH)
            count = count_of(b, c, d, tile, size)
            shape = tile.block_b, tile.block_c, tile.block_k, tile.block_d
            lines.append(
                f"| {count.name} | {weight} | {shape} | {count.flops:g} BCD |"
                f" {count.weight:.1f} GB | {count.rows:.2f} GB | {count.stored:.2f} GB |"
            )
        lines.append(
            f"| floor, each | {weight} | | 4 BCD | {c * d * size / 1e9:.1f} GB |"
            f" {b * d * OPERAND / 1e9:.3f} GB | |"
        )
    return lines


if __name__ == "__main__":
    with tuned.using({}):
        print("\n".join(table()))
