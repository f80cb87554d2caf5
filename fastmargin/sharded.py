"""Passes over class centres sharded over several processes, and their gradients.

Forward: the batch is gathered, every process computes all rows against its own classes, and one
all-reduce of (B, 2) combines the shards. Backward: one reduce-scatter gives each process the
gradient of its embeddings, and overlaps with the centre pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmargin import factors, ops
from fastmargin.columns import Pass, merge
from fastmargin.distributed import collectives
from fastmargin.spec import GradientFactors, HardRule, RowStats

MOST_LOGIT = 709.0
"""Its exp is still finite in float64."""


def _embedding_gradient(
    task: Pass, arrived: Tensor, x_hat: Tensor, norm: Tensor, d_norm: Tensor | None
) -> Tensor:
    """Gradient (n, D) of this process's embeddings, from that of their padded unit rows (b, D)."""
    own = task.batch.own
    arrived = arrived[: own.stop - own.start]
    # every process has the whole gradient of the norms, so they are not summed
    d_norm = None if d_norm is None else d_norm[own]
    rows = x_hat[own], norm[own], x_hat.dtype
    d_x = ops.row_prologue_backward(arrived, d_norm, *rows, task.backend)
    return (d_x * task.classes.grad_factor).to(task.batch.dtype)


def _centre_gradient(
    weight: Tensor, parts: list[GradientFactors], task: Pass, node
) -> Tensor | None:
    """Gradient of this process's centres, over all replicas; None if stored as factors instead."""
    if task.classes.shard.replicas is None and factors.wanted(weight, node):
        for part in parts:
            factors.add(weight, part)
        return None
    rows = [
        collectives.sum_all(ops.centre_rows(weight, part), task.classes.shard.replicas)
        for part in parts
    ]
    index = parts[0].index
    if index is not None:
        index = torch.cat([part.index for part in parts])
    return ops.spread_rows(torch.cat(rows), index, weight, task.classes.sparse_grad)


class _Softmax(torch.autograd.Function):
    """Statistics of all rows against the centres of all shards."""

    @staticmethod
    def forward(ctx, embeddings, weight, x_hat, norm, scale: float, hard, task: Pass):
        parts = [
            ops.row_stats(
                x_hat,
                weight,
                column.labels,
                scale,
                hard,
                want_pull=task.batch.wants_grad,
                **task.options(column),
            )
            for column in task.columns
        ]
        own = merge(parts, task.columns)
        total = torch.stack([own.lse_neg.double().exp(), own.cos_y.double()], dim=1)
        total = collectives.sum_all(total, task.classes.shard.group)
        lse_neg, cos_y = total[:, 0].log().to(x_hat), total[:, 1].to(x_hat)
        max_neg = collectives.max_all(own.max_neg, task.classes.shard.group)
        share = torch.where(total[:, 0] > 0, (own.lse_neg - lse_neg).exp(), 0)
        *rule, ctx.bound = HardRule.split(hard)
        ctx.save_for_backward(weight, x_hat, norm, lse_neg, share, own.pull, *rule)
        ctx.task, ctx.scale = task, scale
        ctx.mark_non_differentiable(max_neg)
        ctx.set_materialize_grads(False)
        mark = norm.new_zeros(len(norm) if task.classes.row_tolerance > 0 else 0)
        return lse_neg, cos_y, max_neg, mark, norm.clone()

    @staticmethod
    def backward(ctx, d_lse, d_cos, _d_max_neg, miss, d_norm):
        weight, x_hat, norm, lse_neg, share, pull, *rule = ctx.saved_tensors
        task, d_x, d_weight = ctx.task, None, None
        d_lse, d_cos = (torch.zeros_like(norm) if d is None else d for d in (d_lse, d_cos))
        # what the processes agreed on, not what this one needs: else the others would wait
        if task.batch.wants_grad:
            first = task.columns[0]
            d_x_hat = ops.row_stats_backward_x(
                d_lse * share,
                d_cos,
                pull,
                weight,
                first.index,
                first.labels,
                ctx.scale,
                first.class_start,
                task.backend,
            )
            arriving = collectives.scatter_sum(d_x_hat, task.classes.shard.group)
        if ctx.needs_input_grad[1]:
            d_lse, d_cos = ops.without_confident(d_lse, d_cos, miss, task.classes.row_tolerance)
            parts = [
                GradientFactors(
                    d_lse=d_lse,
                    d_cos=d_cos,
                    x_hat=x_hat,
                    labels=column.labels,
                    lse_neg=lse_neg if column.log_weight is None else lse_neg - column.log_weight,
                    scale=ctx.scale,
                    hard=HardRule.build(*rule, ctx.bound),
                    skip_zero_rows=miss is not None and task.classes.row_tolerance > 0,
                    sparse_grad=task.classes.sparse_grad,
                    **task.options(column),
                )
                for column in task.columns
            ]
            d_weight = _centre_gradient(weight, parts, task, ctx.next_functions[1][0])
        if task.batch.wants_grad:
            d_x = _embedding_gradient(task, arriving(), x_hat, norm, d_norm)
        return d_x, d_weight, *(None,) * 5


