"""The processes that train a classifier, as seen by its margin."""

from __future__ import annotations

from torch import Tensor

from fastmargin.distributed import batch, collectives
from fastmargin.distributed.shard import ClassShard


class GroupProcesses:
    """Implements :class:`fastmargin.margins.Processes` for several processes.

    shard: None where every process holds all classes, and the default group the other rows.
    batch_size: as :class:`fastmargin.MarginHead`.
    """

    def __init__(self, shard: ClassShard | None, batch_size: int | None = None) -> None:
        self.shard, self.batch_size = shard, batch_size

    @property
    def place(self) -> int:
        return (
            collectives.rank_in(collectives.world()) if self.shard is None else self.shard.replica
        )

    def sum(self, tensor: Tensor) -> Tensor:
        peers = collectives.world() if self.shard is None else self.shard.replicas
        return collectives.sum_all(tensor, peers)

    def gather_classes(self, rows: Tensor) -> Tensor:
        return rows if self.shard is None else self.shard.gather_classes(rows)

    def gather_rows(self, labels: Tensor, rows: Tensor, *more: Tensor) -> list[Tensor]:
        if self.shard is None:
            return [labels, rows, *more]
        most = self.batch_size or batch.most_rows(rows, self.shard)
        return batch.gather_padded(labels, rows, *more, rows=most, shard=self.shard)
