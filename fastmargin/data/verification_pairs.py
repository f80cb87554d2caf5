"""Pairs of face images with the answer, in the .bin files of insightface (``lfw.bin``)."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastmargin.data.images import decode, to_tensor


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, bytes and booleans; a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how old protocols store bytes
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it contains {module}.{name}")


_BROKEN = (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError)
_BROKEN += (OverflowError, MemoryError)
"""What a damaged pickle raises."""


class VerificationPairs:
    """Images ``2 i`` and ``2 i + 1`` are pair ``i``; iterating gives the transformed images.

    ::

        pairs = VerificationPairs("faces_webface_112x112/lfw.bin")
        accuracy, deviation = verification.ten_fold_accuracy(embed(pairs), pairs.same)

    Args:
        path: a pickle of (list of 2 P image files as bytes, list of P booleans), as made by
            insightface's ``lfw2pack``. It is read without running code from it, though one made to
            do harm may use up the memory.
        transform: PIL image (RGB) -> sample; default :func:`to_tensor`.

    Attributes:
        same: (P,) bool, whether both images of a pair show one person.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a pickle, or (of an image) it cannot be decoded.
    """

    def __init__(
        self, path: str | os.PathLike, transform: Callable[[Any], Any] | None = None
    ) -> None:
        self.path, self.transform = Path(path), to_tensor if transform is None else transform
        try:
            with open(self.path, "rb") as file:
                # "bytes": files written by Python 2 have strings in place of bytes
                images, same = map(list, _PlainUnpickler(file, encoding="bytes").load())
        except _BROKEN as error:
            raise ValueError(
                f"{path} is not a pair of a list of image files and a list of booleans, as "
                f"insightface's lfw.bin: {error}"
            ) from error
        if not all(isinstance(image, bytes) for image in images) or len(images) != 2 * len(same):
            raise ValueError(
                f"{path} should have two images as bytes for each of its {len(same)} answers, "
                f"but has {len(images)}"
            )
        self._images, self.same = images, torch.tensor([bool(answer) for answer in same])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.transform(decode(self._images[index]))
        except ValueError as error:
            raise ValueError(f"{self.path}, image {index}: {error}") from error
