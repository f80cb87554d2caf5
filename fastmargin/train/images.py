"""The training images, and the order in which a process takes them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fastmargin.data import BlockShuffleSampler, FolderFaces, RecordFaces, to_tensor
from fastmargin.data.faces import Faces
from fastmargin.train.settings import TrainError, last_line


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


@dataclass(frozen=True)
class Batch:
    """step: of the epoch. images: (B, 3, H, W). labels: (B,). mirrored: (B,) bool, which to mirror.

    seed: of the step on this process, for whatever else is random in it.
    """

    step: int
    images: Tensor
    labels: Tensor
    mirrored: Tensor
    seed: int

    def to(self, device: torch.device) -> Batch:
        """On another device, without waiting for it."""
        parts = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("images", "labels", "mirrored")
        }
        return replace(self, **parts)


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

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step ``first`` on.

        Raises:
            TrainError: an image cannot be read or decoded.
        """
        self._order.set_epoch(epoch)
        self._rest.start = first * self.batch
        loaded = iter(self._loader)
        for step in range(first, self.steps):
            try:
                images, labels = next(loaded)
            except (OSError, ValueError) as error:
                raise TrainError(last_line(error)) from error
            seed = self._seed(epoch, step)
            chances = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
            yield Batch(step, images, labels, chances < 0.5, seed)

    def _seed(self, epoch: int, step: int) -> int:
        # from the step alone, so that resumed training is the same
        text = f"{self.seed} {epoch} {step} {self.rank}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
