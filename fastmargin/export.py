"""Writes the class centres of all processes to a safetensors file, piece by piece."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import torch
from torch import Tensor

from fastmargin.distributed import agreement, collectives
from fastmargin.distributed.shard import ClassShard
from fastmargin.norms import unit

PIECE = 1 << 14
"""Rows in memory at a time."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class CentersFile:
    """A safetensors file with one tensor (C, D), "centers", written row by row.

    metadata: further entries of the file's metadata.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int],
        dtype: torch.dtype,
        metadata: dict[str, str] | None = None,
    ) -> None:
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}")
        self.error: OSError | None = None
        self.file = open(self.temporary, "wb")
        size = shape[0] * shape[1] * dtype.itemsize
        entry = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [0, size]}
        words = {"format": "pt", **(metadata or {})}
        header = json.dumps({"__metadata__": words, "centers": entry}).encode()
        header += b" " * (-len(header) % 8)
        self._put(struct.pack("<Q", len(header)) + header)

    def _put(self, data) -> None:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:  # e.g. a full disk; the other processes are still sending
                self.error = error

    def add(self, rows: Tensor) -> None:
        self._put(rows.cpu().contiguous().view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Renames the complete file to its final name; raises the first error of writing."""
        if self.error is not None:
            raise self.error
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.temporary, self.path)

    def close(self) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)


@torch.no_grad()
def write_centers(path: Path, weight: Tensor, normalized: bool, shard: ClassShard | None) -> None:
    """Writes all (C, D) centres to a file, as the tensor "centers"; the first process writes.

    Raises:
        OSError: the file cannot be written; an existing one stays as it is.
        ProcessError: the first process could not write it, or another one has died.
    """
    if shard is not None and shard.replica > 0:
        return
    group, rank, ranks = (None, 0, 1) if shard is None else (shard.group, shard.rank, shard.ranks)
    shape = (weight.shape[0] if shard is None else shard.num_classes, weight.shape[1])
    what, file = f"exporting the centres to {path}", None

    def begin() -> None:
        nonlocal file
        file = CentersFile(path, shape, weight.dtype) if rank == 0 else None

    try:
        agreement.all_or_none(what, begin, group)
        for sender in range(ranks):
            start, stop = (0, shape[0]) if shard is None else shard.bounds(sender)
            for low in range(0, stop - start, PIECE):
                count = min(PIECE, stop - start - low)
                piece = weight.new_empty((count, weight.shape[1]))
                if rank == sender:
                    rows = weight[low : low + count]
                    piece.copy_(unit(rows) if normalized else rows)
                if sender > 0:
                    collectives.send_to_first(piece, sender, group)
                if file is not None:
                    file.add(piece)
        agreement.all_or_none(what, lambda: file and file.finish(), group)
    finally:
        if file is not None:
            file.close()
