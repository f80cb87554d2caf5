"""The training images, and the order in which a process takes them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fastmargin.data import BlockShuffleSampler, FolderFaces, RecordFaces, to_tensor
from fastmargin.data.faces import Faces


class Resized:
    """PIL image -> :func:`to_tensor` of it at ``size`` x ``size`` pixels."""

    def __init__(self, size: int) -> None:
        self.size = (size, size)

    def __call__(self, image: Any) -> Tensor:
        return to_tensor(image if image.size == self.size else image.resize(self.size))


def open_faces(path: Path, size: int) -> Faces:
    """Records if ``path`` is a .rec file or holds train.rec, else a folder per identity.

    Raises:
        OSError, RecordError, ValueError: as :class:`RecordFaces` and :class:`FolderFaces`.
    """
    if path.suffix == ".rec" or (path / "train.rec").exists():
        return RecordFaces(path, Resized(size))
    return FolderFaces(path, Resized(size))


class _Rest(Sampler[int]):
    """A sampler without its first samples."""

    def __init__(self, sampler: BlockShuffleSampler) -> None:
        self.sampler, self.start = sampler, 0

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(iter(self.sampler), self.start, None)

    def __len__(self) -> int:
        return max(0, len(self.sampler) - self.start)


class Epochs:
    """Batches of one process; an epoch can be entered in the middle.

    steps: per epoch, the same on every process; the last, smaller batch is left out.
    """

    def __init__(
        self, faces: Faces, batch: int, seed: int, rank: int, world: int, workers: int, pin: bool
    ) -> None:
        self.seed, self.rank, self.batch = seed, rank, batch
        self._order = BlockShuffleSampler(faces, seed=seed, num_replicas=world, rank=rank)
        self._rest = _Rest(self._order)
        self._loader = DataLoader(
            faces, batch, sampler=self._rest, num_workers=workers, drop_last=True, pin_memory=pin
        )
        self.steps = len(self._order) // batch

    def batches(self, epoch: int, first: int = 0) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """From step ``first`` on: step, images (B, 3, H, W), labels (B,), which to mirror (B,)."""
        self._order.set_epoch(epoch)
        self._rest.start = first * self.batch
        for step, (images, labels) in enumerate(self._loader, first):
            yield step, images, labels, self._mirrored(epoch, step, len(labels))

    def _mirrored(self, epoch: int, step: int, rows: int) -> Tensor:
        # from the step alone, so that resumed training mirrors the same images
        text = f"{self.seed} {epoch} {step} {self.rank}".encode()
        key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        return torch.rand(rows, generator=torch.Generator().manual_seed(key)) < 0.5
