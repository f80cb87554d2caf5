"""C++ on the CPU: passes over the class centres without a (B, C) matrix (``csrc/cpu``).

Temporary buffers are a few packed copies of the batch, and per thread a block of centres and
partial results of the rows it works on, whatever the number of classes. The environment variable
``FASTMARGIN_CPU_CAPABILITY`` (scalar, avx2 or avx512), read once, selects the instruction set;
default: the best available.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from fastmargin.backends import _extension, _permutation, _rows
from fastmargin.backends.composed import Composed
from fastmargin.spec import GradientFactors, HardRule, MarginForm, NormEma, RowStats, SgdUpdate


@functools.cache
def _unavailable() -> str | None:
    reason = _extension.reason("_C")
    if reason:
        return reason
    try:
        torch.ops.fastmargin.cpu_capability()
    except RuntimeError as error:  # an invalid FASTMARGIN_CPU_CAPABILITY; cuts off the C++ location
        text = str(error).splitlines()[0]
        return text[max(0, text.find("FASTMARGIN_CPU_CAPABILITY")) :]
    return None


def _hard(hard: HardRule | None, dtype: torch.dtype):
    if hard is None:
        return None, 0.0, 0.0, 0.0
    return hard.threshold.to(dtype).contiguous(), *hard.coefficients.tolist()


def _without_zero_rows(part: GradientFactors) -> GradientFactors:
    """Drops the rows whose ``d_lse`` and ``d_cos`` are both 0, if ``skip_zero_rows`` is set."""
    if not part.skip_zero_rows:
        return part
    taken, hard = ((part.d_lse != 0) | (part.d_cos != 0)).nonzero().squeeze(1), part.hard
    if hard is not None:
        hard = replace(hard, threshold=hard.threshold[taken])
    names = ("d_lse", "d_cos", "x_hat", "labels", "lse_neg")
    rows = {name: getattr(part, name)[taken] for name in names}
    return replace(part, hard=hard, skip_zero_rows=False, **rows)


def _centre_pass(weight: Tensor, part: GradientFactors) -> tuple:
    """The leading arguments of both centre pass operators."""
    return (
        part.d_lse.contiguous(),
        part.d_cos.contiguous(),
        part.x_hat.contiguous(),
        weight,
        _contiguous(part.index),
        part.labels.contiguous(),
        part.lse_neg.contiguous(),
        part.scale,
        *_hard(part.hard, part.x_hat.dtype),
        part.class_start,
    )


def _in_rows(*tensors: Tensor | None) -> bool:
    """Whether the rows of all of them are contiguous."""
    return all(t is None or t.shape[1] == 1 or t.stride(1) == 1 for t in tensors)


def _contiguous(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()


class CpuBackend(Composed):
    name = "cpu"
    precisions = ("fp32",)
    max_dim = max_k = math.inf
    note = ""
    step_bytes = 2 << 20  # small, so that a chunk stays in cache

    def unavailable(self) -> str | None:
        return _unavailable()

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cpu" else f"it takes CPU tensors, got {device}"

    def row_prologue(self, x: Tensor, labels: Tensor | None, ema: NormEma | None):
        return _rows.row_prologue(torch.ops.fastmargin.cpu_row_prologue, x, labels, ema)

    def margin_rows(
        self, cos_y: Tensor, lse_neg: Tensor, norm: Tensor, labels: Tensor, form: MarginForm
    ):
        op = torch.ops.fastmargin.cpu_margin_rows
        return _rows.margin_rows(op, cos_y, lse_neg, norm, labels, form)

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
        lse_neg, cos_y, max_neg = (x_hat.new_empty(x_hat.shape[0]) for _ in range(3))
        pull = x_hat.new_empty(x_hat.shape if want_pull else (0, x_hat.shape[1]))
        torch.ops.fastmargin.cpu_row_stats(
            x_hat.contiguous(),
            weight,
            _contiguous(index),
            labels.contiguous(),
            scale,
            *_hard(hard, x_hat.dtype),
            class_start,
            lse_neg,
            cos_y,
            max_neg,
            pull if want_pull else None,
        )
        return RowStats(lse_neg, cos_y, max_neg, pull)

    def row_stats_backward(self, weight: Tensor, part: GradientFactors) -> Tensor:
        columns = weight if part.index is None else part.index
        d_weight = torch.empty((columns.shape[0], weight.shape[1]), dtype=weight.dtype)
        given = _centre_pass(weight, _without_zero_rows(part))
        torch.ops.fastmargin.cpu_row_stats_backward(*given, d_weight)
        return d_weight

    def centre_step(
        self, weight: Tensor, momentum: Tensor | None, update: SgdUpdate, part: GradientFactors
    ) -> None:
        part = _without_zero_rows(part)
        plain = update.rounding is None and (momentum is None or momentum.dtype == part.x_hat.dtype)
        if not (plain and _in_rows(weight, momentum)):
            super().centre_step(weight, momentum, update, part)
            return
        torch.ops.fastmargin.cpu_centre_step(
            *_centre_pass(weight, part),
            momentum,
            update.lr,
            update.momentum,
            update.weight_decay,
            update.nesterov,
        )

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
        values = x_hat.new_empty((x_hat.shape[0], k))
        nearest = x_hat.new_empty(values.shape, dtype=torch.int64)
        cos_y = x_hat.new_empty(x_hat.shape[0])
        torch.ops.fastmargin.cpu_row_topk(
            x_hat.contiguous(),
            weight,
            _contiguous(index),
            labels.contiguous(),
            class_start,
            values,
            nearest,
            cos_y,
        )
        return values, nearest, cos_y

    def permutation(self, key: Tensor, size: int, count: int) -> Tensor:
        out = torch.empty(count, dtype=torch.int64)
        side = _permutation.side_of(size)
        torch.ops.fastmargin.cpu_permutation(key.contiguous(), size, side, out)
        return out


BACKEND = CpuBackend()
