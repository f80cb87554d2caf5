"""Candidate tiles: a grid around the built-in one, without those that cannot fit the chip."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from fastmargin.backends.triton import tuned
from fastmargin.backends.triton.configs import SHARED_LIMIT, TileConfig, block_of, choose

ROWS = CLASSES = (16, 32, 64, 128)
CHUNKS = (64, 128, 256, 512)
SMALL_CHUNK = 32
"""Without an accumulator tiles can be larger, and may stream narrower chunks."""
COLUMNS = (128, 256, 512)
WARPS = (4, 8)
STAGES = (1, 2, 3, 4)
REGISTERS = 224
"""Of the 255 registers of a thread, those available to accumulators."""
TENSOR_MEMORY = 100
"""From this compute capability on accumulators need not be in registers."""


def shipped(kernel: str, d: int, precision: str, arch: int) -> TileConfig:
    """The built-in tile for variants that are not short of registers."""
    with tuned.using({}):
        return choose(kernel, d, precision, arch)


def has_accumulator(kernel: str) -> bool:
    """Whether the kernel has a second product, so that block_d matters."""
    return kernel in ("stats_pull", "centre_pass")


def grid(kernel: str, d: int, precision: str, arch: int) -> list[TileConfig]:
    """The candidates, without the built-in tile."""
    base, block = shipped(kernel, d, precision, arch), block_of(d)
    small = () if has_accumulator(kernel) else (SMALL_CHUNK,)
    chunks = _within((*small, *CHUNKS, block, base.block_k), block)
    columns = (
        _within((*COLUMNS, base.block_d), block) if has_accumulator(kernel) else [base.block_d]
    )
    axes = (
        sorted({*ROWS, base.block_b}),
        sorted({*CLASSES, base.block_c}),
        chunks,
        columns,
        sorted({*WARPS, base.num_warps}),
        sorted({*STAGES, base.num_stages}),
    )
    tiles = itertools.starmap(TileConfig, itertools.product(*axes))
    return [t for t in tiles if t != base and excess(kernel, t, d, precision, arch) is None]


def _within(sizes: Iterable[int], block: int) -> list[int]:
    return sorted({min(size, block) for size in sizes})


def excess(kernel: str, tile: TileConfig, d: int, precision: str, arch: int) -> str | None:
    """Why the tile cannot fit, or None.

    Lower bounds, not estimates: what passes may still not fit.
    """
    size = 4 if precision in ("fp32", "tf32") else 2
    chunk, waiting = min(tile.block_k, block_of(d)), max(1, tile.num_stages - 1)
    moving = tile.block_b if kernel == "centre_pass" else tile.block_c
    if chunk < d:  # rows and classes are streamed, chunk by chunk
        moving = tile.block_b + tile.block_c
    elif kernel == "topk":  # a single chunk, so the loop does not prefetch
        waiting = 1
    shared = waiting * moving * chunk * size
    limit = SHARED_LIMIT.get(arch, max(SHARED_LIMIT.values())) * 1024
    if shared > limit:
        return f"{shared // 1024} KB of shared memory at the least, there are {limit // 1024}"
    if arch >= TENSOR_MEMORY:
        return None
    cosines = tile.block_b * tile.block_c
    side = tile.block_c if kernel == "centre_pass" else tile.block_b
    held = cosines + (side * tile.block_d if has_accumulator(kernel) else 0)
    registers = held // (32 * tile.num_warps)
    if registers > REGISTERS:
        return f"{registers} registers of a thread for accumulators alone"
    return None


def distance(one: TileConfig, other: TileConfig) -> float:
    """Steps along the axes of the grid from one tile to the other."""
    steps = abs(one.num_stages - other.num_stages)
    for name in (*tuned.BLOCKS, "num_warps"):
        steps += abs(math.log2(getattr(one, name) / getattr(other, name)))
    return steps
