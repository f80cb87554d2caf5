"""Passes over class centres that several processes share out, and their gradients.

Forward: the batch is gathered, every process sees all rows and its own classes, and one sum of
(B, 2) over the processes makes the whole. Backward: one summing scatter brings each process the
gradient of its embeddings, under way while the centre pass runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmargin import margins, ops
from fastmargin.columns import Columns, merge
from fastmargin.distributed import collectives
from fastmargin.distributed.shard import ClassShard
from fastmargin.spec import HardRule, RowStats

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_LOGIT = 700.0
"""exp of it is still a float64: plain sums of exponentials need no maximum."""


@dataclass(frozen=True)
class Batch:
    """The rows of all shards, gathered: those of one process lie together, -1 labels pad them.

    x: (R * b, D) raw embeddings, zero where ignored. labels: (R * b,). rows: b. own: where this
    process's n <= b rows are.
    """

    x: Tensor
    labels: Tensor
    rows: int
    own: slice

    def blocks(self, values: Tensor) -> tuple[Tensor, ...]:
        """The (b, ...) of every process, from the (R * b, ...) of all."""
        return values.split(self.rows)


@contextlib.contextmanager
def announced(shard: ClassShard | None, device: torch.device, batch_size: int | None):
    """Tells the other processes if the checks inside refuse this one's input: they would wait.

    Without effect where ``batch_size`` spares that exchange.
    """
    try:
        yield
    except (TypeError, ValueError, RuntimeError):
        if shard is not None and batch_size is None:
            _facts([0, 0, 0], shard, device)
        raise


def _facts(own: list[int], shard: ClassShard, device: torch.device) -> list[list[int]]:
    """Three numbers of every process; this waits for the device, as the host needs them."""
    facts = collectives.gather_stacked(torch.tensor(own, device=device), shard.group)
    return collectives.gather_stacked(facts, shard.replicas).flatten(0, 1).tolist()


def _agreed_rows(embeddings: Tensor, shard: ClassShard) -> int:
    """The largest number of rows of a process, once all know that their inputs fit together."""
    own = [*embeddings.shape, 1 + FLOATS.index(embeddings.dtype)]
    facts = _facts(own, shard, embeddings.device)
    refused = [process for process, (_, _, kind) in enumerate(facts) if kind == 0]
    if refused:
        raise collectives.ProcessError(
            f"the input of process {refused[0]} of the group was refused; its error says why"
        )
    kinds = sorted({f"{dim} of {FLOATS[kind - 1]}" for _, dim, kind in facts})
    if len(kinds) > 1:
        raise ValueError(f"embeddings: the rows of different processes differ: {kinds}")
    rows = max(rows for rows, _, _ in facts)
    if rows == 0:
        raise ValueError("embeddings are an empty batch on every process: skip the step")
    return rows


def gather(embeddings: Tensor, labels: Tensor, shard: ClassShard, batch_size: int | None) -> Batch:
    """The batch of all shards, in one exchange.

    Processes may have different numbers of rows, also none; ``batch_size``, the most that any has
    in any step, spares a small exchange before, for which the host waits.

    Raises:
        ValueError: more rows than ``batch_size``; embedding size or dtype differ.
        ProcessError: the input of another process was refused.
    """
    count = embeddings.shape[0]
    rows = _agreed_rows(embeddings, shard) if batch_size is None else batch_size
    if count > rows:
        raise ValueError(
            f"embeddings have {count} rows, but the head was made for batch_size={batch_size}: "
            "make it with the largest number of rows that a process has"
        )
    x = F.pad(embeddings.detach(), (0, 0, 0, rows - count))
    y = F.pad(labels, (0, rows - count), value=-1)
    x, y = collectives.gather_packed((x, y), shard.group)
    start = shard.rank * rows
    return Batch(x.flatten(0, 1), y.flatten(), rows, slice(start, start + count))


def labels_of_all(labels: Tensor, shard: ClassShard) -> Tensor:
    """The labels of all shards' rows (R * b,), and of the replicas' rows."""
    return collectives.gather_stacked(labels, shard.replicas).flatten()


class Processes(margins.Processes):
    """The processes that train a classifier, for its margin.

    ``shard=None``: every process holds all classes, and the default group has other rows.
    """

    def __init__(self, shard: ClassShard | None) -> None:
        self.shard = shard

    def sum(self, tensor: Tensor) -> Tensor:
        peers = collectives.world() if self.shard is None else self.shard.replicas
        return collectives.sum_all(tensor, peers)

    def gather_classes(self, rows: Tensor) -> Tensor:
        return rows if self.shard is None else self.shard.gather_classes(rows)

    def gather_rows(self, labels: Tensor, rows: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        if self.shard is None:
            return labels, rows, *more
        most = _agreed_rows(rows, self.shard)
        short = most - rows.shape[0]
        labels = F.pad(labels, (0, short), value=-1)
        rest = [F.pad(t, (*(0, 0) * (t.dim() - 1), 0, short)) for t in (rows, *more)]
        gathered = collectives.gather_packed((labels, *rest), self.shard.group)
        return tuple(tensor.flatten(0, 1) for tensor in gathered)


class _OwnRows(torch.autograd.Function):
    """This process's part of values that all hold for all rows."""

    @staticmethod
    def forward(ctx, values: Tensor, batch: Batch, shard: ClassShard) -> Tensor:
        ctx.batch, ctx.shard = batch, shard
        return values[batch.own].clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        padded = F.pad(grad, (0, ctx.batch.rows - grad.shape[0]))
        return collectives.gather_stacked(padded, ctx.shard.group).flatten(), None, None


