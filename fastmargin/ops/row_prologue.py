"""Unit embeddings, their norms and running norm statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin.norms import compute_dtype
from fastmargin.ops.registration import backend_for, op
from fastmargin.spec import NormEma


@op(
    "row_prologue",
    "(Tensor x, Tensor? labels, Tensor? ema_mean, Tensor? ema_std, float[] ema_params, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _row_prologue(x, labels, ema_mean, ema_std, ema_params, backend):
    ema = None if ema_mean is None else NormEma(ema_mean, ema_std, *ema_params)
    outputs = backend_for(backend, x).row_prologue(x, labels, ema)
    return outputs if ema else (*outputs[:2], outputs[0].new_empty(0), outputs[0].new_empty(0))


@_row_prologue.register_fake
def _(x, labels, ema_mean, ema_std, ema_params, backend):
    statistic = (0 if ema_mean is None else 1,)
    shapes = x.shape, x.shape[:1], statistic, statistic
    return tuple(x.new_empty(shape, dtype=compute_dtype(x.dtype)) for shape in shapes)


def _row_prologue_setup(ctx, inputs, output):
    ctx.x_dtype, ctx.backend = inputs[0].dtype, inputs[-1]
    ctx.save_for_backward(output[0], output[1])
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)


@op(
    "row_prologue_backward",
    "(Tensor d_x_hat, Tensor? d_norm, Tensor x_hat, Tensor norm, ScalarType x_dtype, str backend)"
    " -> Tensor",
)
def row_prologue_backward(d_x_hat, d_norm, x_hat, norm, x_dtype, backend):
    chosen = backend_for(backend, x_hat)
    return chosen.row_prologue_backward(d_x_hat.contiguous(), d_norm, x_hat, norm, x_dtype)


@row_prologue_backward.register_fake
def _(d_x_hat, d_norm, x_hat, norm, x_dtype, backend):
    return x_hat.new_empty(x_hat.shape, dtype=x_dtype)


def _row_prologue_autograd(ctx, d_x_hat, d_norm, _mean, _std):
    x_hat, norm = ctx.saved_tensors
    if d_x_hat is None:
        d_x_hat = torch.zeros_like(x_hat)
    d_x = row_prologue_backward(d_x_hat, d_norm, x_hat, norm, ctx.x_dtype, ctx.backend)
    return d_x, None, None, None, None, None


_row_prologue.register_autograd(_row_prologue_autograd, setup_context=_row_prologue_setup)


def row_prologue(
    x: Tensor, labels: Tensor | None, ema: NormEma | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit rows (B, D), norms (B,), and running mean and std (1,), (1,) after this batch.

    Without ``ema`` the statistics are empty, (0,). Rows with label < 0 may hold anything, even NaN:
    they give a zero row, norm 0 and zero gradient. With labels None (``ema`` must be None, too) no
    row is ignored.

    Differentiable in ``x`` through unit rows and norms. Rows of norm up to 1e-12 give a zero row
    and zero gradient (``F.normalize`` would multiply the upstream gradient by 1e12).
    """
    if ema is None:
        return _row_prologue(x, labels, None, None, [], backend)
    params = [ema.alpha, ema.low, ema.high]
    return _row_prologue(x, labels, ema.mean, ema.std, params, backend)
