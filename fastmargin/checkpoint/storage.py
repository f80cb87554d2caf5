"""Pieces of tensors to and from files, in the format of ``torch.distributed.checkpoint``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from fastmargin.checkpoint.pieces import Piece

CHUNK_BYTES = 64 << 20
"""Readers load whole chunks; this size keeps what is read in excess small."""


def _narrowed(tensor: Tensor, offset: Iterable[int], size: Iterable[int]) -> Tensor:
    for dim, (start, length) in enumerate(zip(offset, size, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


# ---- writing ----


def to_write(pieces: dict[str, Piece], first: bool) -> list[WriteItem]:
    """What this process can write, in chunks: its parts; on the first, replicated data too."""
    return [
        item
        for name, piece in pieces.items()
        if piece.split or first
        for item in _chunks(name, piece)
    ]


def _chunks(name: str, piece: Piece) -> list[WriteItem]:
    shape, offset = piece.tensor.shape, piece.offset
    properties = TensorProperties.create_from_tensor(piece.tensor)

    def chunk(offset: Iterable[int], sizes: Iterable[int]) -> WriteItem:
        at = ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes))
        # SHARD: other processes may have others of the same tensor
        return WriteItem(
            MetadataIndex(name, at.offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(at, properties, torch.Size(piece.size)),
        )

    if not shape or (math.prod(piece.size) == 0 and not any(offset)):
        return [chunk(offset, shape)]
    if piece.tensor.numel() == 0:
        return []
    rows = max(1, CHUNK_BYTES * shape[0] // piece.tensor.nbytes)
    return [
        chunk((offset[0] + start, *offset[1:]), (min(rows, shape[0] - start), *shape[1:]))
        for start in range(0, shape[0], rows)
    ]


def plan(offers: list[list[WriteItem]]) -> tuple[list[SavePlan], Metadata]:
    """Assigns chunks to processes: of several that have a chunk, the first one writes it.

    Raises:
        ValueError: no process has some part of a tensor.
    """
    taken, plans = set(), []
    for items in offers:
        own = []
        for item in items:
            key = (item.index.fqn, item.index.offset)
            if key not in taken:
                taken.add(key)
                own.append(item)
        plans.append(SavePlan(own))
    plans, metadata = create_default_global_save_plan(plans)
    for name, stored in metadata.state_dict_metadata.items():
        here = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
        if here != math.prod(stored.size):
            raise ValueError(
                f"{name} has shape {tuple(stored.size)}, but the processes together {here} of its "
                "values: all that share it must save it"
            )
    return plans, metadata


class _Source(DefaultSavePlanner):
    def __init__(self, pieces: dict[str, Piece]) -> None:
        super().__init__()
        self.pieces = pieces

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        piece, chunk = self.pieces[write_item.index.fqn], write_item.tensor_data.chunk
        return piece.part(chunk.offsets, chunk.sizes)


def writer(folder: Path, staged: bool, first: bool) -> FileSystemWriter:
    """A writer of the files in a folder. ``staged``: the tensors are on the host already."""
    options = {"per_thread_copy_ahead": 0} if staged else {}
    made = FileSystemWriter(folder, overwrite=False, **options)
    made.set_up_storage_writer(first)
    return made


def write(writer: FileSystemWriter, plan: SavePlan, pieces: dict[str, Piece]) -> list:
    """Writes this process's chunks; returns what ``writer.finish`` needs from every process."""
    return writer.write_data(plan, _Source(pieces)).value()


# ---- reading ----


class _Target(DefaultLoadPlanner):
    def __init__(self, pieces: dict[str, Piece]) -> None:
        super().__init__()
        self.pieces = pieces

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor = self.pieces[read_item.dest_index.fqn].tensor
        return _narrowed(tensor, read_item.dest_offsets, read_item.lengths)


def metadata_of(folder: Path) -> Metadata:
    """What is stored in a folder; this unpickles a file."""
    return FileSystemReader(folder).read_metadata()


def stored_in(metadata: Metadata) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of all stored tensors."""
    return {
        name: (tuple(stored.size), stored.properties.dtype)
        for name, stored in metadata.state_dict_metadata.items()
    }


def read(folder: Path, metadata: Metadata, pieces: dict[str, Piece]) -> None:
    """Fills pieces, on the host, from the files in a folder.

    Raises:
        ValueError: a part of a tensor is in no file.
    """
    items = []
    for name, piece in pieces.items():
        chunk = ChunkStorageMetadata(torch.Size(piece.offset), piece.tensor.shape)
        stored = metadata.state_dict_metadata[name]
        found = create_read_items_for_chunk_list(name, stored, [chunk])
        if sum(math.prod(item.lengths) for item in found) != piece.tensor.numel():
            raise ValueError(f"{name}: {folder} has only a part of it")
        items += found
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(metadata, False)
    reader.read_data(LoadPlan(items), _Target(pieces))
