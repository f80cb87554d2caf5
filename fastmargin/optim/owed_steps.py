"""The steps that rows without a gradient have missed, and how they catch up.

Without a gradient a step does the same to every row, so the way from any earlier step to now is
the same for all rows that stopped there. A table holds these ways; a row needs one number, the
step up to which it is current.
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
"""Steps a table holds. When it is full, all rows catch up and it starts anew."""


def capturing() -> bool:
    """Whether a CUDA graph is being captured, in which the host's numbers stay as they are."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Step(Protocol):
    """One step of an optimiser with its numbers, which are the host's."""

    STILL: tuple[float, ...]
    """Column of the table for a row that misses nothing."""

    def update(self, *rows_and_grad: Tensor) -> None:
        """Takes the step: edits weight and states (K, ...), last argument the gradient."""

    def moves_still_rows(self) -> bool:
        """Whether this step does anything to rows without a gradient."""

    def append_to(self, table: Tensor) -> None:
        """Lengthens every way in the table (len(STILL), n) float64 by this step, in place."""

    @staticmethod
    def catch_up(ways: Tensor, *rows: Tensor) -> None:
        """Takes missed steps: ways (len(STILL), K) float64, edits weight and states (K, ...)."""


class OwedSteps:
    """Debt of an optimiser to the rows of one parameter; see :class:`fastmargin.deferred.Debt`.

    Args:
        step_type: the optimiser's :class:`Step`.
        names: of the per-row states that a missed step moves; those not in ``state`` are left out.
        state: the optimiser's state of the parameter; ``last_step`` must be ``now`` everywhere.
        now: steps taken so far.
        rounding: of 16-bit rows that are brought up to date; None: to nearest.
    """

    rounding: Rounding | None = None  # of those that were pickled before there was any

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
        # column i: the way from step base + i to now; those of the future stand still
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
        """One more step that every row has taken, after all rows were up to date."""
        self.now += 1
        self._start_anew()

    def catch_up(self, last_step: Tensor, rows: list[Tensor]) -> None:
        """Edits weight and states (K, ...) of rows that are current up to ``last_step`` (K,)."""
        self.step_type.catch_up(self.table.index_select(1, last_step - self.base), *rows)

    def rows_of(self, parameter: Tensor) -> list[Tensor]:
        """The weight and the states a step moves, each (C, ...)."""
        states = [self.state[name] for name in self.names if name in self.state]
        return [as_rows(tensor) for tensor in (parameter, *states)]

    def settle(self, parameter: Tensor, rows: Tensor | None = None) -> None:
        """Brings rows (K,) up to date, all if None; -1 is an empty place.

        Raises:
            RuntimeError: rows are owed steps, or some will be, and a CUDA graph is being captured.
        """
        if (self.owing or rows is not None) and capturing():
            raise RuntimeError(
                "a CUDA graph would always bring rows up to this very step: capture nothing that "
                "reads rows of a lazy optimiser, or make it with unsampled='dense' or 'frozen'"
            )
        # .data has a version counter of its own. A backward that waits for rows used before finds
        # the weight unchanged, and rightly: those rows were settled then, and the way from now to
        # now multiplies by 1 and adds 0.
        tensors = self.rows_of(parameter.data)
        dtype, last_step = compute_dtype(parameter.dtype), self.state["last_step"]
        # a row stops at a step once, so the same noise never meets it twice
        key = None if self.rounding is None else self.rounding.key(self.now)
        if rows is None:
            if self.owing:
                for start, stop, part in slices(tensors, dtype, key):
                    self.catch_up(last_step[start:stop], part)
                    last_step[start:stop].fill_(self.now)
            self._start_anew()
        elif self.owing and tensors[0].shape[0]:
            rows = rows.clamp_min(0)  # an empty place settles row 0: a mask would be read back
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
