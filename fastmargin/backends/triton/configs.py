"""Tile shapes and the pure functions that choose them.

Tiles of the user's table (:mod:`tuned`) take precedence over the shipped ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from fastmargin.backends.triton.tuned import lookup
from fastmargin.spec import HardRule

OPERAND_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
DOT_PRECISION = {"fp32": "ieee", "tf32": "tf32", "bf16": "ieee", "fp16": "ieee"}
PLAIN_LIMIT = 85.0
"""Largest ``|logit| + log C`` for which plain fp32 sums of exponentials stay in range."""


def block_of(d: int) -> int:
    """Smallest block of at least D columns; 16 is the minimum of a matrix instruction."""
    return max(16, triton.next_power_of_2(d))


@dataclass(frozen=True)
class TileConfig:
    """Shape of one program's work.

    block_b, block_c: rows and classes of a tile.
    block_k: columns of D per step of the cosines' product.
    block_d: columns of the accumulator; several programs share a tile if it is less than D.
    """

    block_b: int
    block_c: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict:
        """As arguments of a kernel."""
        return {
            "BLOCK_B": self.block_b,
            "BLOCK_C": self.block_c,
            "BLOCK_K": self.block_k,
            "BLOCK_D": self.block_d,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def operand_width(d: int, dtype: torch.dtype) -> int:
    """D, rounded up to a multiple of 16 bytes, as tensor descriptors require of rows."""
    step = 16 // dtype.itemsize
    return -(-d // step) * step


def is_packed(rows: Tensor) -> bool:
    """Whether the rows are contiguous, without gaps."""
    return rows.stride() == (rows.shape[1], 1)


def split_classes(row_programs: int, tiles: int, processors: int) -> int:
    """Number of splits of the classes, none empty: about one program per multiprocessor."""
    splits = max(1, min(processors // row_programs, tiles))
    per_split = -(-tiles // splits)
    return -(-tiles // per_split)


def needs_shift(bound: float, classes: int, precision: str, want_pull: bool) -> bool:
    """Whether a row's exponentials need a running power of two.

    Bounded logits allow plain sums, but fp16 cannot hold those as weights of the second product.
    """
    fits = abs(bound) + math.log(max(classes, 1)) <= PLAIN_LIMIT
    return not fits or (want_pull and precision == "fp16")


def slope_power(hard: HardRule | None) -> float:
    """Power of two of at least any ``|f'(c)|``, which is at most 4 bound (Markov's inequality)."""
    return 1.0 if hard is None else 2.0 ** math.ceil(math.log2(4 * hard.bound))


def resolve_precision(requested: str, interpreted: bool) -> str:
    """Resolves "auto".

    For bounded unit vectors fp16 has three more useful bits than bf16 at the same speed. Does not
    depend on autocast, whose state an operator's implementation may not see.
    """
    if requested != "auto":
        return requested
    return "fp32" if interpreted else "fp16"


SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KB of shared memory available to a program, by compute capability."""


# Fits every chip from compute capability 8.0 on, and every width.
# Cuts the accumulator into columns of 128, so that D = 512 forms its cosines four times.
_SMALL = {
    ("stats_pull", "half"): TileConfig(64, 64, 32, 128, 8, 2),
    ("stats_pull", "tf32"): TileConfig(64, 32, 32, 128, 8, 2),
    ("stats_pull", "fp32"): TileConfig(32, 32, 16, 64, 4, 2),
    ("centre_pass", "half"): TileConfig(64, 64, 32, 128, 8, 2),
    ("centre_pass", "tf32"): TileConfig(64, 64, 32, 128, 8, 2),
    ("centre_pass", "fp32"): TileConfig(32, 32, 16, 64, 4, 2),
    ("stats_sum", "half"): TileConfig(64, 64, 32, 128, 4, 2),
    ("stats_sum", "tf32"): TileConfig(64, 64, 32, 128, 8, 2),
    ("stats_sum", "fp32"): TileConfig(32, 32, 16, 128, 4, 2),
    # int64 keys fill the registers of a larger tile
    ("topk", "half"): TileConfig(64, 32, 32, 128, 4, 2),
    ("topk", "tf32"): TileConfig(32, 64, 32, 128, 4, 2),
    ("topk", "fp32"): TileConfig(32, 32, 16, 128, 4, 2),
}

