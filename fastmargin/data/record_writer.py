"""Writing RecordIO files that MXNet and compatible code can read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastmargin.data.record_format import MAX_LABEL, ImageRecord, encode, pack
from fastmargin.data.written_whole import WholeFile


class RecordWriter:
    """Writes ``train.rec``, ``train.idx`` and, if there are images, ``property``.

    ::

        with RecordWriter("faces/train.rec") as writer:
            for image, label in faces:  # bytes of a JPEG or PNG file, number of the identity
                writer.add(image, label)

    The files have temporary names until they are closed without an error. The layout is that of
    insightface's ``RecBuilder``: every record is a sample, its key and id are its number.

    Args:
        path: the .rec file; its folder is created. The others are next to it.
        image_size: height and width for ``property``, in pixels.

    Raises:
        FileExistsError: one of the files exists.
    """

    def __init__(self, path: str | os.PathLike, image_size: tuple[int, int] = (112, 112)) -> None:
        self.path, self.image_size = Path(path), image_size
        self.path.parent.mkdir(parents=True, exist_ok=True)
        paths = [self.path, self.path.with_suffix(".idx"), self.path.with_name("property")]
        for path in paths:
            if path.exists():
                raise FileExistsError(f"{path} is there: remove it or write elsewhere")
        self._property = paths.pop()
        self._records, self._index = self._files = [WholeFile(path) for path in paths]
        self._offset = self._count = self._next_key = self._num_classes = 0

    def write(self, payload: bytes, key: int | None = None) -> int:
        """Appends a record of any bytes and returns its key; default: one after the last.

        Raises:
            ValueError: the payload is longer than 2**29 - 1 bytes, the key is not above those
                before, or the writer is closed.
        """
        key = self._next_key if key is None else int(key)
        if key < self._next_key:
            raise ValueError(f"keys must ascend from 0: got {key}, want {self._next_key} or more")
        pieces = b"".join(encode(payload))
        self._records.file.write(pieces)
        self._index.file.write(b"%d\t%d\n" % (key, self._offset))
        self._offset += len(pieces)
        self._count += 1
        self._next_key = key + 1
        return key

    def add(self, image: bytes, label: int | Sequence[float]) -> int:
        """Appends an image with its identity, and returns its key.

        Args:
            image: bytes of an image file, stored unchanged.
            label: 0 .. 2**24, since labels are float32; of several the first is the identity.

        Raises:
            ValueError: as :meth:`write`, or the label is out of range.
        """
        several = isinstance(label, Sequence)
        identity = next(iter(label), None) if several else label
        if identity is None or not (0 <= identity <= MAX_LABEL and identity % 1 == 0):
            raise ValueError(f"label must be a whole number in [0, {MAX_LABEL}], got {label}")
        stored = tuple(map(float, label)) if several else float(label)
        key = self.write(pack(ImageRecord(stored, image, self._next_key)))
        self._num_classes = max(self._num_classes, int(identity) + 1)
        return key

    def close(self) -> None:
        """Gives the files their final names. A second call does nothing."""
        if self._records.file.closed:
            return
        try:
            if self._num_classes:
                self._files.insert(1, WholeFile(self._property))
                height, width = self.image_size
                text = f"{self._num_classes},{height},{width}\n{self._count}\n"
                self._files[1].file.write(text.encode())
            for file in self._files:
                file.sync()
            for file in self._files:  # the index last: without it the records are scanned
                file.keep()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Removes what was written."""
        for file in self._files:
            file.drop()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()
