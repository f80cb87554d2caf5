"""Partial FC in dense PyTorch operations: for ``faithful=True``, and as a benchmark baseline.

A head with sharded classes and all (B, C_local) logits: gather the rows, multiply, exponentiate,
sum over the processes (Deng et al., arXiv 1801.07698; An et al., CVPR 2022). Our own implementation
of what insightface's ``partial_fc_v2.py`` computes, its quirks included:

- a row's loss is capped at ``-log(1e-30)`` = 69.08, its gradient is that of the uncapped loss;
- the mean is over all rows, and a row whose label is no class is pushed away from every class;
- the gradient of the embeddings is multiplied by the number of processes.

``group=None`` is one process alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmargin.distributed import collectives
from fastmargin.first_order import first_order
from fastmargin.sampling import Sample

SMALLEST_PROBABILITY = 1e-30


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, group) -> Tensor:
        ctx.group = group
        return collectives.gather_stacked(rows, group).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ranks = 1 if ctx.group is None else ctx.group.size()
        return collectives.scatter_sum(grad, ctx.group)() * ranks, None


def gather(rows: Tensor, group) -> Tensor:
    """(R * b, ...) of all processes, which have b rows each.

    The gradient is the sum over the processes times their number: DDP takes a mean afterwards.
    """
    return _Gather.apply(rows, group)


def local_labels(labels: Tensor, start: int, count: int) -> Tensor:
    """Positions (B,) of global labels among ``count`` classes from ``start`` on; -1 elsewhere."""
    here = (labels >= start) & (labels < start + count)
    return torch.where(here, labels - start, -1)


class PlainSampler:
    """Draws the classes of a step by one random number per class.

    All positives of the batch, and random negatives up to ``num_sampled``; if there are more
    positives than that, only these. Same interface as :class:`fastmargin.sampling.ClassSampler`.

    Args:
        num_classes: of this shard. num_sampled: at most so many. class_start: the first one.
        device: whose default generator is drawn from.
    """

    def __init__(self, num_classes: int, num_sampled: int, class_start: int, device="cpu") -> None:
        self.num_classes, self.num_sampled = num_classes, num_sampled
        self.class_start, self.device = class_start, torch.device(device)

    @torch.no_grad()
    def draw(self, labels: Tensor, backend: str = "auto") -> Sample:
        """The rows for labels (B,); ``index`` is ascending and has no padding slots."""
        own = local_labels(labels, self.class_start, self.num_classes)
        index = own[own >= 0].unique()
        count = torch.tensor(len(index))
        if len(index) <= self.num_sampled:
            order = torch.rand(self.num_classes, device=self.device).to(labels.device)
            order[index] = 2.0  # more than any other
            index = order.topk(self.num_sampled).indices.sort().values
        column = torch.where(own >= 0, torch.searchsorted(index, own), -1)
        return Sample(index, column, count)


def cosines(rows: Tensor, weight: Tensor) -> Tensor:
    """(B, K) of rows (B, D), as they are, with the directions of weight (K, D)."""
    return F.linear(rows, F.normalize(weight))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, group) -> Tensor:
        top = collectives.max_all(logits.amax(1, keepdim=True), group)
        # in place, as in the original: one (B, K) tensor from here to the end of the backward
        share = logits.detach().sub_(top).exp_()
        share /= collectives.sum_all(share.sum(1, keepdim=True), group)
        (row,) = torch.where(labels >= 0)
        own = share.new_zeros(len(share))
        own[row] = share[row, labels[row]]
        own = collectives.sum_all(own, group)
        ctx.save_for_backward(share, row, labels[row])
        return -own.clamp_min(SMALLEST_PROBABILITY).log().mean()

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        share, row, column = ctx.saved_tensors
        share[row, column] -= 1
        return share.mul_(grad / len(share)), None, None


def cross_entropy(logits: Tensor, labels: Tensor, group) -> Tensor:
    """Mean over B rows of ``-log(max(p, 1e-30))``, p the softmax over the classes of all processes.

    Args:
        logits: (B, K) of the rows of all processes with the classes that are here; overwritten.
        labels: (B,) positions among these; -1 where the class is elsewhere.
        group: the processes over which the classes are sharded.

    Returns:
        Scalar, the same on all. Its gradient is ``(p - one_hot) / B`` for every row; backward runs
        once, since it overwrites the softmax.
    """
    return _CrossEntropy.apply(logits, labels, group)
