"""The bytes of MXNet's RecordIO files (dmlc-core ``recordio.h``, mxnet ``recordio.py``).

A file is a sequence of records; a record has one or more parts; a part is, little-endian::

    uint32 magic   0xced7230a
    uint32 kind << 29 | length   kind 0: whole record, 1: first part, 2: middle, 3: last
    length bytes, and zeros up to a multiple of 4

So a part starts at a multiple of 4, and a reader can resynchronise by searching the magic number.
Where a payload itself contains that number at a multiple of 4, the writer removes it and starts a
new part; a reader restores it between parts.

The payload of an image record is a header and the bytes of an image file::

    uint32 flag, float32 label, uint64 id, uint64 id2
    flag float32 labels   (with flag > 0 the label above is unused)

``train.idx`` has a line ``key <tab> offset`` per record.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
WHOLE, FIRST, MIDDLE, LAST = range(4)
PART_HEADER = struct.Struct("<II")
LENGTH_BITS = 29
MAX_LENGTH = (1 << LENGTH_BITS) - 1
"""Maximum bytes of a record, as in MXNet."""
IMAGE_HEADER = struct.Struct("<IfQQ")
MAX_LABEL = 1 << 24
"""Whole numbers up to here are exact in float32."""


def padding(length: int) -> int:
    """Number of zeros after ``length`` bytes of payload."""
    return -length % 4


def encode(payload: bytes) -> Iterator[bytes]:
    """The parts of a record, in order, split at magic numbers as by dmlc's writer.

    Raises:
        ValueError: more than ``MAX_LENGTH`` bytes.
    """
    if len(payload) > MAX_LENGTH:
        raise ValueError(
            f"payload has {len(payload)} bytes, a record takes {MAX_LENGTH}: split it over records"
        )
    start = 0
    at = payload.find(MAGIC_BYTES)
    while at >= 0:
        if at % 4:  # not where a reader would take it for a part; the next may overlap it
            at = payload.find(MAGIC_BYTES, at + 1)
            continue
        kind = MIDDLE if start else FIRST
        yield PART_HEADER.pack(MAGIC, kind << LENGTH_BITS | at - start)
        yield payload[start:at]
        start = at + len(MAGIC_BYTES)
        at = payload.find(MAGIC_BYTES, start)
    kind = LAST if start else WHOLE
    yield PART_HEADER.pack(MAGIC, kind << LENGTH_BITS | len(payload) - start)
    yield payload[start:]
    yield bytes(padding(len(payload)))


class ImageRecord(NamedTuple):
    """An unpacked image record.

    label: a number, or as many as the header's flag.
    image: bytes of a JPEG or PNG file; empty in records that only describe others.
    """

    label: float | tuple[float, ...]
    image: bytes
    id: int = 0
    id2: int = 0

    @property
    def first_label(self) -> float:
        """The class of the image."""
        return self.label[0] if isinstance(self.label, tuple) else self.label


def pack(record: ImageRecord) -> bytes:
    """The payload of an image record, as ``mxnet.recordio.pack`` makes it."""
    label, image, first_id, second_id = record
    if not isinstance(label, Sequence):
        return IMAGE_HEADER.pack(0, label, first_id, second_id) + image
    header = IMAGE_HEADER.pack(len(label), 0.0, first_id, second_id)
    return b"".join((header, struct.pack(f"<{len(label)}f", *label), image))


def unpack(payload: bytes) -> ImageRecord:
    """Unpacks the payload of an image record, as ``mxnet.recordio.unpack`` does.

    Raises:
        ValueError: the payload is shorter than its header.
    """
    needed = IMAGE_HEADER.size
    if len(payload) >= needed:
        flag, label, first_id, second_id = IMAGE_HEADER.unpack_from(payload)
        needed += 4 * flag
    if len(payload) < needed:
        raise ValueError(f"has {len(payload)} bytes, the header {needed}: not an image record")
    if flag:
        label = struct.unpack_from(f"<{flag}f", payload, IMAGE_HEADER.size)
    return ImageRecord(label, payload[needed:], first_id, second_id)