# (kernel, operand, architecture) -> {widest D: tile}. "half": 16-bit operands. The first of a list,
# best guess first, that compiled without spilling in every variant; not yet timed.
_TUNED: dict[tuple[str, str, int], dict[int, TileConfig]] = {
    ("centre_pass", "half", 80): {
        128: TileConfig(128, 64, 128, 128, 8, 3),
        256: TileConfig(64, 64, 256, 256, 8, 3),
        512: TileConfig(64, 32, 512, 512, 8, 2),
    },
    ("stats_pull", "half", 80): {
        128: TileConfig(64, 128, 128, 128, 8, 3),
        256: TileConfig(64, 64, 256, 256, 8, 3),
        512: TileConfig(32, 32, 512, 512, 8, 3),
    },
    ("stats_sum", "half", 80): {
        1024: TileConfig(64, 64, 32, 128, 4, 3),
    },
    ("centre_pass", "half", 90): {
        128: TileConfig(128, 128, 128, 128, 8, 2),
        256: TileConfig(128, 64, 256, 256, 8, 2),
        512: TileConfig(64, 64, 512, 512, 8, 2),
        1024: TileConfig(128, 64, 128, 512, 8, 3),
    },
    ("stats_pull", "half", 90): {
        128: TileConfig(128, 128, 128, 128, 8, 3),
        256: TileConfig(128, 64, 256, 256, 8, 3),
        512: TileConfig(64, 64, 512, 512, 8, 2),
        1024: TileConfig(64, 128, 128, 512, 8, 3),
    },
    ("stats_sum", "half", 90): {
        1024: TileConfig(128, 256, 64, 128, 8, 4),
    },
    ("topk", "half", 90): {
        1024: TileConfig(64, 128, 64, 128, 4, 4),
    },
    ("centre_pass", "tf32", 90): {
        128: TileConfig(64, 64, 128, 128, 8, 3),
        256: TileConfig(64, 64, 256, 256, 8, 2),
        512: TileConfig(64, 64, 64, 256, 8, 2),
    },
    ("stats_pull", "tf32", 90): {
        128: TileConfig(128, 64, 128, 128, 8, 3),
        256: TileConfig(64, 32, 256, 256, 8, 3),
        512: TileConfig(64, 64, 64, 256, 8, 2),
    },
    ("stats_sum", "tf32", 90): {
        256: TileConfig(128, 128, 64, 128, 8, 3),
        512: TileConfig(128, 128, 64, 128, 8, 3),
    },
    ("topk", "tf32", 90): {
        256: TileConfig(64, 128, 64, 128, 4, 4),
        512: TileConfig(64, 128, 64, 128, 4, 4),
    },
    ("centre_pass", "half", 100): {
        128: TileConfig(128, 128, 128, 128, 8, 2),
        256: TileConfig(128, 64, 256, 256, 8, 3),
        512: TileConfig(32, 64, 512, 512, 8, 3),
        1024: TileConfig(128, 64, 128, 512, 8, 3),
    },
    ("centre_pass", "tf32", 100): {
        1024: TileConfig(64, 32, 32, 128, 8, 2),
    },
    ("stats_pull", "half", 100): {
        128: TileConfig(128, 64, 128, 128, 8, 3),
        256: TileConfig(64, 128, 256, 256, 8, 2),
        512: TileConfig(64, 32, 512, 512, 8, 3),
        1024: TileConfig(64, 128, 128, 256, 8, 3),
    },
    ("stats_pull", "tf32", 100): {
        1024: TileConfig(64, 64, 32, 128, 8, 2),
    },
    ("stats_sum", "half", 100): {
        1024: TileConfig(128, 128, 64, 128, 8, 4),
    },
    ("topk", "half", 100): {
        1024: TileConfig(64, 128, 64, 128, 4, 4),
    },
}

# What differs where registers are short.
_CROWDED: dict[tuple[str, str, int], dict[int, TileConfig]] = {
    ("centre_pass", "half", 80): {
        256: TileConfig(64, 32, 256, 256, 8, 2),
    },
    ("centre_pass", "half", 90): {
        128: TileConfig(128, 64, 128, 128, 8, 3),
        1024: TileConfig(64, 64, 256, 512, 8, 3),
    },
    ("stats_pull", "half", 90): {
        128: TileConfig(128, 64, 128, 128, 8, 3),
        256: TileConfig(64, 128, 256, 256, 8, 2),
    },
    ("centre_pass", "tf32", 90): {
        256: TileConfig(32, 64, 256, 256, 8, 3),
        512: TileConfig(64, 64, 32, 128, 8, 2),
    },
    ("stats_pull", "tf32", 90): {
        128: TileConfig(64, 64, 128, 128, 8, 3),
    },
    ("centre_pass", "half", 100): {
        128: TileConfig(128, 64, 128, 128, 8, 3),
        256: TileConfig(128, 64, 256, 256, 8, 2),
        512: TileConfig(64, 64, 256, 256, 8, 2),
        1024: TileConfig(64, 64, 256, 512, 8, 3),
    },
    ("stats_pull", "half", 100): {
        128: TileConfig(128, 64, 64, 128, 8, 3),
    },
    ("stats_pull", "tf32", 100): {
        1024: TileConfig(64, 32, 64, 128, 8, 2),
    },
    ("stats_sum", "half", 100): {
        1024: TileConfig(128, 64, 64, 128, 4, 4),
    },
}


def choose(kernel: str, d: int, precision: str, arch: int, crowded: bool = False) -> TileConfig:
    """The tile of ``kernel``: "stats_pull", "stats_sum", "centre_pass" or "topk".

    The user's, if their table has one for this width and registers are not short, else the
    shipped one.

    Args:
        d: width of the embeddings.
        precision: one of "fp32", "tf32", "bf16", "fp16".
        arch: compute capability, 90 for 9.0; 0 for the interpreter.
        crowded: whether registers are short: with a rule for hard negatives; in the forward pass
            also with padding slots, in the centre pass also with Nesterov momentum.
    """
    block = block_of(d)
    own = None if crowded else lookup(kernel, d, precision, arch)
    if own is not None:
        tile = TileConfig(**own)
        return replace(tile, block_k=min(tile.block_k, block), block_d=min(tile.block_d, block))
    if arch == 0:
        # small enough to be quick, and cuts D where D > 32
        return TileConfig(16, 32, *((block, block) if d <= 32 else (32, 32)), 4, 1)
    operand = precision if precision in ("fp32", "tf32") else "half"
    tuned = _TUNED.get((kernel, operand, arch), {})
    if crowded:
        tuned = tuned | _CROWDED.get((kernel, operand, arch), {})
    tile = next((tuned[widest] for widest in sorted(tuned) if d <= widest), None)
    tile = tile or _SMALL[kernel, operand]
    return replace(tile, block_k=min(tile.block_k, block), block_d=min(tile.block_d, block))
