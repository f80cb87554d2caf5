"""Counts of docs/kernels.md from the tiles that ship: ``python docs/kernel_counts.py``.

``--write`` puts them into the page, between its marks. Arithmetic on shapes only. Nothing here was
measured, and nothing is a time.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmargin.backends.triton import centres, tuned
from fastmargin.backends.triton.configs import TileConfig, choose, operand_width, split_classes

PAGE = Path(__file__).parent / "kernels.md"
SHAPE = (1024, 1_000_000, 512)
CLASSES = (100_000, 1_000_000, 10_000_000)
PROCESSORS = 132
ARCH = 90
OPERAND = 2  # bytes of fp16
STATE_OF_SPLIT = 12  # bytes per row: sum, shift, maximum
STATE_OF_ROW = 16  # bytes per row: level, code, code of the own centre, upstream gradient


@dataclass(frozen=True)
class Count:
    """Of one part of a step: FLOPs over BCD; bytes that multiprocessors load and store, in GB."""

    name: str
    tile: TileConfig | None
    flops: float
    centres: float
    rows: float
    stored: float

    def intensity(self, b: int, c: int, d: int) -> float:
        """FLOP per byte."""
        return self.flops * b * c * d / (self.centres + self.rows + self.stored) / 1e9


@dataclass(frozen=True)
class Stored:
    """How centres lie: bytes of a number."""

    name: str
    size: int


STORED = (Stored("fp32", 4), Stored("fp16", 2))


def row_bytes(d: int) -> int:
    """Of a row in the operand type."""
    return operand_width(d, torch.float16) * OPERAND


def pieces(c: int, d: int) -> list[int]:
    """Columns of each piece of a pass."""
    step = centres.columns_at_a_time(row_bytes(d))
    return [min(step, c - start) for start in range(0, c, step)]


def launches(count: int) -> int:
    """Of a step whose passes have so many pieces, all that an eager step launches."""
    prologue, finish, margin_loss, ones_like, rows_backward = (1,) * 5
    forward = prologue + 2 * count + (count - 1) + finish + margin_loss
    return forward + ones_like + rows_backward + (1 if count == 1 else 2 * count)


def _shape_of(tile: TileConfig, d: int) -> tuple[int, bool, int]:
    """Programs that share D, whether a tile is loaded whole, and once for both products."""
    columns = math.ceil(d / tile.block_d)
    whole = tile.block_k >= d
    return columns, whole, int(not (whole and columns == 1))


def stage(c: int, d: int, stored: Stored) -> Count:
    """stage, as often as a step does it: forward, and again backward if there are more pieces."""
    times = 1 if len(pieces(c, d)) == 1 else 2
    name = "`stage`" if times == 1 else "`stage`, forward and backward"
    read, written = 2 * c * d * stored.size, c * (row_bytes(d) + 4)
    return Count(name, None, 0, times * read / 1e9, 0, times * written / 1e9)


def forward(b: int, c: int, d: int, tile: TileConfig) -> Count:
    """stats_forward with the pull."""
    columns, whole, again = _shape_of(tile, d)
    row_blocks = math.ceil(b / tile.block_b)
    parts = [math.ceil(n / tile.block_c) for n in pieces(c, d)]
    splits = split_classes(row_blocks * columns, parts[0], PROCESSORS)
    loads_of_x = splits * len(parts) if whole else sum(parts)
    return Count(
        "`stats_forward`",
        tile,
        2 * columns + 2,
        row_blocks * (columns + again) * c * row_bytes(d) / 1e9,
        loads_of_x * columns * b * row_bytes(d) / 1e9,
        len(parts) * splits * b * (4 * d + STATE_OF_SPLIT) / 1e9,
    )


def merges(b: int, c: int, d: int, tile: TileConfig, stored: Stored) -> Count:
    """stats_merge of all pieces but the last, then stats_finish."""
    parts = [math.ceil(n / tile.block_c) for n in pieces(c, d)]
    row_programs = math.ceil(b / tile.block_b) * math.ceil(d / tile.block_d)
    splits = split_classes(row_programs, parts[0], PROCESSORS)
    set_of_sums = b * (4 * d + STATE_OF_SPLIT) / 1e9
    # after the first piece there is also the sum of those before
    read = len(parts) * splits + (len(parts) - 1)
    name = "`stats_finish`" if len(parts) == 1 else "`stats_merge`, `stats_finish`"
    own, unit_rows = b * d * stored.size / 1e9, 4 * b * d / 1e9
    return Count(name, None, 0, own, read * set_of_sums + unit_rows, len(parts) * set_of_sums)


def centre_pass(b: int, c: int, d: int, tile: TileConfig, stored: Stored) -> Count:
    """The pass over the batch with a tile of centres at a time."""
    columns, whole, again = _shape_of(tile, d)
    class_blocks = sum(math.ceil(n / tile.block_c) for n in pieces(c, d))
    loads_of_w = columns * (1 if whole else math.ceil(b / tile.block_b))
    # at the end: for the part along the centre, if rows are whole, and for the result
    loads_of_w += 2 if columns == 1 else 1
    inverses = 4 * c * columns
    return Count(
        "`centre_pass`",
        tile,
        2 * columns + 2,
        (loads_of_w * c * row_bytes(d) + inverses) / 1e9,
        class_blocks * ((columns + again) * b * row_bytes(d) + columns * b * STATE_OF_ROW) / 1e9,
        c * d * stored.size / 1e9,
    )


@dataclass(frozen=True)
class Products:
    """What the matrix instructions of one tile do on sm_90, as Triton 3.7 lays them out.

    first, second: bytes read from shared memory. done: FLOPs of the instructions. asked: those of
    the two products.
    """

    first: int
    second: int
    done: int
    asked: int


def _instructions(
    m: int, n: int, k: int, groups_of_m: int, groups: int, width: int
) -> tuple[int, int]:
    """How many m64 n``width`` k16 all warpgroups issue for (m, k) @ (k, n), and FLOPs of one."""
    of_m = max(1, m // (64 * groups_of_m))
    of_n = max(1, n // (groups // groups_of_m) // width)
    return groups * of_m * of_n * (k // 16), 2 * 64 * width * 16


def products(stationary: int, streamed: int, tile: TileConfig, d: int) -> Products | None:
    """Of (stationary, K) @ (K, streamed) over all of D, then (stationary, streamed) @ (., BLOCK_D).

    Warpgroups share the rows of a tile as far as there are 64 for each, then its columns. An
    instruction reads its left operand (64, 16) from shared memory, or has it in registers, and its
    right one (16, width).

    Args:
        stationary: rows of the tile that a program keeps; a multiple of 64, or None comes back.
        streamed: rows of the tiles that pass by.
    """
    groups = tile.num_warps // 4
    if stationary % 64 or not groups:
        return None
    of_rows = min(groups, stationary // 64)
    share = max(1, tile.num_warps // (stationary // 16))
    width, wide = (min(256, size // share) for size in (streamed, tile.block_d))
    depth = math.ceil(d / tile.block_k) * tile.block_k
    one = _instructions(stationary, streamed, depth, of_rows, groups, width)
    two = _instructions(stationary, tile.block_d, streamed, of_rows, groups, wide)
    return Products(
        one[0] * (64 + width) * 16 * OPERAND,
        two[0] * wide * 16 * OPERAND,
        one[0] * one[1] + two[0] * two[1],
        2 * stationary * streamed * (depth + tile.block_d),
    )


def tile_of(kernel: str) -> TileConfig:
    """What ships for a plain training step: all classes, no rule for hard negatives."""
    return choose(kernel, SHAPE[2], "fp16", ARCH)


def _shape(tile: TileConfig | None) -> str:
    return "" if tile is None else str((tile.block_b, tile.block_c, tile.block_k, tile.block_d))


def work() -> list[str]:
    """Table of FLOPs and bytes."""
    b, c, d = SHAPE
    lines = [
        "| launch | centres | tile (rows, classes, K, D) | FLOP | of the centres | of the rows |"
        " stored | FLOP per byte |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stored in STORED:
        streaming = tile_of("stats_pull")
        counts = (
            stage(c, d, stored),
            forward(b, c, d, streaming),
            merges(b, c, d, streaming, stored),
            centre_pass(b, c, d, tile_of("centre_pass"), stored),
        )
        for count in counts:
            flop = f"{count.flops:g} BCD" if count.flops else ""
            per_byte = f"{count.intensity(b, c, d):.0f}" if count.flops else ""
            lines.append(
                f"| {count.name} | {stored.name} | {_shape(count.tile)} | {flop} |"
                f" {count.centres:.1f} GB | {count.rows:.2f} GB | {count.stored:.2f} GB |"
                f" {per_byte} |"
            )
        floor = Count("", None, 4, c * d * stored.size / 1e9, b * row_bytes(d) / 1e9, 0)
        lines.append(
            f"| floor of a pass | {stored.name} | | {floor.flops:g} BCD | {floor.centres:.1f} GB |"
            f" {floor.rows:.3f} GB | | {floor.intensity(b, c, d):.0f} |"
        )
    return lines


def shared_memory() -> list[str]:
    """Table of what the products of a tile read from shared memory."""
    d = SHAPE[2]
    lines = [
        "| pass | tile, warps | first product | second product | both | FLOP done / asked |",
        "|---|---|---|---|---|---|",
    ]
    for name, kernel in (("`stats_forward`", "stats_pull"), ("`centre_pass`", "centre_pass")):
        tile = tile_of(kernel)
        sides = tile.block_b, tile.block_c
        made = products(*(sides if kernel == "stats_pull" else sides[::-1]), tile, d)
        if made is None:
            continue
        first = 2 * tile.block_b * tile.block_c * math.ceil(d / tile.block_k) * tile.block_k
        lines.append(
            f"| {name} | {_shape(tile)}, {tile.num_warps} | {made.first / first:.4f} |"
            f" {made.second / (made.asked - first):.4f} |"
            f" {(made.first + made.second) / made.asked:.4f} | {made.done / made.asked:.2f} |"
        )
    return lines


def by_classes() -> list[str]:
    """Table of pieces, launches and memory."""
    d = SHAPE[2]
    lines = [
        "| classes | pieces | launches of a step | staged rows | inverse norms |",
        "|---|---|---|---|---|",
    ]
    for c in CLASSES:
        parts = pieces(c, d)
        lines.append(
            f"| {c:,} | {len(parts)} | {launches(len(parts))} |"
            f" {parts[0] * row_bytes(d) / 1e6:.0f} MB | {4 * parts[0] / 1e6:.1f} MB |"
        )
    return lines


TABLES = {"work": work, "shared memory": shared_memory, "by classes": by_classes}


def marks(name: str) -> tuple[str, str]:
    """What stands before and after a table in the page."""
    return f"<!-- counts: {name} -->\n", "<!-- end -->"


def filled_in(text: str) -> str:
    """The page with its tables as they are now."""
    for name, table in TABLES.items():
        begin, end = marks(name)
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"{PAGE.name} has no place for the table {name!r}: {begin.strip()}")
        text = before + begin + "\n".join(table()) + "\n" + end + rest.partition(end)[2]
    return text


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    with tuned.using({}):  # what ships, whatever table this user has
        if parser.parse_args().write:
            PAGE.write_text(filled_in(PAGE.read_text()))
        else:
            print("\n\n".join("\n".join(table()) for table in TABLES.values()))


if __name__ == "__main__":
    main()
