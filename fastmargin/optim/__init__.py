"""Row-sparse optimisers for class centres, SGD and AdamW: only rows with a gradient are touched."""

from fastmargin.deferred import settle
from fastmargin.optim.row_adamw import RowAdamW
from fastmargin.optim.row_sgd import RowSGD

__all__ = ["RowAdamW", "RowSGD", "settle"]
