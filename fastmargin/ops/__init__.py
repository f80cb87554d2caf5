"""The operators: schema, fake and autograd of each, in ``torch.ops.fastmargin``.

The only place that registers operators for users. Since a schema takes only tensors and numbers,
dataclasses of :mod:`fastmargin.spec` are unpacked here and rebuilt for the backend. Shapes and
meanings are documented in :mod:`fastmargin.backends.interface`.

Every backward is an operator without a derivative, so that a second-order gradient raises an error
instead of being wrong.
"""

from fastmargin.backends.row_gradients import without_confident
from fastmargin.ops.centre_gradient import (
    centre_gradient,
    centre_rows,
    gradient_or_factors,
    row_stats_backward,
)
from fastmargin.ops.centre_step import centre_step
from fastmargin.ops.hinge_loss import hinge_loss
from fastmargin.ops.margin_rows import margin_rows
from fastmargin.ops.marked import marked
from fastmargin.ops.registration import check_backend
from fastmargin.ops.row_normals import row_normals
from fastmargin.ops.row_prologue import row_prologue, row_prologue_backward
from fastmargin.ops.row_stats import (
    row_stats,
    row_stats_backward_x,
    target_cosine,
)
from fastmargin.ops.row_topk import row_topk, row_topk_backward
from fastmargin.ops.sample import sample
from fastmargin.ops.softmax_loss import softmax_loss, softmax_loss_backward
from fastmargin.ops.spread_rows import spread_rows

__all__ = [
    "centre_gradient",
    "centre_rows",
    "centre_step",
    "check_backend",
    "gradient_or_factors",
    "hinge_loss",
    "margin_rows",
    "marked",
    "row_normals",
    "row_prologue",
    "row_prologue_backward",
    "row_stats",
    "row_stats_backward",
    "row_stats_backward_x",
    "row_topk",
    "row_topk_backward",
    "sample",
    "softmax_loss",
    "softmax_loss_backward",
    "spread_rows",
    "target_cosine",
    "without_confident",
]
