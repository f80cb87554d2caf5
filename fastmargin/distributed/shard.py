"""Which classes a process holds, and which processes hold the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmargin.distributed import collectives

if TYPE_CHECKING:  # takes most of a second to import
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


SPLITS = ("chunk", "even")
"""How classes are split into shards, see :func:`bounds`."""


def bounds(num_classes: int, ranks: int, rank: int, split: str = "chunk") -> tuple[int, int]:
    """First and one past the last class of a rank.

    "chunk": as ``torch.chunk`` and a DTensor's ``Shard(0)``; every shard but the last ones has
    ``ceil(num_classes / ranks)`` classes, the last ones may be empty. "even": as insightface; the
    first ``num_classes % ranks`` shards have one class more than the others.
    """
    if split == "even":
        size, more = divmod(num_classes, ranks)
        return rank * size + min(rank, more), (rank + 1) * size + min(rank + 1, more)
    size = -(-num_classes // ranks)
    return min(num_classes, rank * size), min(num_classes, (rank + 1) * size)


@dataclass(frozen=True)
class ClassShard:
    """The classes ``[start, stop)`` of ``num_classes``, on this process.

    group: the processes over which the classes are sharded. replicas: those that hold the same
    classes as this one and see other rows; None without any. mesh: both as one DeviceMesh, classes
    along its last dimension. split: one of :data:`SPLITS`.
    """

    num_classes: int
    start: int
    stop: int
    group: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    mesh: DeviceMesh
    split: str = "chunk"

    @staticmethod
    def of(
        num_classes: int,
        group: str | dist.ProcessGroup | DeviceMesh,
        device_type: str,
        split: str = "chunk",
    ) -> ClassShard:
        """This process's shard.

        Args:
            num_classes: C.
            group: "world", a process group, or a DeviceMesh of one dimension; of two dimensions,
                the last one shards the classes and the first one replicates them.
            device_type: of the class centres, "cpu" or "cuda".
            split: one of :data:`SPLITS`.

        Raises:
            TypeError, ValueError: group is something else, or this process is not in it.
        """
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(group, str) and group == "world":
            if not dist.is_initialized():
                raise ValueError(
                    "group='world', and there are no processes yet: call "
                    "torch.distributed.init_process_group first"
                )
            group = dist.group.WORLD
        if isinstance(group, DeviceMesh):
            mesh = group
        elif group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: this process is not part of it; make the head elsewhere")
        elif isinstance(group, dist.ProcessGroup):
            if dist.get_rank(group) < 0:
                raise ValueError("group: this process is not part of it; make the head elsewhere")
            mesh = DeviceMesh.from_group(group, device_type)
        else:
            raise TypeError(
                "group must be None, 'world', a ProcessGroup or a DeviceMesh, got "
                f"{group if isinstance(group, str) else type(group).__name__!r}"
            )
        if mesh.ndim > 2 or mesh.get_coordinate() is None:
            raise ValueError(
                f"group: the mesh has {mesh.ndim} dimensions and this process the place "
                f"{mesh.get_coordinate()} in it; wanted are 1 or 2 dimensions, and a place"
            )
        classes = mesh.get_group(mesh.ndim - 1)
        replicas = mesh.get_group(0) if mesh.ndim == 2 and mesh.size(0) > 1 else None
        start, stop = bounds(num_classes, classes.size(), dist.get_rank(classes), split)
        return ClassShard(num_classes, start, stop, classes, replicas, mesh, split)

    @staticmethod
    def of_dtensor(weight: DTensor) -> ClassShard:
        """Where a DTensor (C, D) of class centres has its rows.

        Raises:
            ValueError: it is not placed ``[Shard(0)]`` or ``[Replicate(), Shard(0)]``.
        """
        mesh = weight.device_mesh
        shard = ClassShard.of(weight.shape[0], mesh, mesh.device_type)
        if tuple(weight.placements) != shard.placements():
            raise ValueError(
                f"weight is a DTensor placed {weight.placements}; class centres are split by "
                f"class: redistribute it to {shard.placements()}"
            )
        return shard

    @property
    def rank(self) -> int:
        """Index of the shard."""
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """Number of shards."""
        return self.group.size()

    @property
    def num_replicas(self) -> int:
        """Number of processes with the same classes."""
        return 1 if self.replicas is None else self.replicas.size()

    @property
    def replica(self) -> int:
        """Index among the processes with the same classes."""
        return collectives.rank_in(self.replicas)

    def processes(self) -> list[int]:
        """Ranks in the default group of all shards and their replicas."""
        return self.mesh.mesh.flatten().tolist()

    def resized(self, num_classes: int) -> ClassShard:
        """The same processes with another number of classes."""
        return ClassShard.of(num_classes, self.mesh, self.mesh.device_type, self.split)

    def bounds(self, rank: int) -> tuple[int, int]:
        """First and one past the last class of another shard."""
        return bounds(self.num_classes, self.ranks, rank, self.split)

    def to_dtensor(self, rows: Tensor) -> DTensor:
        """The full (C, ...) tensor as a DTensor, a view of the local ``rows``.

        Raises:
            ValueError: a DTensor has no such split, or the device type differs.
        """
        from torch.distributed.tensor import DTensor

        if self.split != "chunk":
            raise ValueError(
                f"classes are split {self.split!r} and a DTensor's are split 'chunk': gather them"
            )

        if rows.device.type != self.mesh.device_type:
            raise ValueError(
                f"the centres are on {rows.device} and their group is for {self.mesh.device_type}: "
                "make the head there with device=, instead of moving it"
            )
        return DTensor.from_local(
            rows.contiguous(),
            self.mesh,
            self.placements(),
            run_check=False,
            shape=torch.Size((self.num_classes, *rows.shape[1:])),
            stride=rows.new_empty((1, *rows.shape[1:])).stride(),
        )

    def placements(self) -> tuple:
        """Placements of a DTensor of all rows on :attr:`mesh`."""
        from torch.distributed.tensor import Replicate, Shard

        return (Replicate(),) * (self.mesh.ndim - 1) + (Shard(0),)

    def gather_classes(self, rows: Tensor) -> Tensor:
        """(C, ...) of all shards, from this one's rows."""
        sizes = [stop - start for start, stop in map(self.bounds, range(self.ranks))]
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        gathered = collectives.gather_stacked(padded, self.group)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    def __deepcopy__(self, memo) -> ClassShard:
        return self  # process groups are not copied


