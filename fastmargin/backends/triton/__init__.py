"""Kernels in Triton, for NVIDIA GPUs from compute capability 8.0 on.

Importing this package needs neither Triton nor a GPU: the kernels are imported when an operation
is first run. With ``TRITON_INTERPRET=1``, set before Python starts, they run slowly on the CPU.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import torch
from torch import Tensor

from fastmargin.backends.composed import Composed
from fastmargin.spec import (
    GradientFactors,
    HardRule,
    HingeForm,
    MarginForm,
    NormEma,
    RowStats,
    SgdUpdate,
    SoftmaxLoss,
)

_LEAST_CAPABILITY = (8, 0)
MAX_COLUMNS = 1 << 30
"""Most columns, since a column and a sign share an int32."""


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend(Composed):
    """Fused passes over the class centres; see the files of this package, one per kernel."""

    name = "triton"
    precisions = ("fp32", "tf32", "bf16", "fp16")
    max_dim, max_k = 1024, 16  # what the tiles and registers hold
    note = ""

    def unavailable(self) -> str | None:
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed; `pip install triton` on Linux"
        if _interpreted() or torch.cuda.is_available():
            return None
        return (
            "there is no CUDA device; TRITON_INTERPRET=1, set before Python starts, runs the"
            " kernels on the CPU, slowly, for tests"
        )

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype == torch.float64:
            return "the kernels compute in float32; use backend='reference' for float64"
        if device.type == "cuda":
            found = torch.cuda.get_device_capability(device)
            if torch.version.hip is None and found < _LEAST_CAPABILITY:
                return f"it needs compute capability 8.0, {device} has {found[0]}.{found[1]}"
            return None
        if device.type == "cpu" and _interpreted():
            return None
        return (
            f"it takes CUDA tensors, got {device.type}; CPU tensors only under TRITON_INTERPRET=1,"
            " set before Python starts"
        )

    def row_prologue(
        self, x: Tensor, labels: Tensor | None, ema: NormEma | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from fastmargin.backends.triton.row_prologue import norm_statistics, unit_rows

        labels = _contiguous(labels)
        x_hat, _, norm = unit_rows(x, labels)
        if ema is None:
            return x_hat, norm, x_hat.new_empty(0), x_hat.new_empty(0)
        return x_hat, norm, *norm_statistics(norm, labels, ema)

    def row_stats(
        self,
        x_hat: Tensor,
        weight: Tensor,
        index: Tensor | None,
        labels: Tensor,
        scale: float,
        hard: HardRule | None,
        class_start: int,
        want_pull: bool,
        precision: str,
    ) -> RowStats:
        b = x_hat.shape[0]
        if b == 0 or _columns(weight, index) == 0:
            none = x_hat.new_full((b,), -math.inf)
            pull = x_hat.new_zeros(x_hat.shape if want_pull else (0, x_hat.shape[1]))
            return RowStats(none, x_hat.new_zeros(b), none.clone(), pull)
        precision, x_hat, labels, hard = _operands(precision, x_hat, labels, hard)
        x = _as_operand(x_hat, precision)
        rest = labels, scale, hard, class_start, want_pull, precision
        return _row_stats(x_hat, x, weight, _contiguous(index), *rest)[0]

    def row_stats_backward(self, weight: Tensor, part: GradientFactors) -> Tensor:
        if part.x_hat.shape[0] == 0 or _columns(weight, part.index) == 0:
            columns = weight if part.index is None else part.index
            shape = columns.shape[0], weight.shape[1]
            return torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        return _centre_pass(weight, part)

    def centre_step(
        self, weight: Tensor, momentum: Tensor | None, update: SgdUpdate, part: GradientFactors
    ) -> None:
        from fastmargin.backends.triton.centre_pass import steps_in_place

        nothing = part.x_hat.shape[0] == 0 or _columns(weight, part.index) == 0
        if nothing or not steps_in_place(weight, momentum):
            super().centre_step(weight, momentum, update, part)
            return
        _centre_pass(weight, part, update, momentum)

    def row_topk(
        self,
        x_hat: Tensor,
        weight: Tensor,
        index: Tensor | None,
        labels: Tensor,
        k: int,
        class_start: int,
        precision: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from fastmargin.backends.triton.centres import centres_of
        from fastmargin.backends.triton.topk import topk

        b = x_hat.shape[0]
        if b == 0 or _columns(weight, index) == 0:
            none = torch.full((b, k), -1, dtype=torch.int64, device=x_hat.device)
            return x_hat.new_full((b, k), -math.inf), none, x_hat.new_zeros(b)
        precision, x_hat, labels, _ = _operands(precision, x_hat, labels, None)
        index = _contiguous(index)
        return topk(
            x_hat,
            _as_operand(x_hat, precision),
            centres_of(weight, index, precision),
            weight,
            index,
            labels,
            k,
            class_start,
            precision,
        )

    def row_prologue_backward(
        self,
        d_x_hat: Tensor,
        d_norm: Tensor | None,
        x_hat: Tensor,
        norm: Tensor,
        x_dtype: torch.dtype,
    ) -> Tensor:
        from fastmargin.backends.triton.row_gradients import through_norm

        return through_norm(d_x_hat, *map(_contiguous, (d_norm, x_hat, norm)), x_dtype)

    def row_stats_backward_x(
        self,
        d_lse: Tensor,
        d_cos: Tensor,
        pull: Tensor,
        weight: Tensor,
        index: Tensor | None,
        labels: Tensor,
        scale: float,
        class_start: int,
    ) -> Tensor:
        from fastmargin.backends.triton.row_gradients import through_stats

        d_lse, d_cos, pull = map(_contiguous, (d_lse, d_cos, pull))
        rest = _contiguous(index), _contiguous(labels), scale, class_start
        return through_stats(d_lse, d_cos, pull, weight, *rest)

    def hinge_loss(
        self,
        cos_y: Tensor,
        nearest: Tensor,
        labels: Tensor,
        num_classes: int,
        form: HingeForm,
        reduction: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        from fastmargin.backends.triton.hinge_loss import hinge_loss

        return hinge_loss(cos_y, nearest, labels, num_classes, form, reduction)

    def row_topk_backward(
        self,
        d_top: Tensor,
        d_cos: Tensor,
        x_hat: Tensor,
        weight: Tensor,
        index: Tensor | None,
        labels: Tensor,
        nearest: Tensor,
        class_start: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from fastmargin.backends.triton.topk_backward import topk_backward

        d_top, d_cos, x_hat = (t.contiguous() for t in (d_top, d_cos, x_hat))
        labels, nearest, index = (_contiguous(t) for t in (labels, nearest, index))
        return topk_backward(d_top, d_cos, x_hat, weight, index, labels, nearest, class_start)

    def margin_rows(
        self, cos_y: Tensor, lse_neg: Tensor, norm: Tensor, labels: Tensor, form: MarginForm
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        from fastmargin.backends.triton.margin_rows import margin_rows

        return margin_rows(
            cos_y.contiguous(), lse_neg.contiguous(), norm.contiguous(), labels.contiguous(), form
        )

    def softmax_loss(
        self,
        x: Tensor,
        weight: Tensor,
        index: Tensor | None,
        labels: Tensor,
        columns: Tensor,
        class_start: int,
        num_classes: int,
        form: MarginForm,
        ema: NormEma | None,
        reduction: str,
        want_pull: bool,
        precision: str,
    ) -> SoftmaxLoss:
        from fastmargin.backends.triton.configs import resolve_precision
        from fastmargin.backends.triton.margin_loss import margin_loss
        from fastmargin.backends.triton.row_prologue import unit_rows

        labels, columns, index = (_contiguous(t) for t in (labels, columns, index))
        if x.shape[0] == 0 or _columns(weight, index) == 0:
            rest = class_start, num_classes, form, ema, reduction, want_pull, precision
            return super().softmax_loss(x, weight, index, labels, columns, *rest)
        precision = resolve_precision(precision, _interpreted())
        x_hat, operand, norm = unit_rows(x, labels, precision)
        stats, centres, inverse = _row_stats(
            x_hat,
            operand,
            weight,
            index,
            columns,
            form.scale,
            None,
            class_start,
            want_pull,
            precision,
        )
        loss, share, valid, rows, by_cos, by_lse, by_norm, margin = margin_loss(
            stats.cos_y, stats.lse_neg, norm, labels, num_classes, form, ema, reduction
        )
        return SoftmaxLoss(
            loss,
            share,
            rows,
            valid,
            stats.cos_y,
            stats.max_neg,
            norm,
            margin,
            stats.lse_neg,
            by_cos,
            by_lse,
            by_norm,
            x_hat,
            stats.pull,
            x_hat.new_empty(0) if operand is x_hat else operand,
            centres,
            inverse,
        )

    def softmax_loss_backward(
        self,
        d_loss: Tensor,
        made: SoftmaxLoss,
        weight: Tensor,
        index: Tensor | None,
        columns: Tensor,
        class_start: int,
        scale: float,
        x_dtype: torch.dtype,
        want_x: bool,
        want_weight: bool,
        row_tolerance: float,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, tuple[Tensor, ...]]:
        from fastmargin.backends.triton.rows_backward import rows_backward

        columns, index = _contiguous(columns), _contiguous(index)
        d_x, d_lse, d_cos, *own = rows_backward(
            d_loss,
            made,
            weight,
            index,
            columns,
            class_start,
            scale,
            x_dtype,
            want_x,
            want_weight,
            row_tolerance,
        )
        return d_x, d_lse, d_cos, tuple(own) if want_weight else ()

    def permutation(self, key: Tensor, size: int, count: int) -> Tensor:
        from fastmargin.backends.triton.permutation import permutation

        return permutation(key.contiguous(), size, count)

    def sample(self, labels: Tensor, *about) -> tuple[Tensor, Tensor, Tensor]:
        from fastmargin.backends.triton.class_sample import MOST_ROWS, sample

        if labels.shape[0] > MOST_ROWS:
            return super().sample(labels, *about)
        return sample(labels.contiguous(), *about)

    def row_normals(self, seed: Tensor, step: Tensor, labels: Tensor, place: int) -> Tensor:
        from fastmargin.backends.triton.row_normals import row_normals

        return row_normals(seed, step, labels.contiguous(), place)


def _columns(weight: Tensor, index: Tensor | None) -> int:
    """Number of columns of the pass; 0 without centres.

    Raises:
        ValueError: more than the kernels can index.
    """
    columns = weight.shape[0] if index is None or weight.shape[0] == 0 else index.shape[0]
    if columns > MAX_COLUMNS:
        raise ValueError(
            f"weight: the Triton kernels take at most {MAX_COLUMNS:,} classes in one process, got "
            f"{columns:,}; share them out (group=...) or sample them (sample_rate=...)"
        )
    return columns


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _row_stats(
    x_hat: Tensor,
    operand: Tensor,
    weight: Tensor,
    index: Tensor | None,
    labels: Tensor,
    scale: float,
    hard: HardRule | None,
    class_start: int,
    want_pull: bool,
    precision: str,
) -> tuple[RowStats, Tensor, Tensor]:
    """``row_stats`` of the results of :func:`_operands` and unit rows in the operand type.

    Also returns the centres and their inverse norms, if the backward pass can reuse them.
    """
    from fastmargin.backends.triton.centres import centres_of, kept
    from fastmargin.backends.triton.configs import needs_shift
    from fastmargin.backends.triton.stats_finish import stats_finish
    from fastmargin.backends.triton.stats_forward import stats_forward

    columns = _columns(weight, index)
    bound = scale * (1.0 if hard is None else hard.bound)
    partials, last = stats_forward(
        operand,
        x_hat.shape[1],
        centres_of(weight, index, precision),
        columns,
        labels,
        scale,
        hard,
        class_start,
        precision,
        want_pull,
        needs_shift(bound, columns, precision, want_pull),
    )
    finished = stats_finish(x_hat, weight, index, labels, class_start, partials, hard)
    return RowStats(*finished), *kept(last, columns)


def _centre_pass(
    weight: Tensor,
    part: GradientFactors,
    update: SgdUpdate | None = None,
    momentum: Tensor | None = None,
) -> Tensor | None:
    """The gradient of the centres, or None if they are updated with it instead."""
    from fastmargin.backends.triton.centre_pass import centre_pass
    from fastmargin.backends.triton.centres import centres_again
    from fastmargin.backends.triton.own_rows import OwnRows, own_rows

    precision, x_hat, labels, hard = _operands(part.precision, part.x_hat, part.labels, part.hard)
    names = ("d_lse", "d_cos", "lse_neg", "index")
    same = {name: _contiguous(getattr(part, name)) for name in names}
    part = replace(part, precision=precision, x_hat=x_hat, labels=labels, hard=hard, **same)
    operand, *centres, own, level, code = part.kept or (x_hat.new_empty(0),) * 6
    rows = OwnRows(own, level, code) if own.numel() else own_rows(weight, part)
    operand = operand if operand.numel() else _as_operand(x_hat, precision)
    again = centres_again(weight, part.index, precision, *centres)
    return centre_pass(weight, part, rows, operand, again, update, momentum)


def _operands(
    precision: str, x_hat: Tensor, labels: Tensor, hard: HardRule | None
) -> tuple[str, Tensor, Tensor, HardRule | None]:
    """The precision, with "auto" resolved, and the per-row tensors as the kernels take them."""
    from fastmargin.backends.triton.configs import resolve_precision

    precision = resolve_precision(precision, _interpreted())
    if hard is not None:
        threshold = hard.threshold.to(torch.float32).contiguous()
        hard = HardRule(threshold, hard.coefficients.to(torch.float32), hard.bound)
    return precision, x_hat.contiguous(), labels.contiguous(), hard


def _as_operand(x_hat: Tensor, precision: str) -> Tensor:
    """Unit rows in the operand type, cast once: a cast in the kernels would cost registers."""
    from fastmargin.backends.triton.centres import as_operand

    return as_operand(x_hat, precision)


BACKEND = TritonBackend()
