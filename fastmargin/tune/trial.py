"""A kernel at one width: whether a tile is correct, and how long it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from fastmargin.backends.triton import tuned
from fastmargin.backends.triton.configs import TileConfig
from fastmargin.tune import problem as problems
from fastmargin.tune.candidates import shipped
from fastmargin.tune.clock import Clock
from fastmargin.tune.problem import PLAIN, Problem, Shape, Variant

ALLOWED = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 4e-2}
"""Allowed row error by operand type; or twice the built-in tile's, if that is larger."""
BROKEN = 0.2
"""If the built-in tile's error reaches this, nothing can be compared with it."""
SMALL = (150, 1100)
"""Rows and classes of the problem solved in float64: no multiples of a tile."""


class TuneError(RuntimeError):
    """Nothing can be measured; the message gives the reason and the fix."""


@dataclass(frozen=True)
class Machine:
    """Where it is measured: a device, its name in entries, and its clock.

    arch: compute capability, 90 for 9.0; 0 in the interpreter.
    """

    device: torch.device
    name: str
    arch: int
    clock: Clock


@contextlib.contextmanager
def launched() -> Iterator[list]:
    """Collects the compiled kernels launched in this block."""
    found, launch = [], triton.JITFunction.run

    def run(self, *args, **kwargs):
        kernel = launch(self, *args, **kwargs)
        found.append(kernel)
        return kernel

    triton.JITFunction.run = run
    try:
        yield found
    finally:
        triton.JITFunction.run = launch


class Trial:
    """Problems of one kernel, width and operand type, with the built-in tile's results.

    Raises:
        TuneError: the problem does not fit into memory, or the built-in tile fails.
    """

    def __init__(self, kernel: str, shape: Shape, precision: str, machine: Machine) -> None:
        self.kernel, self.shape, self.precision = kernel, shape, precision
        self._machine = machine
        self.base = shipped(kernel, shape.dim, precision, machine.arch)
        self._small = Shape(min(shape.batch, SMALL[0]), min(shape.classes, SMALL[1]), shape.dim)
        self._answers: dict[Variant, tuple[Problem, dict[str, Tensor], dict[str, float]]] = {}
        try:
            self._problem = self._make(shape, PLAIN)
            self._expected = self._outputs(self.base, self._problem)
            self._answer(PLAIN)
        except torch.cuda.OutOfMemoryError as error:
            raise TuneError(
                f"{shape.batch} rows, {shape.classes} classes and {shape.dim} dimensions do not"
                " fit into the GPU's memory: use fewer --classes"
            ) from error
        except (RuntimeError, TritonError) as error:
            if isinstance(error, TuneError):
                raise
            raise TuneError(
                f"{kernel} fails here as shipped: {type(error).__name__}: {_first_line(error)}"
            ) from error

    def wrong(self, tile: TileConfig) -> str | None:
        """Why the tile cannot be timed, or None: it must compile, not spill, and be correct.

        In the plain variant, on a small problem against float64 and on the full one against the
        built-in tile. Any exception of a compiler or a launch is a reason.
        """
        return self._reason(lambda: self._wrong_small(tile, PLAIN) or self._wrong_whole(tile))

    def wrong_elsewhere(self, tile: TileConfig) -> str | None:
        """The same for the kernel's other variants, on small problems."""
        others = problems.variants(self.kernel)[1:]
        reasons = (self._reason(lambda v=v: self._wrong_small(tile, v)) for v in others)
        return next(filter(None, reasons), None)

    def seconds(self, tile: TileConfig) -> float:
        """Time of one run of the full problem.

        Raises:
            TuneError: it fails, though it succeeded before.
        """
        try:
            with tuned.using(self._tiles(tile)):
                return self._machine.clock.seconds(lambda: problems.run(self._problem))
        except (RuntimeError, TritonError) as error:
            raise TuneError(f"{self.kernel} fails with {tile}: {_first_line(error)}") from error

    def _make(self, shape: Shape, variant: Variant) -> Problem:
        return problems.make_problem(
            self.kernel, shape, self.precision, variant, self._machine.device
        )

    def _tiles(self, tile: TileConfig) -> tuned.Tiles:
        # also for the built-in tile, so that other layouts use this one too
        numbers = {name: getattr(tile, name) for name in tuned.FIELDS}
        return {(self.kernel, self.shape.dim, self.precision, self._machine.arch): numbers}

    def _outputs(self, tile: TileConfig, problem: Problem) -> dict[str, Tensor]:
        with tuned.using(self._tiles(tile)):
            return problems.outputs(problem)

    def _answer(self, variant: Variant) -> tuple[Problem, dict[str, Tensor], dict[str, float]]:
        """A small problem, its solution in float64, and the allowed errors."""
        if variant not in self._answers:
            problem = self._make(self._small, variant)
            expected = problems.truth(problem)
            with tuned.using({}):  # the built-in tile of this variant
                found = problems.outputs(problem)
            own = {name: problems.worst_row(found[name], t) for name, t in expected.items()}
            if not max(own.values()) <= BROKEN:
                raise TuneError(
                    f"{self.kernel} gives wrong results here as shipped (relative error"
                    f" {max(own.values()):.2g}): see `fastmargin doctor`"
                )
            allowed = {name: max(ALLOWED[self.precision], 2 * e) for name, e in own.items()}
            self._answers[variant] = problem, expected, allowed
        return self._answers[variant]

    def _wrong_small(self, tile: TileConfig, variant: Variant) -> str | None:
        problem, expected, allowed = self._answer(variant)
        with launched() as kernels:
            found = self._outputs(tile, problem)
        spilled = [kernel for kernel in kernels if getattr(kernel, "n_spills", 0)]
        if spilled:
            return f"spills {spilled[0].n_spills} registers"
        return self._compare(found, expected, allowed, "float64")

    def _wrong_whole(self, tile: TileConfig) -> str | None:
        _, _, allowed = self._answer(PLAIN)
        found = self._outputs(tile, self._problem)
        return self._compare(found, self._expected, allowed, "the tile that ships")

    def _compare(self, found, expected, allowed, whom: str) -> str | None:
        for name, value in expected.items():
            error = problems.worst_row(found[name], value)
            if not error <= allowed[name]:
                return f"{name} is wrong: a row differs by {error:.2g} from {whom}"
        return None

    def _reason(self, check: Callable[[], str | None]) -> str | None:
        try:
            return check()
        except TuneError:
            raise
        except Exception as error:
            self._still_alive(error)
            return f"{type(error).__name__}: {_first_line(error)}"

    def _still_alive(self, error: Exception) -> None:
        """Raises if the CUDA context is dead, as after an illegal memory access."""
        if self._machine.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._machine.device)
        except RuntimeError as lost:
            raise TuneError(f"a tile broke the CUDA context: {_first_line(error)}") from lost


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