def own_rows(values: Tensor, batch: Batch, shard: ClassShard) -> Tensor:
    """This process's rows of ``values`` (R * b,); upstream gradients of all are gathered."""
    return _OwnRows.apply(values, batch, shard)


class _SumOfReplicas(torch.autograd.Function):
    """Adds up over replicas what each of them then holds: a gradient passes as it is."""

    @staticmethod
    def forward(ctx, value: Tensor, shard: ClassShard) -> Tensor:
        return collectives.sum_all(value, shard.replicas)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def sum_of_replicas(value: Tensor, shard: ClassShard) -> Tensor:
    """The sum over the replicas' batches; each then holds the whole, and its gradient."""
    return _SumOfReplicas.apply(value, shard)


@dataclass(frozen=True)
class Pass:
    """What a pass over the centres is about, besides its tensors.

    columns: disjoint parts of the centres that are here; targets are among the first part's.
    grad_factor: what the gradient of the embeddings is multiplied by. shard, batch: None where all
    classes are here.
    """

    columns: Sequence[Columns]
    precision: str
    backend: str
    sparse_grad: bool
    shard: ClassShard | None = None
    batch: Batch | None = None
    grad_factor: float = 1.0

    def options(self, column: Columns) -> dict:
        """Arguments of the operators of :mod:`fastmargin.ops` for one part."""
        return {
            "class_start": column.class_start,
            "precision": self.precision,
            "backend": self.backend,
            "index": column.index,
        }

    def embedding_gradient(self, arrived: Tensor, x_hat: Tensor, norm: Tensor, d_norm: Tensor):
        """Gradient (n, D) of the own embeddings, from that of their unit rows (b, D)."""
        own = self.batch.own
        arrived = arrived[: own.stop - own.start].contiguous()
        # every process has the whole gradient of the norms, so they are not summed
        d_x = ops.row_prologue_backward(arrived, d_norm[own], x_hat[own], norm[own])
        return (d_x * self.grad_factor).to(self.batch.x.dtype)


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
                want_pull=ctx.needs_input_grad[0],
                **task.options(column),
            )
            for column in task.columns
        ]
        own = merge(parts, task.columns)
        total = torch.stack([own.lse_neg.double().exp(), own.cos_y.double()], dim=1)
        total = collectives.sum_all(total, task.shard.group)
        lse_neg, cos_y = total[:, 0].log().to(x_hat), total[:, 1].to(x_hat)
        max_neg = collectives.max_all(own.max_neg, task.shard.group)
        share = torch.where(total[:, 0] > 0, (own.lse_neg - lse_neg).exp(), 0)
        rule = (None, None) if hard is None else (hard.threshold, hard.coefficients)
        ctx.save_for_backward(weight, x_hat, norm, lse_neg, share, own.pull, *rule)
        ctx.task, ctx.scale, ctx.bound = task, scale, 1.0 if hard is None else hard.bound
        ctx.mark_non_differentiable(max_neg)
        return lse_neg, cos_y, max_neg, norm.clone()

    @staticmethod
    def backward(ctx, d_lse, d_cos, _d_max_neg, d_norm):
        weight, x_hat, norm, lse_neg, share, pull, *rule = ctx.saved_tensors
        task, d_x, d_weight = ctx.task, None, None
        if ctx.needs_input_grad[0]:
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
            )
            arriving = collectives.scatter_sum(d_x_hat, task.shard.group)
        if ctx.needs_input_grad[1]:
            found = []
            for column in task.columns:
                lse = lse_neg if column.log_weight is None else lse_neg - column.log_weight
                rows = ops.row_stats_backward(
                    d_lse,
                    d_cos,
                    x_hat,
                    weight,
                    column.index,
                    column.labels,
                    ctx.scale,
                    *rule,
                    ctx.bound,
                    column.class_start,
                    lse,
                    task.precision,
                    task.backend,
                )
                found.append(collectives.sum_all(rows, task.shard.replicas))
            index = task.columns[0].index
            if index is not None:
                index = torch.cat([column.index for column in task.columns])
            d_weight = ops.spread_rows(torch.cat(found), index, weight, task.sparse_grad)
        if ctx.needs_input_grad[0]:
            d_x = task.embedding_gradient(arriving(), x_hat, norm, d_norm)
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
            torch.cat([own, cos_y[:, None]], dim=1), task.shard.group
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
        b, k = index.shape
        d_all = d_nearest.new_zeros((b, k * task.shard.ranks)).scatter(1, place, d_nearest)
        d_own = d_all[:, k * task.shard.rank :][:, :k].contiguous()
        d_x_hat, rows, touched = ops.row_topk_backward(
            d_own, d_cos, x_hat, weight, column.index, column.labels, index, column.class_start
        )
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            arrived = collectives.scatter_sum(d_x_hat, task.shard.group)()
            d_x = task.embedding_gradient(arrived, x_hat, norm, d_norm)
        if ctx.needs_input_grad[1]:  # replicas have other rows in reach, so theirs are listed, too
            rows, touched = collectives.gather_packed((rows, touched), task.shard.replicas)
            d_weight = ops.spread_rows(
                rows.flatten(0, 1), touched.flatten(), weight, task.sparse_grad, distinct=False
            )
        return d_x, d_weight, *(None,) * 4


