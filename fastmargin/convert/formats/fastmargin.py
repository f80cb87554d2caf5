"""Checkpoints of :mod:`fastmargin.checkpoint`.

What is written loads into ``{"head": MarginHead}`` on any number of processes, and with momentum
into ``{"head": MarginHead, "optimizer": RowSGD}``. Reading trusts a checkpoint no more than other
files: its index is unpickled with a list of allowed types, the rest with ``weights_only``.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmargin import margins
from fastmargin.checkpoint import folder
from fastmargin.checkpoint.objects import FORMAT as STRUCTURE_FORMAT
from fastmargin.checkpoint.objects import MODULE, OPTIMIZER
from fastmargin.checkpoint.pieces import Piece, Place, take_out
from fastmargin.convert import files
from fastmargin.convert.centres import (
    STATISTICS,
    Centres,
    ConvertError,
    Format,
    Reading,
    Rows,
    Shard,
    Writing,
)
from fastmargin.convert.formats import one_file
from fastmargin.distributed.shard import bounds
from fastmargin.sampling import ClassSampler

HEAD, OPTIMISER = "head", "optimizer"

# ---- writing ----


@dataclass(frozen=True)
class StreamedPiece(Piece):
    """Rows that are read only when written; ``tensor`` has just their shape."""

    rows: Rows | None = None

    @staticmethod
    def of_range(rows: Rows, start: int, stop: int) -> StreamedPiece:
        shape = torch.empty((stop - start, rows.dim), dtype=rows.dtype, device="meta")
        return StreamedPiece(shape, (start, 0), (rows.num_rows, rows.dim), True, rows)

    def part(self, offset: Iterable[int], sizes: Iterable[int]) -> Tensor:
        start, length = next(iter(offset)), next(iter(sizes))
        return self.rows.read(start, start + length)


def _margin_state(centres: Centres, name: str | None) -> dict[str, Tensor]:
    """State of the margin that will load it: from the source, or the initial state."""
    name = name or ("adaface" if centres.statistics else "arcface")
    margin = margins.BY_NAME[name]()
    margin.bind(centres.num_classes, centres.weight.dim)
    state = dict(margin.state_dict())
    for key in STATISTICS:
        if key in state and key in centres.statistics:
            state[key] = centres.statistics[key].to(state[key]).reshape(state[key].shape)
    return state


def _sampler_state(seed: int) -> dict[str, Tensor]:
    """State of a sampler that has not drawn yet."""
    state = ClassSampler(1, 1, seed).state_dict()
    return {f"sampler.{key}": value for key, value in state.items()}


def _write(centres: Centres, path: Path, writing: Writing) -> None:
    from fastmargin.checkpoint import storage  # takes seconds to import

    whole: dict[str, Piece] = {}
    state = OrderedDict(weight=Place(f"{HEAD}.weight"))
    margin = {
        f"margin.{key}": value for key, value in _margin_state(centres, writing.margin).items()
    }
    sampler = {} if writing.sampler_seed is None else _sampler_state(writing.sampler_seed)
    state.update(take_out({**margin, **sampler}, HEAD, whole))
    structure: dict[str, Any] = {HEAD: {"kind": MODULE, "type": "MarginHead", "state": state}}
    streamed = {f"{HEAD}.weight": centres.weight}
    if centres.momentum is not None:
        buffer = f"{OPTIMISER}.state.0.momentum_buffer"
        streamed[buffer] = centres.momentum
        structure[OPTIMISER] = {
            "kind": OPTIMIZER,
            "type": "RowSGD",
            "sizes": [[(centres.weight.num_rows, centres.weight.dim)]],
            # the loading optimiser keeps its own options
            "state": {
                "state": {0: {"momentum_buffer": Place(buffer)}},
                "param_groups": [{"params": [0]}],
            },
        }
    ranks = range(writing.world_size)
    pieces = []
    for rank in ranks:
        start, stop = bounds(centres.num_classes, writing.world_size, rank)
        own = {name: StreamedPiece.of_range(rows, start, stop) for name, rows in streamed.items()}
        pieces.append({**own, **(whole if rank == 0 else {})})
    plans, metadata = storage.plan([storage.to_write(pieces[rank], rank == 0) for rank in ranks])
    version = folder.new_version(path)
    writer = storage.writer(version, staged=True, first=True)
    plans = writer.prepare_global_plan(plans)
    results = [storage.write(writer, plans[rank], pieces[rank]) for rank in ranks]
    files.save(version / folder.STRUCTURE, {"format": STRUCTURE_FORMAT, "objects": structure})
    writer.finish(metadata, results)
    folder.make_current(version)


# ---- reading ----

_MODULE = "torch.distributed.checkpoint."
ALLOWED = {
    **{
        name: _MODULE + "metadata"
        for name in (
            *("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    },
    "_StorageInfo": _MODULE + "filesystem",
    "Size": "torch",
    "_get_layout": "torch.serialization",
    "PosixPath": "pathlib",
}


class _Index(pickle.Unpickler):
    """Reads ``.metadata``; refuses types that torch.distributed.checkpoint does not write."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("pathlib._local", "pathlib")  # Python 3.13's name
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or ALLOWED.get(name) == module:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _metadata(version: Path) -> Any:
    path = version / ".metadata"
    try:
        with open(path, "rb") as file:
            metadata = _Index(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError) as error:
        raise ConvertError(
            f"{path} is damaged, or more than the index of a checkpoint ({error})"
        ) from error
    ends: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        name = stored.relative_path
        ends[name] = max(ends.get(name, 0), stored.offset + stored.length)
    for name, end in sorted(ends.items()):
        file = version / name
        if not file.is_file():
            raise ConvertError(f"{file} is missing, which has a part of the checkpoint")
        if file.stat().st_size < end:
            raise ConvertError(
                f"{file} is cut short: {file.stat().st_size} bytes of at least {end}"
            )
    return metadata


