"""The steps that rows without a gradient have missed, and how they catch up.

With a zero gradient a step does the same to every row, so the map from any earlier step to now
("way") is the same for all rows that stopped there. A table holds these maps; a row stores one
number, the step up to which it is current.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fastmargin.norms import compute_dtype
from fastmargin.optim.row_chunks import (
    as_rows,
    chunk_rows,
    gather,
    scatter,
    slices,
)
from fastmargin.rounding import Rounding

HORIZON = 1024
"""Number of steps in a table. When it is full, all rows catch up and it is reset."""


def capturing() -> bool:
    """Whether a CUDA graph is being captured, which would replay Python numbers unchanged."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Step(Protocol):
    """One step of an optimiser with its hyperparameters, which are Python numbers."""

    STILL: tuple[float, ...]
    """Column of the table for a row that is up to date: the identity."""

    def update(self, *rows_and_grad: Tensor) -> None:
        """Updates weight and states (K, ...) in place; the last argument is the gradient."""

    def moves_still_rows(self) -> bool:
        """Whether this step changes rows with a zero gradient."""

    def append_to(self, table: Tensor) -> None:
        """Composes this step onto every map in the table (len(STILL), n) float64, in place."""

    @staticmethod
    def catch_up(ways: Tensor, *rows: Tensor) -> None:
        """Applies missed steps, maps (len(STILL), K) float64, to weight and states (K, ...)."""


class OwedSteps:
    """The pending updates of one parameter's rows; see :class:`fastmargin.deferred.Debt`.

    Args:
        step_type: the optimiser's :class:`Step`.
        names: of the per-row states that a missed step moves; those not in ``state`` are left out.
        state: the optimiser's state of the parameter; ``last_step`` must be ``now`` everywhere.
        now: steps taken so far.
        rounding: of 16-bit rows that are brought up to date; None: to nearest.
    """

    rounding: Rounding | None = None  # for objects pickled before this attribute existed

    def __init__(
        self,
        step_type: type[Step],
        names: tuple[str, ...],
        state: dict[str, Any],
        now: int,
        rounding: Rounding | None,
    ) -> None:
        self.step_type, self.names, self.state = step_type, names, state
        self.rounding = rounding
        self.base = self.now = now
        self.owing = False
        still = torch.tensor(step_type.STILL, dtype=torch.float64)
        # column i: the map from step base + i to now; the identity for future steps
        self.table = still[:, None].repeat(1, HORIZON + 1).to(state["last_step"].device)

    @property
    def full(self) -> bool:
        """Whether all rows must catch up before the next step."""
        return self.now - self.base == self.table.shape[1] - 1

    def append(self, step: Step) -> None:
        """One more step, missed by all rows whose ``last_step`` is not ``now`` afterwards."""
        step.append_to(self.table[:, : self.now - self.base + 1])
        self.now += 1
        self.owing |= step.moves_still_rows()

    def all_taken(self) -> None:
        """One more step that every row has taken, all rows having been up to date."""
        self.now += 1
        self._start_anew()

    def catch_up(self, last_step: Tensor, rows: list[Tensor]) -> None:
        """Updates weight and states (K, ...) of rows that are current up to ``last_step`` (K,)."""
        self.step_type.catch_up(self.table.index_select(1, last_step - self.base), *rows)

    def rows_of(self, parameter: Tensor) -> list[Tensor]:
        """The weight and the states that a step changes, each (C, ...)."""
        states = [self.state[name] for name in self.names if name in self.state]
        return [as_rows(tensor) for tensor in (parameter, *states)]

    def settle(self, parameter: Tensor, rows: Tensor | None = None) -> None:
        """Brings rows (K,) up to date, all if None; -1 is a padding slot.

        Raises:
            RuntimeError: updates are or may become pending while a CUDA graph is being captured.
        """
        if (self.owing or rows is not None) and capturing():
            raise RuntimeError(
                "a CUDA graph would always bring rows up to this very step: capture nothing that "
                "reads rows of a lazy optimiser, or make it with unsampled='dense' or 'frozen'"
            )
        # .data has its own version counter, so a backward that is still to come finds the weight
        # unchanged. That is right: the rows it used were settled, and the map from now to now
        # multiplies by 1 and adds 0.
        tensors = self.rows_of(parameter.data)
        dtype, last_step = compute_dtype(parameter.dtype), self.state["last_step"]
        # a row is settled at a given step only once, so it never gets the same noise twice
        key = None if self.rounding is None else self.rounding.key(self.now)
        if rows is None:
            if self.owing:
                for start, stop, part in slices(tensors, dtype, key):
                    self.catch_up(last_step[start:stop], part)
                    last_step[start:stop].fill_(self.now)
            self._start_anew()
        elif self.owing and tensors[0].shape[0]:
            rows = rows.clamp_min(0)  # a padding slot settles row 0: a mask would synchronise
            size = chunk_rows(tensors[0], dtype)
            for start in range(0, rows.shape[0], size):
                ids = rows[start : start + size]
                part = gather(tensors, ids, dtype)
                self.catch_up(last_step.index_select(0, ids), part)
                scatter(tensors, ids, part, key)
                last_step.index_fill_(0, ids, self.now)

    def _start_anew(self) -> None:
        self.state["last_step"].fill_(self.now)
        self.table[:, : self.now - self.base].copy_(self.table[:, self.now - self.base, None])
        self.base, self.owing = self.now, False