def check_outside_ddp(rows: Tensor, shard: ClassShard | None) -> None:
    """Raises ValueError in a forward of DDP around sharded rows, which DDP treats as copies.

    It has overwritten them with those of its first process, and would mix their gradients.
    Compiled steps are not checked.
    """
    ddp = None
    if shard is not None and not torch.compiler.is_compiling():
        ddp = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if ddp is not None and overwrites(ddp, rows, shard):
        raise ValueError(
            "DistributedDataParallel is around a head that shares out its classes, and has "
            "overwritten them: make the head anew, and leave it outside (wrap the backbone alone)"
        )


def overwrites(ddp: nn.parallel.DistributedDataParallel, rows: Tensor, shard: ClassShard) -> bool:
    """Whether DDP synchronises a parameter whose rows are sharded over its processes."""
    copies = dist.get_process_group_ranks(ddp.process_group)
    if len(set(copies).intersection(dist.get_process_group_ranks(shard.group))) < 2:
        return False
    parameters = ddp.module.named_parameters()
    return any(p is rows and name not in ddp.parameters_to_ignore for name, p in parameters)


def shards_in(module: nn.Module) -> dict[str, ClassShard]:
    """The shards of a module's sharded parameters, by name.

    Submodules declare them by a method ``shared_rows``, which returns them by local names.
    """
    return {
        f"{prefix}.{name}" if prefix else name: shard
        for prefix, part in module.named_modules()
        if hasattr(part, "shared_rows")
        for name, shard in part.shared_rows().items()
    }
