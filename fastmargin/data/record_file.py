"""Random and sequential access to the records of a RecordIO file."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fastmargin.data.written_whole import written_whole

BATCH = 1 << 16
"""Maximum number of records whose headers one call reads."""
STRETCH = 256
"""Records read at once in file order."""


class RecordError(ValueError):
    """A record cannot be read.

    path: the file. key: of the record, None where records are counted. offset: where it starts. All
    are None in an error that a ``DataLoader`` re-raises from a worker; its message has them.
    """

    path: Path | None = None
    key: int | None = None
    offset: int | None = None

    @classmethod
    def at(cls, path: Path, key: int | None, offset: int | None, problem: str) -> RecordError:
        """The error, with these in its message."""
        where = [] if key is None else [f"record {key}"]
        where += [] if offset is None else [f"offset {offset}"]
        error = cls(": ".join([str(path), *where, problem]))
        error.path, error.key, error.offset = path, key, offset
        return error


@functools.cache
def reader() -> ModuleType:
    """The compiled reader, or the Python one with the same results."""
    try:
        from fastmargin._host import records
    except ImportError:
        from fastmargin.data import plain_records as records
    return records


class RecordFile:
    """The records of a RecordIO file (``train.rec`` of MXNet and insightface) by their keys.

    ::

        with RecordFile("train.rec") as records:
            payload = records[17]  # bytes; unpack(payload) is an image record's label and image
            payloads = records.read([3, 17, 4])  # one sorted pass over the file
            for key, payload in records.items():  # in file order

    Reads are positional, so threads and forked processes may share one; an unpickled one reopens
    the file and keeps the index.

    Args:
        path: the .rec file.
        index: the .idx file; default: next to it with the suffix ``.idx``; if there is none, the
            file is scanned and records are numbered from 0 (:func:`write_index` avoids that).

    Raises:
        FileNotFoundError: no such file.
        RecordError: the file is truncated, or lacks records that the index names.
        ValueError: the index cannot be parsed.
    """

    def __init__(self, path: str | os.PathLike, index: str | os.PathLike | None = None) -> None:
        self.path = Path(path)
        self._open()
        try:
            default = self.path.with_suffix(".idx")
            if index is None and not default.exists():
                self.offsets = _scan(self.path, self._file, self._size)
                self.keys = torch.arange(len(self.offsets))
            else:
                self.keys, self.offsets = _read_index(Path(index or default))
            self._set_orders()
            self._check_offsets(Path(index or default))
        except BaseException:
            self.close()
            raise

    keys: Tensor
    """(N,) int64, in the order of the index. Do not modify."""
    offsets: Tensor
    """(N,) int64, where the records start. Do not modify."""

    # ---- reading ----

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[int]:
        """The keys, in the order of the index."""
        for some in self.keys.split(BATCH):
            yield from some.tolist()

    def __contains__(self, key: int) -> bool:
        return bool(self.has(torch.tensor([key])))

    def has(self, keys: Tensor) -> Tensor:
        """Which of these keys exist, bool."""
        return self._find(keys) >= 0

    def __getitem__(self, key: int) -> bytes:
        """The payload of one record.

        Raises:
            KeyError: no such key.
            RecordError: there is no complete record at the offset in the index.
        """
        return self.read([key])[0]

    def read(self, keys: Sequence[int] | Tensor) -> list[bytes]:
        """The payloads of several records, read in file order, returned in the given order.

        Raises: as ``__getitem__``; nothing is returned if one fails.
        """
        positions = self._positions(keys)
        offsets, order = self.offsets[positions].sort(stable=True)
        found = self._call("read", positions[order], offsets.tolist(), self._ends(offsets).tolist())
        payloads = [b""] * len(found)
        for place, payload in zip(order.tolist(), found, strict=True):
            payloads[place] = payload
        return payloads

    def items(self) -> Iterator[tuple[int, bytes]]:
        """(key, payload) of all records, in file order, read sequentially."""
        for at in range(0, len(self), STRETCH):
            positions = self._in_file_order(at, at + STRETCH)
            keys = self.keys[positions]
            yield from zip(keys.tolist(), self.read(keys), strict=True)

    def first_labels(self, keys: Sequence[int] | Tensor | None = None) -> Tensor:
        """(n,) float32, the first label of these image records, or all; images are not read.

        Raises: as ``__getitem__``; ``RecordError`` also if one is not an image record.
        """
        positions = torch.arange(len(self)) if keys is None else self._positions(keys)
        offsets, order = self.offsets[positions].sort(stable=True)
        labels = torch.empty(len(positions))
        for part, some in zip(order.split(BATCH), offsets.split(BATCH), strict=True):
            found = self._call("first_labels", positions[part], some.tolist())
            labels[part] = _tensor(found, torch.float32)
        return labels

    def prefetch(self, keys: Sequence[int] | Tensor) -> None:
        """Has the system read these records into its cache, in the background.

        Does nothing where the system does not support it, or for records far apart in the file.

        Raises:
            KeyError: no such key.
        """
        positions = self._positions(keys)
        if not len(positions) or not hasattr(os, "posix_fadvise"):
            return
        offsets = self.offsets[positions]
        ends = self._ends(offsets)
        start, length = int(offsets.min()), int(ends.max() - offsets.min())
        if length <= 2 * int((ends - offsets).sum()):
            os.posix_fadvise(self._file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def offset_of(self, key: int) -> int:
        """Where a record starts, in bytes."""
        return int(self.offsets[self._positions([key])])

    # ---- the file ----

    def close(self) -> None:
        """Closes the file; reading afterwards is an error."""
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RecordFile({str(self.path)!r}, {len(self)} records)"

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        size = self._size
        self._open()
        if self._size != size:
            self.close()
            raise RecordError.at(
                *(self.path, None, None),
                f"has {self._size} bytes and had {size} when it was opened first: open it again",
            )

    def _open(self) -> None:
        self._file = open(self.path, "rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    def _call(self, function: str, positions: Tensor, *arguments):
        """Calls a function of the reader; errors get the record's key."""
        try:
            return getattr(reader(), function)(self._file.fileno(), self._size, *arguments)
        except ValueError as error:
            if len(error.args) != 2:  # the file is closed
                raise
            offset, problem = error.args
            key = int(self.keys[positions[self.offsets[positions] == offset][0]])
            remedy = "get the file anew, or make its index with write_index"
            raise RecordError.at(self.path, key, offset, f"{problem}; {remedy}") from None

    # ---- the index ----

    def _set_orders(self) -> None:
        """Sorted copies of keys and offsets, with their orders; none if sorted already."""
        self._sorted_keys, self._key_order = _sorted(self.keys)
        self._sorted_offsets, self._offset_order = _sorted(self.offsets)

    def _check_offsets(self, index: Path) -> None:
        twice = (self._sorted_keys[1:] == self._sorted_keys[:-1]).nonzero()
        if len(twice):
            key = int(self._sorted_keys[twice[0]])
            raise ValueError(f"{index}: key {key} is there twice: scan anew with write_index")
        wrong = (self.offsets < 0) | (self.offsets >= self._size) | (self.offsets % 4 != 0)
        # the last record in the file shows whether it is truncated
        last = self._in_file_order(max(len(self) - 1, 0), len(self))
        suspects = wrong.nonzero()[:1, 0] if wrong.any() else last
        offsets = self.offsets[suspects].tolist()
        self._call("read", suspects, offsets, offsets)

    def _in_file_order(self, start: int, stop: int) -> Tensor:
        if self._offset_order is not None:
            return self._offset_order[start:stop]
        return torch.arange(start, min(stop, len(self)))

    def _find(self, keys: Tensor) -> Tensor:
        """Positions of keys, -1: missing."""
        if not len(self):
            return torch.full_like(keys, -1)
        found = torch.searchsorted(self._sorted_keys, keys).clamp_(max=len(self) - 1)
        there = self._sorted_keys[found] == keys
        if self._key_order is not None:
            found = self._key_order[found]
        return torch.where(there, found, -1)

    def _positions(self, keys: Sequence[int] | Tensor) -> Tensor:
        keys = torch.as_tensor(keys, dtype=torch.int64)
        positions = self._find(keys)
        missing = keys[positions < 0]
        if len(missing):
            raise KeyError(f"{self.path}: its index has no record {int(missing[0])}")
        return positions

    def _ends(self, offsets: Tensor) -> Tensor:
        """Where the next record starts."""
        after = torch.searchsorted(self._sorted_offsets, offsets, right=True)
        ends = self._sorted_offsets[after.clamp(max=len(self) - 1)]
        return torch.where(after < len(self), ends, self._size)


