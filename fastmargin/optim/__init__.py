"""Optimisers that touch only the rows with a gradient: SGD and AdamW for class centres."""

from fastmargin.deferred import settle
from fastmargin.optim.row_adamw import RowAdamW
from fastmargin.optim.row_sgd import RowSGD

__all__ = ["RowAdamW", "RowSGD", "settle"]