class _Nearest(torch.autograd.Function):
    """The nearest negatives of all rows among the centres of all shards."""

    @staticmethod
    def forward(ctx, embeddings, weight, x_hat, norm, k: int, task: Pass):
        (column,) = task.columns
        own, index, cos_y = ops.row_topk(
            x_hat,
            weight,
            column.labels,
            k,
            **task.options(column),
        )
        found = collectives.gather_stacked(
            torch.cat([own, cos_y[:, None]], dim=1), task.classes.shard.group
        )
        candidates = found[:, :, :k].transpose(0, 1).flatten(1)
        # shards are in the order of their classes: a stable sort gives ties to the lower class
        nearest, place = candidates.sort(dim=1, descending=True, stable=True)
        ctx.save_for_backward(weight, x_hat, norm, index, place[:, :k])
        ctx.task = task
        return nearest[:, :k].contiguous(), found[:, :, k].sum(0), norm.clone()

    @staticmethod
    def backward(ctx, d_nearest, d_cos, d_norm):
        weight, x_hat, norm, index, place = ctx.saved_tensors
        task, (column,) = ctx.task, ctx.task.columns
        k = index.shape[1]
        # compared, since a scatter waits for the device under deterministic algorithms
        own = torch.arange(k, device=place.device) + k * task.classes.shard.rank
        chosen = place[:, None, :] == own[:, None]
        d_own = torch.where(chosen, d_nearest[:, None, :], 0).sum(2)
        d_x_hat, rows, touched = ops.row_topk_backward(
            d_own,
            d_cos,
            x_hat,
            weight,
            column.index,
            column.labels,
            index,
            column.class_start,
            task.backend,
        )
        d_x = d_weight = None
        if task.batch.wants_grad:
            arrived = collectives.scatter_sum(d_x_hat, task.classes.shard.group)()
            d_x = _embedding_gradient(task, arrived, x_hat, norm, d_norm)
        if ctx.needs_input_grad[1]:  # replicas reach other centres: gather theirs
            rows, touched = collectives.gather_packed((rows, touched), task.classes.shard.replicas)
            d_weight = ops.spread_rows(
                rows.flatten(0, 1),
                touched.flatten(),
                weight,
                task.classes.sparse_grad,
                distinct=False,
            )
        return d_x, d_weight, *(None,) * 4


def most_logit(num_classes: int) -> float:
    """Largest logit for which a sum over the classes needs no maximum subtracted in float64."""
    return MOST_LOGIT - math.log(num_classes)


def row_stats(
    embeddings: Tensor,
    weight: Tensor,
    x_hat: Tensor,
    norm: Tensor,
    scale: float,
    hard: HardRule | None,
    task: Pass,
) -> tuple[RowStats, Tensor]:
    """Statistics (R * b,) of all rows against all classes, and the norms (R * b,), differentiable.

    Differentiable in this process's ``embeddings`` (n, D) and ``weight`` (C_local, D).

    Args:
        x_hat, norm: (R * b, D) and (R * b,) of the gathered batch, without gradient.
        scale: s. hard: rule for hard negatives, or None. task: the pass.

    Raises:
        ValueError: plain sums of exponentials may overflow float64.
    """
    bound, limit = (
        scale * (1.0 if hard is None else hard.bound),
        most_logit(task.classes.shard.num_classes),
    )
    if bound > limit:
        raise ValueError(
            f"logits of up to {bound:g} (s times the bound of the hard rule) overflow the sum over "
            f"shards; the limit is {limit:.1f}: use a smaller s"
        )
    lse_neg, cos_y, max_neg, mark, norm = _Softmax.apply(
        embeddings, weight, x_hat, norm, scale, hard, task
    )
    return RowStats(lse_neg, cos_y, max_neg, x_hat.new_empty((0, x_hat.shape[1])), mark), norm


def row_topk(
    embeddings: Tensor, weight: Tensor, x_hat: Tensor, norm: Tensor, k: int, task: Pass
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines of the k nearest negatives (R * b, k), ``cos_y`` and norms; as :func:`row_stats`."""
    return _Nearest.apply(embeddings, weight, x_hat, norm, k, task)
