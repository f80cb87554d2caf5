"""The loss as a function: checks, the rows' losses, the reduction."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastmargin import ops
from fastmargin.checks import check_inputs
from fastmargin.distributed import collectives
from fastmargin.margins import Margin, NearestMargin, SoftmaxMargin
from fastmargin.norms import advance, moments
from fastmargin.spec import RowStats

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class LossRows:
    """The loss of every row and what it was made of, each (B,); rows with label < 0 cost 0.

    ``margin`` is ``cos_y - psi`` in cosine units; zero for losses on the nearest negatives.
    """

    loss: Tensor
    valid: Tensor
    cos_y: Tensor
    max_neg: Tensor
    norm: Tensor
    margin: Tensor


def margin_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Margin,
    reduction: str = "mean",
    backend: str = "auto",
    precision: str = "auto",
    validate: bool | None = None,
) -> Tensor:
    """Margin loss of a batch against all class centres, without the (B, C) logits in memory.

    Equivalent to ``F.cross_entropy(s * edited, labels, ignore_index=-1)`` where ``edited`` is
    ``F.normalize(embeddings) @ F.normalize(weight).T`` with the margin on the target's entry.

    Args:
        embeddings: (B, D) raw, float16, bfloat16, float32 or float64; B >= 1.
        weight: (C, D) raw class centres, any strides.
        labels: (B,) or (B, 1) int64 or int32 in [-1, C); -1 is a row to ignore.
        margin: e.g. ``fm.ArcFace()``; its running state advances in training mode.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (B,).
        backend: "auto", or one of ``fm.backends.available()``.
        precision: operand type of the matrix products; sums and per-row values are float32
            always. "auto" is "fp32" on a CPU and "fp16" on a GPU, which for unit vectors has
            three bits more than "bf16" at the same speed; also "tf32".
        validate: check that labels are in range and embeddings finite. Default: the labels, where
            that costs no synchronisation (on CPU). On a GPU an unchecked label >= C makes the
            loss NaN.

    Returns:
        Scalar, or (B,) for "none"; float32 (float64 for float64 embeddings).

    Raises:
        TypeError, ValueError: an argument is not as above. Nothing has changed then.
        fm.backends.BackendError: the backend asked for cannot run.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    rows = loss_rows(embeddings, weight, labels, margin, backend, precision, validate)
    return reduce(rows, reduction)


def loss_rows(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Margin,
    backend: str = "auto",
    precision: str = "auto",
    validate: bool | None = None,
) -> LossRows:
    """:func:`margin_loss` before the reduction."""
    labels = check_inputs(embeddings, weight, labels, margin, precision, validate)
    margin.bind(*weight.shape, device=weight.device)
    # an ignored row may hold anything, NaN too: as zeros it takes part in nothing
    embeddings = torch.where((labels >= 0)[:, None], embeddings, 0)
    ema = margin.norm_ema() if margin.training else None
    shared = ema is not None and margin.stats == "global" and collectives.world_size() > 1
    x_hat, norm, mean, std = ops.row_prologue(
        embeddings, labels, None if shared else ema, backend=backend
    )
    softmax = isinstance(margin, SoftmaxMargin)
    pass_over_centres = _all_negatives if softmax else _nearest_negatives
    negatives = pass_over_centres(x_hat, weight, labels, margin, backend, precision)

    # state changes after the passes that can still fail, and before the margin that uses it
    if shared:
        mean, std = advance(ema, collectives.gather_stacked(moments(norm, labels, ema)))
    if ema is not None:
        margin.set_norm_ema(mean, std)
    if margin.training:
        margin.observe(x_hat.detach(), labels)

    if softmax:
        rows = _softmax_rows(negatives, norm, labels, margin, backend)
    else:
        rows = _nearest_rows(*negatives, norm, labels, margin)
    loss = rows.loss
    penalty = margin.penalty(_safe(norm, rows.valid))
    if penalty is not None:
        loss = loss + torch.where(rows.valid, penalty, 0)
    # a label out of range that was not checked: seen at once, at no synchronisation
    return replace(rows, loss=torch.where(labels < weight.shape[0], loss, torch.nan))


def reduce(rows: LossRows, reduction: str) -> Tensor:
    """Mean over the valid rows (0 without one), sum, or the rows themselves."""
    if reduction == "none":
        return rows.loss
    total = rows.loss.sum()
    return total if reduction == "sum" else total / rows.valid.sum().clamp_min(1)


def _all_negatives(x_hat, weight, labels, margin: SoftmaxMargin, backend, precision) -> RowStats:
    hard = None
    if type(margin).hard is not SoftmaxMargin.hard:
        hard = margin.hard(ops.target_cosine(x_hat, weight, labels))
    return ops.row_stats(
        x_hat, weight, labels, margin.s, hard, precision=precision, backend=backend
    )


def _nearest_negatives(x_hat, weight, labels, margin: NearestMargin, backend, precision):
    nearest, _, cos_y = ops.row_topk(
        x_hat, weight, labels, margin.top_k, precision=precision, backend=backend
    )
    return nearest, cos_y


def _softmax_rows(stats: RowStats, norm, labels, margin: SoftmaxMargin, backend) -> LossRows:
    valid = labels >= 0
    form = margin.kernel_form()
    if form is not None:
        loss, applied = ops.margin_rows(
            stats.cos_y, stats.lse_neg, norm, labels, form, backend=backend
        )
    else:
        psi = margin(stats.cos_y, _safe(norm, valid), labels)
        # not softplus, which drops what is below exp(-20)
        loss = -torch.nn.functional.logsigmoid(margin.s * psi - stats.lse_neg)
        loss = torch.where(valid, loss, 0)
        applied = torch.where(valid, (stats.cos_y - psi).detach(), 0)
    return LossRows(loss, valid, stats.cos_y, stats.max_neg, norm, applied)


def _safe(norm: Tensor, valid: Tensor) -> Tensor:
    """1 for ignored rows: a slope that is infinite at their norm of 0 would give 0 * inf."""
    return torch.where(valid, norm, 1)


def _nearest_rows(nearest, cos_y, norm, labels, margin: NearestMargin) -> LossRows:
    valid = labels >= 0
    loss = torch.where(valid, margin(cos_y, nearest), 0)
    return LossRows(loss, valid, cos_y, nearest[:, 0], norm, torch.zeros_like(norm))
