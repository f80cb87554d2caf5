"""The rows of a classifier: initialising, loading and reordering them, also across processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from fastmargin.distributed import collectives
from fastmargin.distributed.shard import ClassShard

INIT_STD = 0.01
DRAWN_TOGETHER = 1024
"""Classes drawn from one generator; fixed, so that centres do not depend on the sharding."""


@torch.no_grad()
def draw_centres_(weight: Tensor, start: int, shard: ClassShard | None) -> None:
    """Fills the rows (C_local, D) of the classes from ``start`` on with N(0, 0.01^2) draws.

    The same centres for any number of processes: seeded by torch's default generator on the first
    process, drawn in float32, rounded to their dtype.
    """
    if weight.is_meta:
        return
    base = torch.randint(2**62, (1,)).to(weight.device)
    if shard is not None:
        base = collectives.gather_stacked(base, shard.group)[0]
        base = collectives.gather_stacked(base, shard.replicas)[0]
    base, stop = int(base), start + weight.shape[0]
    generator = torch.Generator(weight.device)
    for block in range(start // DRAWN_TOGETHER, -(-stop // DRAWN_TOGETHER)):
        first = block * DRAWN_TOGETHER
        generator.manual_seed((base + block) % 2**63)
        drawn = weight.new_empty((DRAWN_TOGETHER, weight.shape[1]), dtype=torch.float32)
        drawn.normal_(std=INIT_STD, generator=generator)
        low, high = max(first, start), min(first + DRAWN_TOGETHER, stop)
        weight[low - start : high - start] = drawn[low - first : high - first]


_replaced = WeakTensorKeyDictionary()
"""Parameters that no longer belong to a head."""
_watching = []


def replaced(parameter: Tensor) -> None:
    """From now on an optimiser that still holds this parameter raises in its step.

    Otherwise it would silently train nothing.
    """
    _replaced[parameter] = True
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_refuse_replaced))


def _refuse_replaced(optimiser: Optimizer, *_) -> None:
    if not len(_replaced):
        return
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and parameter in _replaced:
                raise RuntimeError(
                    f"the optimiser holds class centres {tuple(parameter.shape)} that "
                    "extend_classes or select_rows has replaced: make it anew from "
                    "head.parameters(), or replace them by head.weight"
                )


def rows_here(name: str, value: Tensor, num_classes: int, shard: ClassShard | None) -> Tensor:
    """This process's rows of a tensor of all classes, plain or a DTensor.

    Raises:
        ValueError: the number of classes differs, or another process saved it.
    """
    if value.dim() == 0 or value.shape[0] != num_classes:
        raise ValueError(
            f"{name} has {value.shape[0] if value.dim() else 0} rows to load, but the head has "
            f"{num_classes} classes: make the head with that number of classes, and change it "
            "afterwards with extend_classes or select_rows"
        )
    if hasattr(value, "placements"):
        if shard is not None and value.device_mesh == shard.mesh:
            first = getattr(value, "first_row", shard.start)  # travels with torch.save
            if first != shard.start:
                raise ValueError(
                    f"{name} holds rows from {first} on, those of another process; this process's "
                    f"begin at {shard.start}: load the state that this process saved, or use "
                    "fastmargin.checkpoint or torch.distributed.checkpoint, which save all rows"
                )
            return value.redistribute(placements=shard.placements()).to_local()
        value = value.full_tensor()
    return value if shard is None else value[shard.start : shard.stop]


class Change:
    """A reordering, removal or addition of classes, which may move rows between processes.

    index: (M,) int64 on the host; class i was class ``index[i]`` of ``num_classes``, or is new if
    that is -1. shard: the sharding before; :attr:`after` is the one afterwards. None: unsharded.
    """

    def __init__(self, num_classes: int, index: Tensor, shard: ClassShard | None) -> None:
        self.index, self.num_classes, self.before = index, num_classes, shard
        self.after = None if shard is None else shard.resized(len(index))

    @property
    def start(self) -> int:
        """First class on this process afterwards."""
        return 0 if self.after is None else self.after.start

    @property
    def stop(self) -> int:
        """One past the last class on this process afterwards."""
        return len(self.index) if self.after is None else self.after.stop

    def _here(self) -> slice:
        return slice(self.start, self.stop)

    def fill_new_(self, rows: Tensor, values: Tensor) -> None:
        """Writes ``values`` (n, ...) of the n new classes to this process's rows of them."""
        new = self.index < 0
        number = (new.cumsum(0) - 1)[self._here()]
        place = new[self._here()].nonzero().squeeze(1)
        rows[place.to(rows.device)] = values[number[place].to(values.device)]

    def move_(self, old: Tensor, new: Tensor) -> None:
        """Copies the rows of classes that stay from ``old`` (C_local, ...) to ``new``."""
        wanted = self.index[self._here()]
        if self.before is None:
            place = (wanted >= 0).nonzero().squeeze(1)
            new[place.to(new.device)] = old[wanted[place].to(old.device)]
            return
        shard, sent, places = self.before, [], []
        for rank in range(shard.ranks):
            start, stop = self.after.bounds(rank)
            asked = self.index[start:stop]
            sent.append(asked[(asked >= shard.start) & (asked < shard.stop)] - shard.start)
            start, stop = shard.bounds(rank)
            places.append(((wanted >= start) & (wanted < stop)).nonzero().squeeze(1))
        counts = [place.numel() for place in places]
        received = collectives.exchange_rows(old, sent, counts, shard.group)
        new[torch.cat(places).to(new.device)] = received

    def rows(self, old: Tensor, fill: float) -> Tensor:
        """A (C_local, ...) buffer after the change; ``fill`` for new classes."""
        new = old.new_full((len(self.index[self._here()]), *old.shape[1:]), fill)
        self.move_(old, new)
        return new

    def table(self, old: Tensor, fill: float) -> Tensor:
        """A (C, ...) buffer that every process holds in full, after the change."""
        index = self.index.to(old.device)
        new = old[index.clamp_min(0)]
        new[index < 0] = fill
        return new
