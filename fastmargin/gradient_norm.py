"""The norm of all gradients of a model: dense, sparse or sharded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmargin import factors
from fastmargin.distributed import collectives
from fastmargin.distributed.shard import shards_in
from fastmargin.norms import compute_dtype
from fastmargin.optim.row_chunks import merged_rows


@torch.no_grad()
def total_norm(*modules: nn.Module) -> Tensor:
    """Euclidean norm () of the gradients of all parameters of these modules, on their device.

    Like ``torch.nn.utils.get_total_norm``, but gradients may also be sparse (duplicate rows are
    added up first), DTensors (``fully_shard``), or of a head with sharded classes (also of
    :mod:`fastmargin.compat`): those are summed over the shards, replicas counted once. The result
    is the same on every process, and equals that of one process with all rows and classes, if the
    same holds for the other gradients (DDP). Then::

        norm = fm.total_norm(backbone, head)
        for module in (backbone, head):
            torch.nn.utils.clip_grads_with_norm_(module.parameters(), 5.0, norm)

    With sharded classes every process calls this. The host does not wait for the device.

    Raises:
        ValueError: the modules have no parameters, or one whose gradient is never formed
            (``fused=True`` of :class:`fastmargin.optim.RowSGD`).
    """
    shards = {
        module.get_parameter(name): shard
        for module in modules
        for name, shard in shards_in(module).items()
    }
    parameters = dict.fromkeys(p for module in modules for p in module.parameters())
    if not parameters:
        raise ValueError("total_norm needs modules with parameters, such as (backbone, head)")
    if any(map(factors.pending, parameters)):
        raise ValueError(
            "total_norm needs gradients, and an optimiser made with fused=True never forms those "
            "of its centres: make it with fused=False to clip them, or leave the head out"
        )
    device = next(iter(parameters)).device
    squares, whole, parted = [], [], []
    for parameter in parameters:
        grad = parameter.grad
        if parameter in shards:
            square = _square(grad) if grad is not None else torch.zeros((), device=device)
            squares.append(collectives.sum_all(square.double(), shards[parameter].group))
        elif grad is None:
            continue
        elif grad.is_sparse:
            squares.append(_square(grad))
        else:
            (parted if hasattr(grad, "full_tensor") else whole).append(grad)
    if whole:
        squares.append(torch.nn.utils.get_total_norm(whole).double().square())
    if parted:
        norm = torch.nn.utils.get_total_norm(parted).full_tensor()
        squares.append(norm.double().square())
    total = sum((square.to(device, torch.float64) for square in squares), torch.tensor(0.0))
    double = any(p.dtype == torch.float64 for p in parameters)
    return total.to(device, torch.float64 if double else torch.float32).sqrt()


def _square(grad: Tensor) -> Tensor:
    """Sum of squares () float64 of a gradient, sparse or not."""
    if not grad.is_sparse:
        return torch.linalg.vector_norm(grad, dtype=compute_dtype(grad.dtype)).double().square()
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    for ids, values, unfinished in merged_rows(grad, compute_dtype(grad.dtype)):
        # a row listed n times occurs n times here, each time with the sum: count it once
        counts = torch.ones_like(ids, dtype=torch.bool)
        torch.ne(ids[1:], ids[:-1], out=counts[1:])
        if unfinished is not None:
            counts &= ~(unfinished & (ids == ids[-1]))
        square = torch.linalg.vector_norm(values, dim=1).double().square()
        total += torch.where(counts, square, 0).sum()
    return total
