"""Shuffling with few disk seeks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sized

import torch
from torch import Tensor
from torch.utils.data import Sampler


class BlockShuffleSampler(Sampler[int]):
    """Random order in which samples from the same part of the file are used at about the same time.

    The samples are cut into blocks of consecutive ones, the blocks are put in random order, and the
    resulting sequence is shuffled within windows of several blocks. One window ahead of its use,
    ``data.prefetch(start, stop)`` is called block by block, if there is such a method:
    :class:`RecordFaces` has the system read them. So a disk reads long runs instead of seeking for
    every image, and a batch still mixes ``window / block`` positions of the file.

    With several processes each takes its own part of the sequence, all of the same length: the
    first samples of the sequence are repeated, or the last ones left out.

    The order depends on (seed, epoch); call :meth:`set_epoch` before every epoch.

    Args:
        data: a data set whose consecutive samples are consecutive on disk.
        block: samples per block: the larger, the fewer seeks; the smaller, the better mixed a batch
            (files are mostly ordered by identity). 64 images of 8 KB are 0.5 MB.
        window: samples that are shuffled together. The images of two windows should fit in free
            memory, as the system's page cache.
        seed: the same in all processes.
        num_replicas, rank: number of processes that share the data, and this one's rank.
        drop_last: leave samples out instead of repeating some.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        data: Sized,
        block: int = 64,
        window: int = 32_768,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = False,
    ) -> None:
        if block < 1:
            raise ValueError(f"block must be 1 or more, got {block}")
        if window < block:
            raise ValueError(f"window must be at least block = {block}, got {window}")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank must be in [0, num_replicas = {num_replicas}), got {rank}")
        self.data, self.block, self.window, self.seed = data, block, window, seed
        self.num_replicas, self.rank, self.drop_last = num_replicas, rank, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which changes the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        more = 0 if self.drop_last else self.num_replicas - 1
        return (len(self.data) + more) // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        sequence = _Sequence(len(self.data), self.block, self._generator("blocks"))
        generator = self._generator(f"windows of {self.rank}")
        first, last = self.rank * len(self), (self.rank + 1) * len(self)
        prefetch = getattr(self.data, "prefetch", None)

        def fetch(start: int) -> None:
            stop = min(start + self.block, last)
            for stretch in sequence.stretches(start, stop) if prefetch and start < stop else ():
                prefetch(*stretch)

        for start in range(first, min(first + self.window, last), self.block):
            fetch(start)
        for start in range(first, last, self.window):
            samples = sequence[start : min(start + self.window, last)]
            samples = samples[torch.randperm(len(samples), generator=generator)]
            for i, some in enumerate(samples.split(self.block)):
                fetch(start + self.window + i * self.block)
                yield from some.tolist()

    def _generator(self, purpose: str) -> torch.Generator:
        text = f"{self.seed} {self.epoch} {purpose}".encode()
        key = hashlib.blake2b(text, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(key, "little"))


class _Sequence:
    """The samples in the order of their blocks, cyclic."""

    def __init__(self, num_samples: int, block: int, generator: torch.Generator) -> None:
        self.num_samples = num_samples
        self.first = torch.randperm(-(-num_samples // block), generator=generator) * block
        lengths = (num_samples - self.first).clamp(max=block)
        self.end = lengths.cumsum(0)
        self.start = self.end - lengths

    def __getitem__(self, places: slice) -> Tensor:
        place = torch.arange(places.start, places.stop) % self.num_samples
        block = torch.searchsorted(self.end, place, right=True)
        return self.first[block] + place - self.start[block]

    def stretches(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Runs of consecutive samples (first, last + 1) between these positions."""
        samples = self[start:stop]
        cuts = (samples.diff() != 1).nonzero()[:, 0] + 1
        runs = samples.tensor_split(cuts)
        return [(int(run[0]), int(run[-1]) + 1) for run in runs]