def _tensor(raw: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)


def _sorted(values: Tensor) -> tuple[Tensor, Tensor | None]:
    if (values[1:] >= values[:-1]).all():
        return values, None
    return values.sort(stable=True)


def _scan(path: Path, file: io.IOBase, size: int) -> Tensor:
    try:
        return _tensor(reader().scan(file.fileno(), size), torch.int64)
    except ValueError as error:
        offset, problem = error.args
        raise RecordError.at(path, None, offset, f"{problem}; get the file anew") from None


def _read_index(path: Path) -> tuple[Tensor, Tensor]:
    try:
        keys, offsets = reader().parse_index(path.read_bytes())
    except ValueError as error:
        line, problem = error.args
        raise ValueError(
            f"{path}, line {line}: {problem}, a key and an offset: write it anew with write_index"
        ) from None
    return _tensor(keys, torch.int64), _tensor(offsets, torch.int64)


def write_index(path: str | os.PathLike, index: str | os.PathLike | None = None) -> int:
    """Scans a .rec file and writes its .idx file, with records numbered from 0 in file order.

    An existing index is replaced atomically.

    Args:
        path: the .rec file.
        index: what to write; default: next to it with the suffix ``.idx``.

    Returns:
        The number of records.

    Raises:
        FileNotFoundError, RecordError: as :class:`RecordFile`.
    """
    path = Path(path)
    with open(path, "rb") as file:
        offsets = _scan(path, file, os.fstat(file.fileno()).st_size)
    with written_whole(Path(index or path.with_suffix(".idx"))) as out:
        for start in range(0, len(offsets), BATCH):
            some = offsets[start : start + BATCH].tolist()
            out.write("".join(f"{start + i}\t{o}\n" for i, o in enumerate(some)).encode())
    return len(offsets)