def row_stats(
    embeddings: Tensor,
    weight: Tensor,
    x_hat: Tensor,
    norm: Tensor,
    scale: float,
    hard: HardRule | None,
    task: Pass,
) -> tuple[RowStats, Tensor]:
    """Statistics (R * b,) of all rows against all classes, and the norms with their gradient.

    Differentiable in this process's ``embeddings`` (n, D) and ``weight`` (C_local, D).

    Args:
        x_hat, norm: of the whole batch, without gradient.

    Raises:
        ValueError: the logits may exceed what plain sums of exponentials hold.
    """
    bound = scale * (1.0 if hard is None else hard.bound)
    if bound > MOST_LOGIT:
        raise ValueError(
            f"logits of up to {bound:g} (s times the bound of the hard rule) overflow the sum over "
            f"shards; the limit is {MOST_LOGIT:g}: use a smaller s"
        )
    *stats, norm = _Softmax.apply(embeddings, weight, x_hat, norm, scale, hard, task)
    return RowStats(*stats, x_hat.new_empty((0, x_hat.shape[1]))), norm


def row_topk(
    embeddings: Tensor, weight: Tensor, x_hat: Tensor, norm: Tensor, k: int, task: Pass
) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest negatives (R * b, k) of all rows, ``cos_y`` and norms; as :func:`row_stats`."""
    return _Nearest.apply(embeddings, weight, x_hat, norm, k, task)


def merge_nearest(cosine: Tensor, label: Tensor, shard: ClassShard) -> tuple[Tensor, Tensor]:
    """The k nearest centres of all shards, best first, from the (B, k) of this one.

    ``label`` counts this shard's classes on the way in and all classes on the way out; -1: none.
    """
    k = cosine.shape[1]
    label = torch.where(label >= 0, label + shard.start, -1)
    cosine, label = collectives.gather_packed((cosine, label), shard.group)
    cosine, place = cosine.transpose(0, 1).flatten(1).sort(dim=1, descending=True, stable=True)
    return cosine[:, :k], label.transpose(0, 1).flatten(1).gather(1, place[:, :k])
