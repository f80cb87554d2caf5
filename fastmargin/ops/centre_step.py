"""The centre pass with the optimiser's update fused into it."""

from __future__ import annotations

from torch import Tensor

from fastmargin.ops.registration import STATS_ARGS, backend_for, op
from fastmargin.spec import GradientFactors, SgdUpdate


@op(
    "centre_step",
    f"({STATS_ARGS.replace('Tensor weight', 'Tensor(a!) weight')}, Tensor lse_neg,"
    " bool skip_zero_rows, Tensor[] kept, str precision, str backend, Tensor d_lse, Tensor d_cos,"
    " Tensor(b!)? buffer, float lr, float momentum, float weight_decay, bool nesterov,"
    " int? rounding) -> ()",
    mutates=("weight", "buffer"),
)
def _centre_step(x_hat, weight, *rest):
    (*settings, d_lse, d_cos, buffer), update = rest[:-5], SgdUpdate(*rest[-5:])
    part = GradientFactors.build(d_lse, d_cos, x_hat, settings)
    backend_for(part.backend, x_hat, part.precision).centre_step(weight, buffer, update, part)


@_centre_step.register_fake
def _(*_):
    return None


def centre_step(
    weight: Tensor, momentum: Tensor | None, update: SgdUpdate, found: GradientFactors
) -> None:
    """Updates ``weight`` (C, D) and its ``momentum`` in place with the gradient of the factors.

    With ``found.index`` only those rows. Allocates nothing of size (C, D). See
    :meth:`fastmargin.backends.interface.Backend.centre_step`.
    """
    _centre_step(
        found.x_hat,
        weight,
        *found.settings(),
        found.d_lse,
        found.d_cos,
        momentum,
        update.lr,
        update.momentum,
        update.weight_decay,
        update.nesterov,
        update.rounding,
    )
