"""Logits that are computed on demand, and not all at once."""

from __future__ import annotations

import os
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from fastmargin.compat.scores import MOST_STREAMED, Scores
from fastmargin.first_order import first_order

_warned = False
_warned_of_change = False


class StreamedLogits(Tensor):
    """Behaves like the (B, C) logits of a head, without storing them.

    What training and its logs need runs in passes over the class centres that never store
    (B, C) values: ``F.cross_entropy`` and ``nn.CrossEntropyLoss`` with class indices as targets
    and every option (``weight``, ``ignore_index``, ``reduction``, ``label_smoothing``), ``argmax``,
    ``max`` and ``topk`` (k <= 16) over the classes, ``detach``. Anything else computes all of them
    first, as :meth:`dense` does, and warns once per process.

    They have a node in autograd's graph, as the logits would: DDP finds the parameters behind
    them, an ``autograd.Function`` passes a gradient on, and under ``no_grad`` there is none.
    But they are evaluated lazily: a query after ``optimizer.step()`` uses the new centres, and
    warns once per process.
    C++ code that needs a plain tensor must be given ``logits.dense()``. Made by :func:`stream`.
    """

    @staticmethod
    def __new__(
        cls, scores: Scores, middle: bool = False, versions: list[int | None] | None = None
    ) -> StreamedLogits:
        """``middle``: of shape (B, 1, C), as speechbrain has it. ``versions``: default: of now."""
        b, c = scores.shape
        size = (b, 1, c) if middle else (b, c)
        self = Tensor._make_wrapper_subclass(cls, size, dtype=scores.dtype, device=scores.device)
        self._scores, self._dense, self._watched = scores, None, False
        self._versions = _versions(scores) if versions is None else versions
        return self

    @property
    def scores(self) -> Scores:
        """The scores behind them; differentiable if the logits are."""
        if self._versions != _versions(self._scores):
            _warn_of_change()
        with torch._C.DisableTorchFunctionSubclass():
            node = self.grad_fn
        if node is None:
            return self._scores.detached()
        if isinstance(node, _OURS):
            return self._scores
        # another autograd function has passed them on, and its backward must run, as DDP's must
        return self._scores.with_rows(_Tied.apply(self._scores.x, self))

    def dense(self) -> Tensor:
        """The logits as a plain tensor, with gradient; computed once."""
        if self._dense is None:
            # cached, so with gradient for a later caller that needs it
            with torch.set_grad_enabled(self.requires_grad):
                logits = self.scores.dense()
                self._dense = logits.unsqueeze(1) if self._has_middle() else logits
        return self._dense

    def _has_middle(self) -> bool:
        with torch._C.DisableTorchFunctionSubclass():
            return self.dim() == 3

    def _replaced(self) -> bool:
        """Whether the computed logits replace these: written to, or their grad is read."""
        return self._dense is not None and (self._dense._version > 0 or self._watched)

    def __repr__(self) -> str:
        with torch._C.DisableTorchFunctionSubclass():
            return (
                f"StreamedLogits(shape={tuple(self.shape)}, dtype={self.dtype}, "
                f"device={self.device}, requires_grad={self.requires_grad})"
            )

    def __reduce_ex__(self, protocol):
        return self.dense().detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None and args and isinstance(args[0], StreamedLogits):
            if not args[0]._replaced():
                result = handler(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        elif handler is _cross_entropy and isinstance(kwargs.get("input"), StreamedLogits):
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"), *args)
            return cls.__torch_function__(func, types, args, kwargs)
        _warn(func)
        if func in _WATCHING:
            args[0]._watched = True
        args, kwargs = tree_map(_computed, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(
            f"{func} was handed logits that are not computed: pass logits.dense() to it"
        )


def stream(scores: Scores) -> Tensor:
    """The scores as logits: streamed, except under ``torch.compile``, which traces no subclass."""
    if torch.compiler.is_compiling():
        return scores.dense()
    return _Origin.apply(scores, *scores.inputs)


class _Origin(torch.autograd.Function):
    """The node of streamed logits in autograd's graph.

    Streamed results have their own gradients, and reach this node with None.
    """

    @staticmethod
    def forward(ctx, scores: Scores, *inputs: Tensor) -> StreamedLogits:
        ctx.scores = scores
        ctx.set_materialize_grads(False)
        return StreamedLogits(scores)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor | None):
        wanted = ctx.needs_input_grad[1:]
        if grad is None:
            return None, *(None for _ in wanted)
        inputs = [t for t, w in zip(ctx.scores.inputs, wanted, strict=True) if w]
        with torch.enable_grad():
            logits = ctx.scores.dense()
        found = iter(torch.autograd.grad(logits, inputs, grad, allow_unused=True))
        return None, *(next(found) if w else None for w in wanted)


class _Reshaped(torch.autograd.Function):
    """The same logits, as (B, C) or (B, 1, C)."""

    @staticmethod
    def forward(ctx, logits: StreamedLogits, scores: Scores, middle: bool) -> StreamedLogits:
        ctx.size = logits.shape
        ctx.set_materialize_grads(False)
        return StreamedLogits(scores, middle, logits._versions)

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        return None if grad is None else grad.reshape(ctx.size), None, None


class _Tied(torch.autograd.Function):
    """x unchanged; its backward also leads to that of ``logits``, with a None gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, logits: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


_OURS = (_Origin._backward_cls, _Reshaped._backward_cls)


def _versions(scores: Scores) -> list[int | None]:
    return [None if each.is_inference() else each._version for each in scores.inputs]


def _computed(value):
    return value.dense() if isinstance(value, StreamedLogits) else value


def _warn(func) -> None:
    global _warned
    if not _warned:
        _warned = True
        name = getattr(func, "__qualname__", None) or getattr(func, "__name__", str(func))
        warnings.warn(
            f"{name} needs all (B, C) logits of a fastmargin head, so they are computed and held. "
            "cross_entropy, argmax, max and topk do without; logits.dense() says that you mean "
            "it. This is said once.",
            stacklevel=_frames_to_caller(),
        )


def _warn_of_change() -> None:
    global _warned_of_change
    if not _warned_of_change:
        _warned_of_change = True
        warnings.warn(
            "The class centres have changed since a fastmargin head made these logits, and what is "
            "computed of them now is of the new centres: ask before optimizer.step(), or take "
            "logits.dense() before it. This is said once.",
            stacklevel=_frames_to_caller(),
        )


def _frames_to_caller() -> int:
    """``stacklevel`` of the first frame outside torch and this file, for the caller."""
    ours = os.path.dirname(torch.__file__), __file__
    frame, count = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame, count = frame.f_back, count + 1
    return count


# ---- what streams -------------------------------------------------------------------------------


def _cross_entropy(
    logits,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    if size_average is not None or reduce is not None:
        return NotImplemented
    if target.is_floating_point() or logits._has_middle() or target.dim() != 1:
        return NotImplemented  # class probabilities, or a shape for which torch has an error
    batch, classes = logits.scores.shape
    if target.shape[0] != batch or target.dtype != torch.int64:
        return NotImplemented
    if weight is not None and weight.shape != (classes,):
        return NotImplemented
    if reduction not in ("none", "mean", "sum") or not 0 <= label_smoothing <= 1:
        return NotImplemented
    counted = target != ignore_index
    if target.device.type == "cpu":
        wrong = counted & ((target < 0) | (target >= classes))
        if bool(wrong.any()):
            raise IndexError(f"Target {int(target[wrong][0])} is out of bounds.")
    loss, logit = logits.scores.rows(target, counted)
    # a target out of range that was not checked
    loss = torch.where(counted & ((target < 0) | (target >= classes)), torch.nan, loss)
    share = counted.to(loss.dtype)
    if weight is not None:
        share = share * weight.to(loss.dtype)[target.clamp(0, classes - 1)]
    found = share * loss
    if label_smoothing > 0:
        every = classes if weight is None else weight.sum().to(loss.dtype)
        smooth = every * (loss + logit) - logits.scores.total(weight)
        smooth = torch.where(counted, smooth, 0) / classes
        found = (1 - label_smoothing) * found + label_smoothing * smooth
    if reduction == "none":
        return found
    return found.sum() if reduction == "sum" else found.sum() / share.sum()


def _over_classes(logits, dim) -> bool:
    last = 2 if logits._has_middle() else 1
    return dim in (last, -1) and logits.scores.shape[1] > 0


def _largest(logits, k):
    """``topk`` over the classes, with the middle axis that the logits have."""
    found = logits.scores.topk(k)
    return [each.unsqueeze(1) for each in found] if logits._has_middle() else found


def _topk(logits, k, dim=-1, largest=True, sorted=True):
    if not _over_classes(logits, dim) or not largest:
        return NotImplemented
    if not 1 <= k <= min(MOST_STREAMED, logits.scores.shape[1]):
        return NotImplemented
    return torch.return_types.topk(_largest(logits, k))


def _max(logits, dim=None, keepdim=False):
    if not isinstance(dim, int) or not _over_classes(logits, dim):
        return NotImplemented
    values, index = _largest(logits, 1)
    if not keepdim:
        values, index = values.squeeze(-1), index.squeeze(-1)
    return torch.return_types.max((values, index))


def _argmax(logits, dim=None, keepdim=False):
    if not _over_classes(logits, dim):
        return NotImplemented
    with torch.no_grad():
        _, index = _largest(logits, 1)
    return index if keepdim else index.squeeze(-1)


def _detach(logits):
    return StreamedLogits(logits._scores.detached(), logits._has_middle(), logits._versions)


def _reshaped(logits, middle):
    if logits.requires_grad and torch.is_grad_enabled():
        return _Reshaped.apply(logits, logits.scores, middle)
    # inside an autograd.Function: its outputs get their graph nodes there
    return StreamedLogits(logits._scores, middle, logits._versions)


def _clone(logits, **kwargs):
    return _reshaped(logits, logits._has_middle())


def _same(logits, *args, **kwargs):
    """A conversion that changes nothing."""
    with torch._C.DisableTorchFunctionSubclass():
        probe = torch.empty(0, dtype=logits.dtype, device=logits.device)
        return logits if _converted(probe, *args, **kwargs) is probe else NotImplemented


def _converted(probe, *args, **kwargs):
    return probe.to(*args, **kwargs)


def _to_type(dtype):
    return lambda logits: _same(logits, dtype)


def _squeeze(logits, dim=None):
    if dim != 1 or not (logits._has_middle() or logits.scores.shape[1] > 1):
        return NotImplemented
    return _reshaped(logits, False) if logits._has_middle() else logits


def _unsqueeze(logits, dim):
    if logits._has_middle() or dim not in (1, -2):
        return NotImplemented
    return _reshaped(logits, True)


_HANDLERS = {
    F.cross_entropy: _cross_entropy,
    Tensor.argmax: _argmax,
    torch.argmax: _argmax,
    Tensor.max: _max,
    torch.max: _max,
    Tensor.topk: _topk,
    torch.topk: _topk,
    Tensor.detach: _detach,
    torch.detach: _detach,
    Tensor.data.__get__: _detach,
    Tensor.squeeze: _squeeze,
    torch.squeeze: _squeeze,
    Tensor.unsqueeze: _unsqueeze,
    torch.unsqueeze: _unsqueeze,
    Tensor.to: _same,
    Tensor.float: _to_type(torch.float32),
    Tensor.double: _to_type(torch.float64),
    Tensor.cpu: lambda logits: _same(logits, "cpu"),
    Tensor.contiguous: lambda logits: logits,
    Tensor.clone: _clone,
    torch.clone: _clone,
}

_WATCHING = (Tensor.register_hook, Tensor.retain_grad)

_METADATA = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.__len__),
    *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex),
    *(torch.numel, Tensor.get_device, Tensor.element_size, Tensor.is_inference, Tensor.__hash__),
    *(
        getattr(Tensor, name).__get__
        for name in (
            *("shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_cpu", "is_sparse"),
            *("is_quantized", "is_nested", "is_meta", "is_mkldnn", "is_xpu", "is_mps", "itemsize"),
            *("nbytes", "names", "_is_view", "requires_grad", "grad_fn", "is_leaf", "output_nr"),
        )
        if hasattr(getattr(Tensor, name, None), "__get__")
    ),
}
