"""Rows of tensors, in chunks that bound every temporary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmargin.rounding import narrowed, write_back

CHUNK_BYTES = 32 << 20
"""Maximum bytes of one temporary; about six are alive at a time."""


def as_rows(tensor: Tensor) -> Tensor:
    """A view with rows; a scalar is one row."""
    return tensor if tensor.dim() else tensor[None]


def chunk_rows(rows: Tensor, dtype: torch.dtype) -> int:
    """Rows of a tensor (C, ...) per chunk, in this dtype."""
    row_bytes = (rows.numel() // max(1, rows.shape[0])) * dtype.itemsize
    return max(1, CHUNK_BYTES // max(1, row_bytes))


def beside(columns: Tensor, rows: Tensor) -> Tensor:
    """Columns (n, K) in the dtype of rows (K, ...), shaped (n, K, 1, ...) to broadcast."""
    return columns.to(rows.dtype).reshape(*columns.shape, *[1] * (rows.dim() - 1))


def gather(tensors: list[Tensor], ids: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Copies of the rows ``ids`` (K,) of every tensor."""
    return [tensor.index_select(0, ids).to(dtype) for tensor in tensors]


def scatter(tensors: list[Tensor], ids: Tensor, rows: list[Tensor], key: int | None) -> None:
    """Writes rows back; a row that occurs twice must come with the same values twice.

    key: of :func:`fastmargin.rounding.narrowed`.
    """
    for tensor, values in zip(tensors, narrowed(rows, tensors, ids, key), strict=True):
        tensor.index_copy_(0, ids, values)


def slices(
    tensors: list[Tensor], dtype: torch.dtype, key: int | None
) -> Iterator[tuple[int, int, list[Tensor]]]:
    """All rows in chunks: ``start``, ``stop``, and rows to modify, written back if copied.

    key: of :func:`fastmargin.rounding.narrowed`.
    """
    size = chunk_rows(tensors[0], dtype)
    for start in range(0, tensors[0].shape[0], size):
        stop = min(start + size, tensors[0].shape[0])
        views = [tensor[start:stop] for tensor in tensors]
        rows = [view.to(dtype) for view in views]
        yield start, stop, rows
        numbers = torch.arange(start, stop, device=tensors[0].device)
        write_back(views, rows, numbers, key)


def merged_rows(grad: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Rows of a sparse gradient in chunks, duplicates added in order of occurrence.

    Shapes do not depend on the values of the indices, so nothing waits for them: a row that occurs
    n times in a chunk is returned n times, each time with the whole sum.

    Args:
        grad: sparse (C, ...) with one sparse dimension.
        dtype: type of the sums.

    Yields:
        ids: (K,) row numbers, ascending.
        values: (K, ...) the gradient of each; do not write to it.
        unfinished: None, or a bool scalar: the last row continues in the next chunk, and its sum
            here is only partial.
    """
    ids, values = grad._indices()[0], grad._values()
    count, size = ids.shape[0], chunk_rows(values, dtype)
    if grad.is_coalesced():
        for start in range(0, count, size):
            part = slice(start, start + size)
            yield ids[part], values[part].to(dtype), None
        return
    ids, order = ids.sort(stable=True)
    carry = None
    for start in range(0, count, size):
        stop = min(start + size, count)
        here = ids[start:stop]
        group = torch.zeros_like(here)
        torch.cumsum(here[1:] != here[:-1], 0, out=group[1:])
        total = torch.zeros((stop - start, *values.shape[1:]), dtype=dtype, device=values.device)
        if carry is not None:
            # first, so that the order of the sum does not depend on the chunk size
            total[0] = torch.where(ids[start] == ids[start - 1], carry, 0)
        part = values.index_select(0, order[start:stop]).to(dtype)
        if part.is_cuda:
            # sorts stably and adds one after the other; index_add_ would use atomics
            total.index_put_((group,), part, accumulate=True)
        else:
            total.index_add_(0, group, part)
        carry = total.index_select(0, group[-1:])[0]
        unfinished = ids[stop] == ids[stop - 1] if stop < count else None
        yield here, total.index_select(0, group), unfinished
