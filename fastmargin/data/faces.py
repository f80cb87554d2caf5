"""The base class of face data sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmargin.data.images import decode, to_tensor


class Faces(Dataset):
    """Images with the label of their identity.

    ``data[i]`` is ``(transform(PIL image in RGB), label)``; a ``DataLoader`` gets whole batches in
    one call (``__getitems__``).

    num_classes: number of identities; labels are 0 .. num_classes - 1.
    labels: (N,) int64, obtained without decoding images.
    """

    num_classes: int
    labels: Tensor

    def __init__(self, transform: Callable[[Any], Any] | None) -> None:
        self.transform = to_tensor if transform is None else transform

    def class_counts(self) -> Tensor:
        """(num_classes,) int64, images per identity, for ``KappaFace(class_counts=...)``."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        raise NotImplementedError

    def _sample(self, image: bytes, label: int) -> tuple[Any, int]:
        return self.transform(decode(image)), label
