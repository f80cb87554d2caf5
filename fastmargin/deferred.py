"""Pending updates of a parameter's rows, and how to apply them.

A lazy optimiser (:mod:`fastmargin.optim`) leaves rows without a gradient as they are and records
the steps they missed. Call :func:`settle` before reading rows of such a parameter; it applies the
updates a dense optimiser would have made. Without pending updates it costs one dictionary look-up.

Pending updates belong to a parameter by identity. They end with the parameter, not with the
optimiser: one that is deleted leaves them (and the state they need) to the next :func:`settle`. A
copied parameter keeps the old values and has no pending updates. So settle all rows before a copy,
before saving or overwriting a parameter, and before passing it to code that does not settle:
:class:`SettledCopies` does so for the parameters of a module. An optimiser copied or pickled
together with its parameters takes the pending updates along.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Debt", "SettledCopies", "debt_of", "owe", "settle"]


class Debt(Protocol):
    """The pending updates of one parameter's rows.

    It must reference neither the parameter nor the optimiser, or they would never be freed.
    """

    def settle(self, parameter: Tensor, rows: Tensor | None) -> None:
        """Brings rows (K,) int64 up to date, all if None; -1 is a padding slot."""


_debts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def debt_of(parameter: Tensor) -> Debt | None:
    """The pending updates of this parameter, if there may be any, or None."""
    return _debts.get(parameter)


def owe(parameter: Tensor, debt: Debt) -> None:
    """Registers pending updates, after applying those of any other optimiser."""
    known = _debts.get(parameter)
    if known is not debt:
        if known is not None:
            settle(parameter)
        _debts[parameter] = debt


def settle(parameter: Tensor, rows: Tensor | None = None) -> None:
    """Brings rows of a parameter up to date before they are used.

    The host does not wait. Rows that are up to date keep their bits, so those used by a forward
    pass whose backward is still to come do not change, and its saved tensors stay valid.

    Args:
        parameter: (C, ...), any tensor; returns at once if nothing is pending.
        rows: (K,) int64 row numbers on its device, duplicates allowed, -1 for a padding slot. All
            rows if None.

    Raises:
        ValueError: ``rows`` is not a vector of int64.
    """
    # compiled callers break their graph here, since pending updates vary from call to call
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
