"""Faces in a RecordIO file, as used by insightface, AdaFace and CVLface."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmargin.data.faces import Faces
from fastmargin.data.record_file import RecordError, RecordFile
from fastmargin.data.record_format import ImageRecord, unpack


class RecordFaces(Faces):
    """The images of ``train.rec``, in the order of the index (map-style, no mxnet).

    ::

        data = RecordFaces("faces_webface")
        head = fm.MarginHead(512, data.num_classes)
        loader = DataLoader(data, 256, sampler=BlockShuffleSampler(data), num_workers=8)

    If record 0 has several labels and no image, the samples are the records 1 .. label[0] - 1, and
    what follows describes identities (insightface's ``face2rec2``). Otherwise every record is a
    sample (``RecBuilder``, ``rec2shufrec``).

    Args:
        root: folder with ``train.rec`` and perhaps ``train.idx`` and ``property``; or the path of
            a .rec file with these next to it.
        transform: PIL image (RGB) -> sample; default :func:`to_tensor`. It alone determines flips,
            normalisation and channel order.

    Attributes:
        num_classes: from ``property``; without it, the largest label plus one.
        image_size: (height, width) from ``property``, or None.
        labels: (N,) int64. The first use reads the header of every record and keeps the result;
            on a slow disk that is as slow as reading the file.
        records, keys: the :class:`RecordFile`, and (N,) int64 the key of every sample.

    Raises:
        FileNotFoundError: no such file.
        RecordError: the file is truncated; a record is missing or not an image record; a label is
            not a whole number in 0 .. num_classes - 1.
        ValueError: no samples, or ``property`` or the index cannot be parsed; of a sample: its
            image cannot be decoded.
    """

    def __init__(
        self, root: str | os.PathLike, transform: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__(transform)
        root = Path(root)
        self.records = RecordFile(root if root.suffix == ".rec" else root / "train.rec")
        self._num_classes, self.image_size = _read_property(self.records.path.parent / "property")
        self.keys = self._sample_keys()
        if not len(self.keys):
            raise ValueError(f"{self.records.path} has no samples: see whether its index is empty")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        keys = self.keys[torch.as_tensor(indices, dtype=torch.int64)]
        payloads = self.records.read(keys)  # all of a batch in one call
        return [self._decoded(*pair) for pair in zip(keys.tolist(), payloads, strict=True)]

    def prefetch(self, start: int, stop: int) -> None:
        """Has the system read samples start .. stop - 1 in the background."""
        self.records.prefetch(self.keys[start:stop])

    @property
    def num_classes(self) -> int:
        if self._num_classes is None:
            self._num_classes = int(self.labels.max()) + 1
        return self._num_classes

    @functools.cached_property
    def labels(self) -> Tensor:
        found = self.records.first_labels(self.keys)
        labels = found.long()
        wrong = (labels != found) | (labels < 0)
        if self._num_classes is not None:
            wrong |= labels >= self._num_classes
        if wrong.any():
            place = int(wrong.nonzero()[0, 0])
            raise self._bad_label(int(self.keys[place]), float(found[place]))
        return labels

    def _decoded(self, key: int, payload: bytes) -> tuple[Any, int]:
        record = self._unpacked(key, payload)
        label = record.first_label
        # without property the largest label is not known before all are read
        if not (label >= 0 and label % 1 == 0 and label < (self._num_classes or float("inf"))):
            raise self._bad_label(key, label)
        try:
            return self._sample(record.image, int(label))
        except ValueError as error:
            raise self._error(key, str(error)) from error

    def _unpacked(self, key: int, payload: bytes) -> ImageRecord:
        try:
            return unpack(payload)
        except ValueError as error:
            raise self._error(key, str(error)) from None

    def _sample_keys(self) -> Tensor:
        if 0 not in self.records:
            return self.records.keys
        head = self._unpacked(0, self.records[0])
        if not isinstance(head.label, tuple) or head.image:
            return self.records.keys
        if not (head.label[0] >= 1 and head.label[0] % 1 == 0):
            raise self._error(0, f"says that samples end before key {head.label[0]}")
        count = int(head.label[0]) - 1
        keys = torch.arange(1, min(count, len(self.records)) + 1)  # count may be anything
        missing = keys[~self.records.has(keys)]
        if len(missing):
            raise self._error(
                0,
                f"says that the samples are 1 to {count}, but the index lacks {int(missing[0])}: "
                "get the whole file, or its own index",
            )
        return keys

    def _bad_label(self, key: int, label: float) -> RecordError:
        known = self._num_classes
        above = "" if known is None else f" below the {known} classes in the property file"
        return self._error(key, f"label {label} is not a whole number from 0{above}")

    def _error(self, key: int, problem: str) -> RecordError:
        return RecordError.at(self.records.path, key, self.records.offset_of(key), problem)


def _read_property(path: Path) -> tuple[int | None, tuple[int, int] | None]:
    """Classes, and height and width, from a ``property`` file; None without one."""
    if not path.exists():
        return None, None
    first = path.read_text().partition("\n")[0]
    numbers = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*", first)
    if numbers is None:
        raise ValueError(f"{path}: expected 'num_classes,height,width', got {first!r}: mend it")
    num_classes, height, width = map(int, numbers.groups())
    return num_classes, (height, width)
