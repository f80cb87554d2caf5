"""Records what launches would ask Triton to compile, on a simulated GPU.

Types, specialised numbers, alignment and tensor descriptors are bound as on a GPU, from tensors on
the CPU; nothing is compiled or run, so results are uninitialised. For processes that launch nothing
else: kernels stay bound to the simulated GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from fastmargin.backends.triton.launch import Chip, pretending
from fastmargin.backends.triton.tile import INTERPRETED

PROCESSORS = 132
"""Of the simulated GPU."""

_MOST_PROGRAMS = (2**31 - 1, 65535, 65535)
_notes: list[Asked] = []


@dataclass(frozen=True)
class Asked:
    """A kernel with all that its compilation depends on, as arguments of Triton's compiler."""

    source: ASTSource
    options: dict

    @property
    def kernel(self) -> str:
        return self.source.fn.__name__.removesuffix("_kernel")

    @property
    def key(self) -> str:
        """Equal for kernels that compile to the same code."""
        return f"{self.source.hash()} {sorted(self.options.items(), key=str)}"


class _Uncompiled:
    """Given to Triton instead of a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, source: ASTSource, target: GPUTarget, options: dict):
        self.asked = Asked(source, options)

    def launch_metadata(self, grid, stream, *arguments) -> None:
        return None

    def run(self, *grid_and_arguments) -> None:
        grid = grid_and_arguments[:3]
        if not all(0 < n <= most for n, most in zip(grid, _MOST_PROGRAMS, strict=True)):
            raise ValueError(f"{self.asked.kernel}: no GPU has room for a grid of {grid}")
        _notes.append(self.asked)


class _AbsentGpu:
    """Triton driver of the simulated GPU."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"absent sm_{self.arch}"  # what Triton keeps bound kernels by

    def get_current_stream(self, device) -> int:
        return 0


@contextlib.contextmanager
def noted(arch: int) -> Iterator[list[Asked]]:
    """Records, in order, the launches within the block, on compute capability ``arch``.

    Raises:
        RuntimeError: Triton's interpreter is on, which does not specialise.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set; the interpreter compiles nothing")
    global _notes
    # not set_active: where there is no GPU it cannot be undone
    before = driver._active, triton.compiler.compile, _notes
    driver._active, triton.compiler.compile = _AbsentGpu(arch), _Uncompiled
    _notes = []
    try:
        with pretending(Chip(arch, PROCESSORS)):
            yield _notes
    finally:
        driver._active, triton.compiler.compile, _notes = before
