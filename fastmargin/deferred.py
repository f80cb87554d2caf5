"""What an optimiser still owes the rows of a parameter, and how to ask for it.

A lazy optimiser (:mod:`fastmargin.optim`) leaves rows without a gradient as they are and notes the
steps they missed. Whoever reads rows of such a parameter calls :func:`settle` first. It costs a
look-up in a dictionary where nothing is owed.

Debts belong to a parameter by identity. They end with the parameter, not with the optimiser: one
that is dropped while it owes leaves its debts (and the state they need) to the next settling. A
copy of a parameter is another parameter, which owes nothing and holds the rows as they stood. So
settle all rows before a copy, before saving or overwriting a parameter, and before handing it to
code that knows nothing of debts: :class:`SettledCopies` does so for the parameters of a module. An
optimiser copied or pickled together with its parameters takes the debts along.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Debt", "SettledCopies", "debt_of", "owe", "settle"]


class Debt(Protocol):
    """The steps that rows of one parameter have missed.

    It must hold neither the parameter nor the optimiser, or they would never be freed.
    """

    def settle(self, parameter: Tensor, rows: Tensor | None) -> None:
        """Brings rows (K,) int64 up to date, all where None; -1 is an empty place."""


_debts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def debt_of(parameter: Tensor) -> Debt | None:
    """What this parameter's rows may be owed, or None."""
    return _debts.get(parameter)


def owe(parameter: Tensor, debt: Debt) -> None:
    """Records a debt, after settling what anybody else owes this parameter."""
    known = _debts.get(parameter)
    if known is not debt:
        if known is not None:
            settle(parameter)
        _debts[parameter] = debt


def settle(parameter: Tensor, rows: Tensor | None = None) -> None:
    """Brings rows of a parameter up to date before they are used.

    Waits for nothing on the host. Rows that are up to date keep their bits, so those that a
    pending backward has already used do not change, and its saved tensors stay valid.

    Args:
        parameter: (C, ...), any tensor; one that is owed nothing returns at once.
        rows: (K,) int64 row numbers on its device, duplicates allowed, -1 for an empty place. All
            rows if None.

    Raises:
        ValueError: ``rows`` is not a vector of int64.
    """
    # compiled callers break their graph here, since debts come and go from one call to the next
    if _debts or torch.compiler.is_compiling():
        _settle(parameter, rows)


@torch._disable_dynamo
@torch.no_grad()
def _settle(parameter: Tensor, rows: Tensor | None) -> None:
    debt = _debts.get(parameter)
    if debt is None:
        return
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1):
        raise ValueError(
            f"rows must be a vector of int64, got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    debt.settle(parameter, rows)
    if rows is None:
        _debts.pop(parameter, None)


class SettledCopies:
    """Mixin, left of ``nn.Module``: parameters are settled before they are copied or overwritten.

    That is in ``copy``, ``deepcopy``, ``pickle``, ``state_dict`` and ``load_state_dict``, for the
    module's own parameters.
    """

    def _settle_own(self) -> None:
        for parameter in self.parameters(recurse=False):
            settle(parameter)

    def __getstate__(self):
        self._settle_own()
        return self.__dict__.copy()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._settle_own()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args, **kwargs):
        self._settle_own()
        super()._load_from_state_dict(*args, **kwargs)
