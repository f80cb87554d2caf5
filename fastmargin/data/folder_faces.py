"""Faces as image files, in one folder per identity."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastmargin.data.faces import Faces

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class FolderFaces(Faces):
    """The images ``root/<identity>/<image>``, sorted; identities are numbered in sorted order.

    Args:
        root: the folder.
        transform: PIL image (RGB) -> sample; default :func:`to_tensor`.
        extensions: of image files, in lower case; other files, and those whose name starts with a
            dot, are skipped.

    Attributes:
        classes: names of the identities; ``classes[label]``.
        num_classes, labels: as in :class:`Faces`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no folders in it, or folders without images; of a sample: its image cannot be
            decoded.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        transform: Callable[[Any], Any] | None = None,
        extensions: Sequence[str] = EXTENSIONS,
    ) -> None:
        super().__init__(transform)
        self.root, extensions = Path(root), tuple(extensions)
        self.classes = sorted(
            entry.name
            for entry in os.scandir(self.root)
            if entry.is_dir() and not entry.name.startswith(".")
        )
        if not self.classes:
            raise ValueError(f"{root} has no folders: expected {root}/<identity>/<image>")
        names, counts = [], []
        for identity in self.classes:
            found = sorted(
                os.fsencode(entry.name)
                for entry in os.scandir(self.root / identity)
                if entry.name.lower().endswith(extensions) and not entry.name.startswith(".")
            )
            names += found
            counts.append(len(found))
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if empty:
            raise ValueError(
                f"{len(empty)} folders of {root} have no images ({', '.join(extensions)}), the "
                f"first is {empty[0]}: remove them, they would be classes without samples"
            )
        self.num_classes = len(self.classes)
        self.labels = torch.arange(self.num_classes).repeat_interleave(torch.tensor(counts))
        # one object, not one per image: reference counting would make forked workers copy them
        self._names = b"".join(names)
        self._ends = torch.tensor([len(name) for name in names]).cumsum(0)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file of an image."""
        start, stop = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        return self.root / self.classes[self.labels[index]] / os.fsdecode(self._names[start:stop])

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        samples = []
        for index in map(int, indices):
            path = self.path(index)
            try:
                samples.append(self._sample(path.read_bytes(), int(self.labels[index])))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        return samples
