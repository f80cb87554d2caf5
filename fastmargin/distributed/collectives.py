"""The collectives. ``group=None`` is this process alone, where each is the identity."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def _either(*names: str) -> Callable | None:
    """The first of these that torch.distributed has: torch 2.13 renamed some."""
    return next((getattr(dist, name) for name in names if hasattr(dist, name)), None)


_all_gather = _either("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _either("reduce_scatter_single", "reduce_scatter_tensor")


class ProcessError(RuntimeError):
    """A collective failed: another process has died, hangs, or called something else."""


@contextlib.contextmanager
def named(what: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Adds to an error which exchange failed and where to look; backends only name a socket."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"{what} between {group.size()} processes failed on rank {dist.get_rank()}: "
            f"{str(error).splitlines()[0]}. Most often another one has died or did not come here "
            "in time; the log of the one that ended first has the cause"
        ) from error


def world() -> dist.ProcessGroup | None:
    """The default group; None if there is none or it has one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def ranks_of(group: dist.ProcessGroup) -> list[int]:
    """Ranks in the default group of a group's processes."""
    return dist.get_process_group_ranks(group)


def rank_in(group: dist.ProcessGroup | None) -> int:
    """This process's rank in a group."""
    return 0 if group is None else dist.get_rank(group)


def sum_all(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of all processes' tensors of one shape; no gradient. Alone, the tensor itself."""
    return _reduced(tensor, dist.ReduceOp.SUM, group, "the sum")


def max_all(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The largest of all processes' tensors of one shape; no gradient. Alone, the tensor itself."""
    return _reduced(tensor, dist.ReduceOp.MAX, group, "the maximum")


def _reduced(tensor: Tensor, operation, group: dist.ProcessGroup | None, what: str) -> Tensor:
    if group is None:
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    with named(what, group):
        dist.all_reduce(total, operation, group=group)
    return total


def gather_stacked(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(R, ...) the tensors of all processes, which have one shape; no gradient."""
    if group is None:
        return tensor.detach()[None]
    gathered = tensor.new_empty((group.size() * tensor.numel(),))
    with named("the gathering", group):
        _all_gather(gathered, tensor.detach().contiguous().flatten(), group=group)
    return gathered.view(group.size(), *tensor.shape)


def gather_packed(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """:func:`gather_stacked` of several tensors of any dtypes, in one exchange."""
    if group is None:
        return [tensor.detach()[None] for tensor in tensors]
    parts = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors]
    gathered = gather_stacked(torch.cat(parts), group)
    return [
        part.contiguous().view(tensor.dtype).view(group.size(), *tensor.shape)
        for part, tensor in zip(
            gathered.split([part.numel() for part in parts], dim=1), tensors, strict=True
        )
    ]


def scatter_sum(rows: Tensor, group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    """Starts a reduce-scatter of ``rows`` (R * b, D); call the result to wait for the (b, D)."""
    if group is None:
        return lambda: rows
    own = rows.new_empty((rows.shape[0] // group.size(), *rows.shape[1:]))
    rows = rows.contiguous()
    with named("the sum of gradients", group):
        work = _reduce_scatter(own, rows, group=group, async_op=True)

    def wait() -> Tensor:
        with named("the sum of gradients", group):
            work.wait()
        return own

    return wait


def exchange_rows(
    rows: Tensor, sent: Sequence[Tensor], received: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Sends ``rows[sent[r]]`` to process r; returns the rows received from all, in rank order.

    ``received``: number of rows from each.
    """
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    counts = [index.numel() for index in sent]
    outgoing = rows.detach()[torch.cat(list(sent)).to(rows.device)].contiguous()
    with named("the exchange of rows", group):
        dist.all_to_all_single(out, outgoing, list(received), counts, group=group)
    return out


def send_to_first(tensor: Tensor, rank: int, group: dist.ProcessGroup) -> None:
    """Copies a tensor of process ``rank`` into that of process 0; others do nothing."""
    here = dist.get_rank(group)
    with named("the sending of rows", group):
        if here == rank:
            dist.send(tensor, dist.get_global_rank(group, 0), group=group)
        elif here == 0:
            dist.recv(tensor, dist.get_global_rank(group, rank), group=group)
