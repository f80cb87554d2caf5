"""Reading records in Python, for where ``fastmargin._host`` is not compiled.

The same functions, bytes and messages as ``csrc/records.cpp``. ``descriptor`` is that of a file of
``size`` bytes. Reads are positional, so threads and forked processes may share it. Errors are
raised as ``ValueError(place, problem)``; place is the offset of a record or a line number.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator, Sequence

from fastmargin.data.record_format import (
    FIRST,
    IMAGE_HEADER,
    LAST,
    LENGTH_BITS,
    MAGIC,
    MAGIC_BYTES,
    MAX_LENGTH,
    PART_HEADER,
    WHOLE,
    padding,
)

CHUNK = 1 << 20
"""Maximum bytes read ahead."""
_INDEX_LINE = re.compile(rb"(-?[0-9]+)[ \t\r]+(-?[0-9]+)")


class _Window:
    """A part of the file in memory."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor, self.size = descriptor, size
        self.start, self.bytes = 0, b""
        self.record = 0  # the record that errors refer to

    def at(self, offset: int, count: int, ahead: int) -> bytes:
        """``count`` bytes, all inside the file. If they are not loaded yet, ``ahead`` are read."""
        if offset < self.start or offset + count > self.start + len(self.bytes):
            self._fill(offset, min(max(count, ahead), self.size - offset))
        begin = offset - self.start
        return self.bytes[begin : begin + count]

    def _fill(self, offset: int, count: int) -> None:
        self.start, self.bytes = offset, b""
        pieces, missing = [], count
        while missing:
            pieces.append(os.pread(self.descriptor, missing, offset + count - missing))
            if not pieces[-1]:
                raise ValueError(self.record, "the file became shorter while it was read")
            missing -= len(pieces[-1])
        self.bytes = b"".join(pieces)


def _parts(window: _Window, start: int, ahead: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the payload's parts in the record at ``start``."""
    window.record, size = start, window.size
    if not 0 <= start < size:
        raise ValueError(start, f"outside the file of {size} bytes")
    if start % 4:
        raise ValueError(start, "records start at multiples of 4")
    at, kind = start, None
    while kind not in (WHOLE, LAST):
        payload = at + PART_HEADER.size
        if payload > size:
            raise ValueError(start, f"the file ends at byte {size}, inside this record")
        magic, kind_and_length = PART_HEADER.unpack(window.at(at, PART_HEADER.size, ahead))
        kind, length = kind_and_length >> LENGTH_BITS, kind_and_length & MAX_LENGTH
        if magic != MAGIC:
            raise ValueError(start, f"no record here: {magic:#010x} instead of {MAGIC:#010x}")
        if kind > LAST:
            raise ValueError(start, f"unknown kind of part {kind}")
        if (at == start) != (kind in (WHOLE, FIRST)):
            raise ValueError(
                start,
                "a later part of a record, not its start"
                if at == start
                else "breaks off: another record starts before its last part",
            )
        at = payload + length + padding(length)
        if at > size:
            raise ValueError(start, f"the file ends at byte {size}, inside this record")
        yield payload, length


def _take(window: _Window, start: int, ahead: int, count: int | None = None) -> bytes:
    """The first ``count`` bytes of the payload, or all if it is shorter."""
    pieces, taken = [], 0
    for offset, length in _parts(window, start, ahead):
        if pieces:
            pieces.append(MAGIC_BYTES)
            taken += len(MAGIC_BYTES)
        if count is not None:
            length = min(length, max(count - taken, 0))
        pieces.append(window.at(offset, length, ahead))
        taken += length
        if count is not None and taken >= count:
            break
    return b"".join(pieces)


def scan(descriptor: int, size: int) -> bytearray:
    """Offsets, int64, of all records, which must fill the file without gaps."""
    window, offsets, at = _Window(descriptor, size), array("q"), 0
    while at < size:
        offsets.append(at)
        for offset, length in _parts(window, at, CHUNK):
            at = offset + length + padding(length)
    return bytearray(offsets)


def read(descriptor: int, size: int, offsets: Sequence[int], ends: Sequence[int]) -> list[bytes]:
    """Payloads of the records at these offsets.

    Record i is expected to end at ``ends[i]``, which need not be right: adjacent reads are merged.
    """
    window, payloads = _Window(descriptor, size), []
    i = 0
    while i < len(offsets):
        stop, start = ends[i], i  # a run of consecutive records
        for i in range(start + 1, len(offsets) + 1):
            if i == len(offsets) or offsets[i] != stop or ends[i] - offsets[start] > CHUNK:
                break
            stop = ends[i]
        for offset in offsets[start:i]:
            payloads.append(_take(window, offset, min(stop - offset, CHUNK)))
    return payloads


def first_labels(descriptor: int, size: int, offsets: Sequence[int]) -> bytearray:
    """The first label, float32, of image records, from their headers only."""
    window, labels = _Window(descriptor, size), bytearray()
    wanted = IMAGE_HEADER.size + 4
    for offset in offsets:
        head = _take(window, offset, PART_HEADER.size + wanted, wanted)
        more_labels = len(head) >= IMAGE_HEADER.size and any(head[:4])
        needed = IMAGE_HEADER.size + 4 * more_labels
        if len(head) < needed:
            raise ValueError(
                offset, f"has {len(head)} bytes, the header {needed}: not an image record"
            )
        at = IMAGE_HEADER.size if more_labels else 4
        labels += head[at : at + 4]
    return labels


def parse_index(text: bytes) -> tuple[bytearray, bytearray]:
    """Keys and offsets, int64, of an .idx file."""
    keys, offsets = array("q"), array("q")
    for number, line in enumerate(text.split(b"\n"), 1):
        line = line.strip(b" \t\r")
        if not line:
            continue
        try:
            key, offset = map(int, _INDEX_LINE.fullmatch(line).groups())
            keys.append(key)
            offsets.append(offset)
        except (AttributeError, OverflowError, ValueError):
            raise ValueError(number, "expected two integers") from None
    return bytearray(keys), bytearray(offsets)
