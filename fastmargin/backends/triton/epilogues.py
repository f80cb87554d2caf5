"""Epilogues of the centre pass: what happens to a finished gradient tile in registers.

An epilogue takes the tile of centres (fp32), its gradient (fp32), pointers to the output and to the
optimiser's state, a mask, three numbers, and, if STOCHASTIC, 32 random bits for rounding: the low
half for the centres, the high half for the state. To support another optimiser, add a function.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmargin.backends.triton.rounding import narrow
from fastmargin.backends.triton.tile import cast
from fastmargin.spec import SgdUpdate


def of(update: SgdUpdate | None) -> triton.JITFunction:
    """The epilogue of this update; without one, the epilogue that stores the gradient."""
    if update is None:
        return store_gradient
    if not update.momentum:
        return sgd
    return sgd_nesterov if update.nesterov else sgd_momentum


def numbers(update: SgdUpdate | None) -> tuple[float, float, float]:
    """The three numbers that an epilogue takes."""
    if update is None:
        return 0.0, 0.0, 0.0
    return float(update.lr), float(update.momentum), float(update.weight_decay)


@triton.jit
def store_gradient(
    b_w, b_grad, p_out, p_state, m_tile, rate, momentum, decay, b_noise, STOCHASTIC: tl.constexpr
):
    """The gradient itself, in the type of the centres."""
    tl.store(p_out, cast(b_grad, p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def sgd(
    b_w, b_grad, p_out, p_state, m_tile, rate, momentum, decay, b_noise, STOCHASTIC: tl.constexpr
):
    """A step of SGD without momentum; ``p_out`` are the centres themselves."""
    b_w -= rate * (b_grad + decay * b_w)
    tl.store(p_out, narrow(b_w, b_noise, p_out.dtype.element_ty, STOCHASTIC), mask=m_tile)


@triton.jit
def sgd_momentum(
    b_w, b_grad, p_out, p_state, m_tile, rate, momentum, decay, b_noise, STOCHASTIC: tl.constexpr
):
    """A step of SGD with momentum, whose buffer is the state."""
    b_buffer = tl.load(p_state, mask=m_tile, other=0.0).to(tl.float32)
    b_buffer = momentum * b_buffer + (b_grad + decay * b_w)
    b_stored = narrow(b_buffer, b_noise >> 16, p_state.dtype.element_ty, STOCHASTIC)
    tl.store(p_state, b_stored, mask=m_tile)
    b_w -= rate * b_buffer
    tl.store(p_out, narrow(b_w, b_noise, p_out.dtype.element_ty, STOCHASTIC), mask=m_tile)


@triton.jit
def sgd_nesterov(
    b_w, b_grad, p_out, p_state, m_tile, rate, momentum, decay, b_noise, STOCHASTIC: tl.constexpr
):
    """The same, with Nesterov's look ahead."""
    b_grad += decay * b_w
    b_buffer = tl.load(p_state, mask=m_tile, other=0.0).to(tl.float32)
    b_buffer = momentum * b_buffer + b_grad
    b_stored = narrow(b_buffer, b_noise >> 16, p_state.dtype.element_ty, STOCHASTIC)
    tl.store(p_state, b_stored, mask=m_tile)
    b_w -= rate * (b_grad + momentum * b_buffer)
    tl.store(p_out, narrow(b_w, b_noise, p_out.dtype.element_ty, STOCHASTIC), mask=m_tile)