def _rows(version: Path, metadata: Any, name: str) -> Rows:
    """The rows of a tensor that is stored in chunks."""
    from fastmargin.checkpoint import storage

    (num_rows, dim), dtype = storage.stored_in(metadata)[name]

    def read(start: int, stop: int) -> Tensor:
        rows = torch.empty((stop - start, dim), dtype=dtype)
        if start < stop:
            storage.read(version, metadata, {name: Piece.of_rows(rows, start, num_rows)})
        return rows

    return Rows((Shard(version, num_rows, dim, dtype, read),), num_rows)


def _head(path: Path, objects: dict, stored: dict, wanted: str | None) -> str:
    """Name of the head whose centres to take."""
    matrices = [
        name.removesuffix(".weight")
        for name, (size, _) in stored.items()
        if name.endswith(".weight") and len(size) == 2
    ]
    if wanted is not None:
        found = [name for name in matrices if name == wanted]
    else:
        found = [name for name in matrices if objects.get(name, {}).get("type") == "MarginHead"]
    if len(found) != 1:
        what = f"no head {wanted!r}" if wanted is not None else f"{len(found)} heads by themselves"
        raise ConvertError(
            f"{path} has {what}: name the one to take with --head (head), of "
            f"{', '.join(sorted(matrices)) or 'none'}"
        )
    return found[0]


def _momentum(objects: dict, stored: dict, size: tuple[int, ...]) -> str | None:
    """Name of the momentum of a parameter of that size; None if there is none or several."""
    found = [
        entry
        for name, thing in objects.items()
        if thing["kind"] == OPTIMIZER
        for entry, (shape, _) in stored.items()
        if entry.startswith(f"{name}.state.")
        and entry.endswith(".momentum_buffer")
        and shape == size
    ]
    return found[0] if len(found) == 1 else None


def _read(path: Path, reading: Reading) -> Centres:
    from fastmargin.checkpoint import storage

    try:
        version = folder.current_version(path)
    except ValueError as error:
        raise ConvertError(str(error)) from error
    if version is None:
        raise ConvertError(f"{path} has no checkpoint, or none that was finished")
    content = files.load(version / folder.STRUCTURE, allowed=(Place,))
    if files.entry(path, content, "format") != STRUCTURE_FORMAT:
        raise ConvertError(
            f"{path} has format {content['format']}, this fastmargin reads {STRUCTURE_FORMAT}"
        )
    objects, metadata = content["objects"], _metadata(version)
    stored = storage.stored_in(metadata)
    head = _head(path, objects, stored, reading.head)
    weight = _rows(version, metadata, f"{head}.weight")
    one_file.check_number(path, weight.num_rows, replace(reading, sub_centers=1))
    buffer = _momentum(objects, stored, (weight.num_rows, weight.dim))
    taken, statistics = {f"{head}.weight", buffer}, {}
    for name in STATISTICS:
        entry = f"{head}.margin.{name}"
        if entry in stored:
            value = torch.empty(stored[entry][0], dtype=stored[entry][1])
            storage.read(version, metadata, {entry: Piece.of(entry, value)})
            statistics[name] = value
            taken.add(entry)
    rest = [name for name in stored if name.startswith(f"{head}.") and name not in taken]
    for name, thing in objects.items():
        if name != head:
            but = " but the momentum" if (buffer or "").startswith(f"{name}.state.") else ""
            rest.append(f"{name} ({thing['type']}){but}")
    return Centres(
        "fastmargin",
        weight,
        None if buffer is None else _rows(version, metadata, buffer),
        statistics,
        left_out=tuple(rest),
    )


FORMAT = Format(
    "fastmargin",
    "a folder of fastmargin.checkpoint",
    _read,
    _write,
    owns=lambda name: name == folder.CURRENT or re.fullmatch(r"version-\d{10}", name) is not None,
    momentum=True,
    statistics=True,
    sharded=True,
)
