"""The common base of insightface's and CVLface's ``PartialFC_V2``: a shard and its loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmargin import functional
from fastmargin.checks import check_inputs
from fastmargin.class_set import INIT_STD
from fastmargin.columns import Classes
from fastmargin.compat import plain_pfc
from fastmargin.compat.margin_losses import as_margin
from fastmargin.deferred import SettledCopies
from fastmargin.distributed import collectives
from fastmargin.distributed.processes import GroupProcesses
from fastmargin.distributed.shard import ClassShard, bounds, check_outside_ddp
from fastmargin.margins import Margin
from fastmargin.sampling import ClassSampler


@dataclass
class _Place:
    """What belongs to the head but not to its ``state_dict``, as the original has no such entry.

    shard, sampler: of the device that the centres are on.
    """

    margin: Margin | None
    device: torch.device | None = None
    shard: ClassShard | None = None
    sampler: ClassSampler | plain_pfc.PlainSampler | None = None


def check_sizes(embedding_size: int, num_classes: int, sample_rate: float) -> None:
    """Raises ValueError for invalid sizes."""
    if embedding_size < 1 or num_classes < 1:
        raise ValueError(
            "embedding_size and num_classes must be at least 1, got "
            f"{embedding_size} and {num_classes}"
        )
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")


def check_world(rank: int, world_size: int) -> None:
    """Raises ValueError unless these are the rank in, and the size of, the default group."""
    group = collectives.world()
    found = (0, 1) if group is None else (collectives.rank_in(group), group.size())
    if (rank, world_size) != found:
        raise ValueError(
            f"rank={rank} and world_size={world_size}, but this process is number {found[0]} of "
            f"{found[1]}: call torch.distributed.init_process_group first, and pass its numbers"
        )


class PartialFCV2(SettledCopies, nn.Module):
    """The centres of this process's classes under a margin; see the two subclasses.

    ``rows``: first and one past the last row of ``weight`` among those of all processes. ``split``
    (see :func:`fastmargin.distributed.shard.bounds`) says which of them are classes; rows beyond
    take no part unless ``faithful``.
    """

    split: str

    def __init__(
        self,
        margin_loss,
        embedding_size: int,
        num_classes: int,
        sample_rate: float,
        rank: int,
        world_size: int,
        rows: tuple[int, int],
        backend: str,
        precision: str,
        faithful: bool,
        sparse_grad: bool,
        seed: int,
    ) -> None:
        super().__init__()
        check_sizes(embedding_size, num_classes, sample_rate)
        if faithful and (sparse_grad or isinstance(margin_loss, Margin)):
            raise ValueError(
                "faithful=True runs the original's dense operations: without sparse_grad, and with "
                "a margin loss of the original's kind, called on cosines"
            )
        if faithful and not callable(margin_loss):
            raise TypeError(f"margin_loss must be callable, got {margin_loss!r}")
        margin = None if faithful else self._margin_of(margin_loss)
        self.rank, self.world_size = rank, world_size
        self.embedding_size, self.sample_rate = embedding_size, sample_rate
        self.class_start, self.num_local = rows[0], rows[1] - rows[0]
        self.num_sample = int(sample_rate * self.num_local)
        self.last_batch_size = 0
        self.backend, self.precision = backend, precision
        self.faithful, self.sparse_grad, self.seed = faithful, sparse_grad, seed
        self._classes = num_classes
        self.weight = nn.Parameter(torch.normal(0, INIT_STD, (self.num_local, embedding_size)))
        self.margin_softmax = margin_loss
        self._place = _Place(margin)
        self._placed()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._placed()  # here and not in a step, which may be traced
        return self

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """Mean loss over the rows of all processes, the same number on each.

        Every process calls it with its own rows; the embeddings' gradient is multiplied by the
        number of processes, for DDP to divide.

        Args:
            local_embeddings: (b, D) raw.
            local_labels: (b,) or (b, 1) int64 in [0, C); -1: ignored. Not modified.

        Raises:
            TypeError, ValueError: an argument is not as above; nothing has changed then.
        """
        place, margin = self._placed(), self._place.margin
        check_outside_ddp(self.weight, place.shard)
        if self.faithful:
            return self._official(local_embeddings, local_labels)
        rows = local_embeddings.shape[0] if isinstance(local_embeddings, Tensor) else 0
        if place.shard is not None and 0 < self.last_batch_size < rows:
            raise ValueError(
                f"local_embeddings have {rows} rows, but the first step had at most "
                f"{self.last_batch_size} on any process, and so much is exchanged since: feed "
                "batches of one size (drop_last=True), the largest first"
            )
        # also in eval(): CVLface keeps a frozen classifier in eval()
        wants_grad = torch.is_grad_enabled() and getattr(local_embeddings, "requires_grad", False)
        margin.train(self.training or wants_grad)
        self._lend_state(margin)
        here = self.weight
        if place.shard is not None and (place.sampler is None or not margin.training):
            here = here[: place.shard.stop - place.shard.start]
        batch_size = self.last_batch_size or None
        classes = Classes(place.shard, place.sampler, self.sparse_grad, batch_size=batch_size)
        settings = {"backend": self.backend, "precision": self.precision, "classes": classes}
        loss, found = functional.loss_and_rows(
            local_embeddings, here, local_labels, margin, **settings
        )
        if found.batch is not None:
            self.last_batch_size = found.batch.rows
        return loss

    def shared_rows(self) -> dict[str, ClassShard]:
        """For :func:`fastmargin.distributed.shard.shards_in`; rows need not be classes."""
        if self.world_size == 1:
            return {}
        padded = self.num_local * self.world_size
        rows = self._classes if self.split == "even" else padded
        return {"weight": ClassShard.of(rows, "world", self.weight.device.type, self.split)}

    def _margin_of(self, margin_loss) -> Margin:
        return as_margin(margin_loss)

    def _lend_state(self, margin: Margin) -> None:
        """Gives the margin access to the state that the classifier keeps for it."""

    def _placed(self) -> _Place:
        """The place, for the device that the centres are on."""
        place, device = self._place, self.weight.device
        if place.device != device and not self.weight.is_meta:
            shard = None
            if self.world_size > 1:
                shard = ClassShard.of(self._classes, "world", device.type, self.split)
            start, stop = (0, self._classes) if shard is None else (shard.start, shard.stop)
            place.shard, place.device = shard, device
            if self.faithful:
                place.margin = None
            else:
                place.margin.to(device)
                place.margin.processes = GroupProcesses(shard)
            if self.sample_rate < 1:
                place.sampler = self._new_sampler(start, stop, device)
        return place

    def _new_sampler(self, start: int, stop: int, device: torch.device):
        if self.faithful:
            return plain_pfc.PlainSampler(self.num_local, self.num_sample, self.class_start)
        count = max(1, self.num_sample)
        return ClassSampler(stop - start, count, self.seed, self.rank, start, device)

    # ---- faithful ----

    def _official(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        place, group = self._placed(), collectives.world()
        labels = check_inputs(
            local_embeddings, self.weight, local_labels, Margin(), "auto", False, self._classes
        )
        if self.last_batch_size not in (0, len(labels)):
            raise ValueError(
                f"local_embeddings have {len(labels)} rows and those before had "
                f"{self.last_batch_size}: batches must be of one size"
            )
        self.last_batch_size = len(labels)
        x = plain_pfc.gather(local_embeddings, group)
        labels = collectives.gather_stacked(labels, group).flatten()
        weight = self.weight
        if place.sampler is None:
            own = plain_pfc.local_labels(labels, self.class_start, self.num_local)
        else:
            sample = place.sampler.draw(labels)
            weight, own = weight[sample.index], sample.column
        logits = self._official_logits(x, weight, own[:, None])
        return plain_pfc.cross_entropy(logits, own, group)

    def _official_logits(self, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """(R * b, K) with the margin, from raw rows and centres; labels: positions (R * b, 1)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return (
            f"embedding_size={self.embedding_size}, num_classes={self._classes}, "
            f"classes {self.class_start} to {self.class_start + self.num_local} here, "
            f"sample_rate={self.sample_rate}"
        )


def shard_rows(num_classes: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and one past the last row of a process, as insightface splits them."""
    return bounds(num_classes, world_size, rank, "even")
