"""Gathering the rows of all shards, and returning each process its own."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmargin.distributed import collectives
from fastmargin.distributed.shard import ClassShard

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EMBEDDINGS, WEIGHT = 1, 2
"""Which gradients a process needs, as bits."""


@dataclass(frozen=True)
class Batch:
    """Layout of the gathered (R * b, ...): b rows of each process, padded with labels of -1.

    rows: b. own: slice of this process's n <= b rows. dtype: of its embeddings. wants_grad:
    whether any process needs gradients of embeddings.
    """

    rows: int
    own: slice
    dtype: torch.dtype
    wants_grad: bool

    def blocks(self, values: Tensor) -> tuple[Tensor, ...]:
        """The (b, ...) of every process, from the (R * b, ...) of all."""
        return values.split(self.rows)


@contextlib.contextmanager
def announced(shard: ClassShard | None, device: torch.device, batch_size: int | None):
    """If a check inside raises, tells the other processes, which would otherwise wait for this one.

    Has no effect if ``batch_size`` is set, which avoids that exchange.
    """
    try:
        yield
    except (TypeError, ValueError, RuntimeError):
        if shard is not None and batch_size is None:
            _facts([0, 0, 0, 0], shard, device)
        raise


def _facts(own: list[int], shard: ClassShard, device: torch.device) -> list[list[int]]:
    """A few integers of every process; synchronises with the device, as the host needs them."""
    facts = collectives.gather_stacked(torch.tensor(own, device=device), shard.group)
    return collectives.gather_stacked(facts, shard.replicas).flatten(0, 1).tolist()


def _agreed(embeddings: Tensor, wants: int, shard: ClassShard) -> tuple[int, int]:
    """The largest row count, and which gradients are needed, once all inputs are consistent."""
    own = [*embeddings.shape, 1 + FLOATS.index(embeddings.dtype), wants]
    facts = _facts(own, shard, embeddings.device)
    refused = [process for process, (_, _, kind, _) in enumerate(facts) if kind == 0]
    if refused:
        raise collectives.ProcessError(
            f"the input of process {refused[0]} of the group was refused; its error says why"
        )
    kinds = sorted({f"{dim} of {FLOATS[kind - 1]}" for _, dim, kind, _ in facts})
    if len(kinds) > 1:
        raise ValueError(f"embeddings: the rows of different processes differ: {kinds}")
    rows = max(count for count, *_ in facts)
    if rows == 0:
        raise ValueError("embeddings are an empty batch on every process: skip the step")
    # an empty batch may have no autograd graph
    wanted = {wants & EMBEDDINGS for count, *_, wants in facts if count > 0}
    of_weight = {wants & WEIGHT for *_, wants in facts} if shard.replicas is not None else ()
    for name, values in (("embeddings", wanted), ("weight", of_weight)):
        if len(values) > 1:
            raise ValueError(
                f"{name}: some processes want a gradient and others do not, for whom they would "
                "wait: requires_grad must be alike on all"
            )
    return rows, wanted.pop()


def gather(
    embeddings: Tensor,
    labels: Tensor,
    shard: ClassShard,
    batch_size: int | None,
    weight_wants_grad: bool = False,
) -> tuple[Tensor, Tensor, Batch]:
    """Embeddings (R * b, D) and labels (R * b,) of all shards, in one exchange; no gradient.

    Processes may have different numbers of rows, also none; ``batch_size``, the most that any has
    in any step, avoids a small exchange before, for which the host waits.

    Raises:
        ValueError: more rows than ``batch_size``; embedding size, dtype or what wants a gradient
            differ between processes.
        ProcessError: the input of another process was refused.
    """
    count = embeddings.shape[0]
    enabled = torch.is_grad_enabled()
    wants = EMBEDDINGS * (enabled and embeddings.requires_grad)
    if batch_size is None:
        wants |= WEIGHT * (enabled and weight_wants_grad)
        rows, wants = _agreed(embeddings, wants, shard)
    else:
        rows = batch_size
    if count > rows:
        raise ValueError(
            f"embeddings have {count} rows, but the head was made for batch_size={batch_size}: "
            "make it with the largest number of rows that a process has"
        )
    labels, x = gather_padded(labels, embeddings, rows=rows, shard=shard)
    start = shard.rank * rows
    batch = Batch(rows, slice(start, start + count), embeddings.dtype, bool(wants & EMBEDDINGS))
    return x, labels, batch


def gather_padded(labels: Tensor, *tensors: Tensor, rows: int, shard: ClassShard) -> list[Tensor]:
    """(R * rows, ...) of labels and others, in one exchange; missing rows have the label -1."""
    missing = rows - labels.shape[0]
    labels = F.pad(labels, (0, missing), value=-1)
    padded = [F.pad(t.detach(), (*(0, 0) * (t.dim() - 1), 0, missing)) for t in tensors]
    gathered = collectives.gather_packed((labels, *padded), shard.group)
    return [tensor.flatten(0, 1) for tensor in gathered]


def most_rows(rows: Tensor, shard: ClassShard) -> int:
    """The largest number of rows (n, D) of any process."""
    return _agreed(rows, 0, shard)[0]


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, batch: Batch, shard: ClassShard) -> Tensor:
        ctx.batch, ctx.shard = batch, shard
        return values[batch.own].clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        padded = F.pad(grad, (0, ctx.batch.rows - grad.shape[0]))
        return collectives.gather_stacked(padded, ctx.shard.group).flatten(), None, None


def own_rows(values: Tensor, batch: Batch, shard: ClassShard) -> Tensor:
    """This process's rows of ``values`` (R * b,), which are the same on all.

    The backward gathers the upstream gradients of all processes.
    """
    return _OwnRows.apply(values, batch, shard)


class _SumOfReplicas(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, shard: ClassShard) -> Tensor:
        return collectives.sum_all(value, shard.replicas)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def sum_of_replicas(value: Tensor, shard: ClassShard) -> Tensor:
    """The sum over the replicas' batches, on each of them; the gradient passes through."""
    return _SumOfReplicas.apply(value, shard)


def nearest_of_shards(cosine: Tensor, label: Tensor, shard: ClassShard) -> tuple[Tensor, Tensor]:
    """The k nearest centres over all shards, best first, from the (B, k) of this one.

    ``label``: local class ids as input, global ones as output; -1: none.
    """
    k = cosine.shape[1]
    label = torch.where(label >= 0, label + shard.start, -1)
    cosine, label = collectives.gather_packed((cosine, label), shard.group)
    # shards are in the order of their classes: a stable sort gives ties to the lower class
    cosine, place = cosine.transpose(0, 1).flatten(1).sort(dim=1, descending=True, stable=True)
    return cosine[:, :k], label.transpose(0, 1).flatten(1).gather(1, place[:, :k])
