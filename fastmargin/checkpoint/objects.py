"""What is saved of objects, and how it is restored."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastmargin import deferred
from fastmargin.checkpoint.pieces import Piece, Place, put_back, replace, take_out
from fastmargin.distributed import collectives
from fastmargin.distributed.shard import ClassShard, overwrites, shards_in
from fastmargin.head import MarginHead

MODULE, OPTIMIZER, STATE, VALUE = "module", "optimizer", "state", "value"
FORMAT = 1
"""Version of the format of what is stored besides the tensors."""
SHOWN = 10
"""Maximum number of entries that an error lists."""


def kind_of(thing: Any) -> str:
    if isinstance(thing, nn.Module):
        return MODULE
    if isinstance(thing, torch.optim.Optimizer):
        return OPTIMIZER
    stateful = hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")
    return STATE if stateful else VALUE


def _listed(names) -> str:
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN))


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_state_is_whole(name: str, module: nn.Module) -> None:
    """Raises ValueError if a submodule declares that its ``state_dict`` is incomplete."""
    for inner, part in module.named_modules():
        left_out = getattr(part, "outside_state", None)
        if left_out is not None:
            raise ValueError(
                f"{name}{inner and '.'}{inner}: the state_dict of a {type(part).__name__} leaves "
                f"out {left_out}: leave it out of objects"
            )


class Objects:
    """The objects of one call, by name, and the processes that make it.

    group: the processes that save or load; None for this one alone.

    Raises:
        ValueError: a head's classes are on processes outside the group, or were overwritten by
            DDP; a module has state outside its ``state_dict``; or an optimiser has parameters of
            no given module, so that their sharding is unknown.
    """

    def __init__(self, objects: dict[str, Any], group) -> None:
        if not isinstance(objects, dict):
            raise TypeError(
                'objects must be a dict by name, such as {"head": head}, got a '
                f"{type(objects).__name__}"
            )
        unwrapped = {
            name: thing.module if isinstance(thing, nn.parallel.DistributedDataParallel) else thing
            for name, thing in objects.items()
        }
        self.objects, self.group = unwrapped, group
        self.kinds = {name: kind_of(thing) for name, thing in unwrapped.items()}
        self.rows: dict[str, ClassShard] = {}
        """Shards of the entries with sharded rows."""
        self.shards: dict[int, ClassShard] = {}
        """The same, by the identity of the parameter."""
        for name, module in self.of_kind(MODULE).items():
            _check_state_is_whole(name, module)
            for inner, shard in shards_in(module).items():
                entry, parameter = f"{name}.{inner}", module.get_parameter(inner)
                if module is not objects[name] and overwrites(objects[name], parameter, shard):
                    raise ValueError(
                        f"{entry}: DistributedDataParallel has overwritten rows that processes "
                        "share out: leave the head outside"
                    )
                self.rows[entry], self.shards[id(parameter)] = shard, shard
        self._check()

    def of_kind(self, kind: str) -> dict[str, Any]:
        return {name: thing for name, thing in self.objects.items() if self.kinds[name] == kind}

    def heads(self) -> Iterator[tuple[str, MarginHead]]:
        """All heads in the modules, with the names of their entries up to the last dot."""
        for name, module in self.of_kind(MODULE).items():
            for inner, part in module.named_modules():
                if isinstance(part, MarginHead):
                    yield f"{name}.{inner}" if inner else name, part

    def _check(self) -> None:
        if self.group is None:
            return
        members = set(collectives.ranks_of(self.group))
        for entry, shard in self.rows.items():
            if not members.issuperset(shard.processes()):
                raise ValueError(
                    f"{entry}: processes {shard.processes()} share out its rows, and only "
                    f"{sorted(members)} take part: give a process_group of all"
                )
        modules = self.of_kind(MODULE).values()
        known = {id(parameter) for module in modules for parameter in module.parameters()}
        for name, optimizer in self.of_kind(OPTIMIZER).items():
            for i, parameter in enumerate(_parameters(optimizer)):
                if id(parameter) not in known:
                    raise ValueError(
                        f"{name}: its parameter {i}, {tuple(parameter.shape)}, is of no module in "
                        "objects: add the module, which says how processes share it out"
                    )

    def settle(self) -> None:
        """Applies the pending updates of lazy optimisers."""
        for module in self.of_kind(MODULE).values():
            for parameter in module.parameters():
                deferred.settle(parameter)
        for optimizer in self.of_kind(OPTIMIZER).values():
            for parameter in _parameters(optimizer):
                deferred.settle(parameter)

    def size_of(self, parameter: Tensor) -> tuple[int, ...]:
        """Shape of a parameter over all processes."""
        shard = self.shards.get(id(parameter))
        return tuple(
            parameter.shape if shard is None else (shard.num_classes, *parameter.shape[1:])
        )

    def piece_of(self, entry: str, tensor: Tensor) -> Piece:
        """How an entry of a module is stored."""
        shard = self.rows.get(entry)
        if shard is None or hasattr(tensor, "placements"):
            return Piece.of(entry, tensor)
        return Piece.of_rows(tensor, shard.start, shard.num_classes)

    def sizes(self, optimizer: torch.optim.Optimizer) -> list[list[tuple[int, ...]]]:
        return [
            [self.size_of(parameter) for parameter in group["params"]]
            for group in optimizer.param_groups
        ]

    def summed(self) -> Iterator[tuple[str, Any, bool]]:
        """Entries to sum over processes: name, the processes, whether this is the first of them.

        The processes are None for those of the call.
        """
        for name, head in self.heads():
            for buffer in head.margin.summed:
                entry = f"{name}.margin.{buffer}"
                if head.shard is None:
                    yield entry, None, collectives.rank_in(self.group) == 0
                elif head.shard.replicas is not None:
                    yield entry, head.shard.replicas, head.shard.replica == 0


# ---- taking ----


@dataclass
class Taken:
    """What is stored: tensors by name, and the rest pickled, on the first process only."""

    pieces: dict[str, Piece] = field(default_factory=dict)
    structure: bytes = b""


def take(objects: Objects) -> Taken:
    """The state of all objects, which must be settled; tensors are those of the objects.

    Raises:
        ValueError, TypeError: a state that cannot be stored.
    """
    taken, structure = Taken(), {}
    for name, thing in objects.objects.items():
        kind = objects.kinds[name]
        entry: dict[str, Any] = {"kind": kind, "type": type(thing).__name__}
        if kind == OPTIMIZER:
            entry["sizes"] = objects.sizes(thing)
            entry["state"] = _take_optimizer(name, thing, objects, taken.pieces)
        else:
            state = thing if kind == VALUE else thing.state_dict()
            entry["state"] = take_out(state, name, taken.pieces, objects.piece_of)
        structure[name] = entry
    if collectives.rank_in(objects.group) == 0:
        file = io.BytesIO()
        torch.save({"format": FORMAT, "objects": structure}, file)
        taken.structure = file.getvalue()
    return taken


def _take_optimizer(
    name: str, optimizer: torch.optim.Optimizer, objects: Objects, pieces: dict[str, Piece]
) -> Any:
    state = dict(optimizer.state_dict())
    of_parameters = dict(state["state"])
    for i, parameter in enumerate(_parameters(optimizer)):
        shard = objects.shards.get(id(parameter))
        if shard is not None and i in of_parameters:
            of_parameters[i] = take_out(
                of_parameters[i], f"{name}.state.{i}", pieces, _rows_of(parameter, shard)
            )
    state["state"] = of_parameters
    return take_out(state, name, pieces)


def _rows_of(parameter: Tensor, shard: ClassShard) -> Callable[[str, Tensor], Piece]:
    """How the state of a parameter with sharded rows is stored."""

    def piece(name: str, tensor: Tensor) -> Piece:
        if tensor.dim() == 0:
            return Piece.of(name, tensor)
        if tensor.shape[0] != parameter.shape[0]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and its parameter "
                f"{tuple(parameter.shape)}: of a parameter whose rows are shared out, only "
                "optimisers whose state is a number or has those rows can be saved"
            )
        return Piece.of_rows(tensor, shard.start, shard.num_classes)

    return piece


def sum_up(objects: Objects, pieces: dict[str, Piece]) -> None:
    """Replaces buffers to be summed over processes by their sum; all processes call this."""
    for name, peers, _ in objects.summed():
        piece = pieces[name]
        tensor = piece.tensor.cpu() if peers is None else piece.tensor
        total = collectives.sum_all(tensor, objects.group if peers is None else peers)
        pieces[name] = piece.with_tensor(total)


# ---- putting back ----


class Loading:
    """A checkpoint to be restored into objects; nothing changes before :meth:`put_others`.

    Args:
        structure: what was stored besides the tensors.
        stored: shape and dtype of every stored tensor.
        strict: all saved objects must be given; otherwise those that are not are skipped.

    Raises:
        ValueError: it does not match the objects.
    """

    def __init__(
        self,
        objects: Objects,
        structure: dict[str, dict[str, Any]],
        stored: dict[str, tuple[tuple[int, ...], torch.dtype]],
        strict: bool,
    ) -> None:
        if not strict:
            kinds = objects.kinds
            structure = {n: e for n, e in structure.items() if n in kinds or e["kind"] == VALUE}
        self.objects, self.structure, self.stored = objects, structure, stored
        self.pieces: dict[str, Piece] = {}
        """To be filled from the files."""
        self._originals: dict[str, Tensor] = {}
        self._check_objects()
        # modules first: their errors say more than those of their optimisers
        for kind, plan in (
            (MODULE, self._plan_module),
            (OPTIMIZER, self._plan_optimizer),
            (STATE, self._plan_state),
            (VALUE, self._plan_state),
        ):
            for name in structure:
                if structure[name]["kind"] == kind:
                    plan(name)

    def _check_objects(self) -> None:
        saved, here = self.structure, self.objects.kinds
        absent = here.keys() - saved.keys()
        # values need no object to restore into
        extra = {name for name in saved.keys() - here.keys() if saved[name]["kind"] != VALUE}
        if absent or extra:
            raise ValueError(
                f"objects: only in the checkpoint: {_listed(extra) or 'none'}; only here: "
                f"{_listed(absent) or 'none'}: pass objects under the names they were saved with, "
                "and strict=False for some of them only"
            )
        for name, kind in here.items():
            entry, type_here = saved[name], type(self.objects.objects[name]).__name__
            differs = kind == STATE and entry["type"] != type_here
            if entry["kind"] != kind or differs:
                raise ValueError(
                    f"{name}: a {entry['type']} was saved ({entry['kind']}), and a {type_here} "
                    f"({kind}) is here: pass an object of the saved kind"
                )

    def _add(self, name: str, original: Tensor, layout: Piece) -> None:
        self.pieces[name] = layout.empty(self.stored[name][1])
        self._originals[name] = original

    def _add_wholes(self, state: Any, name: str) -> None:
        for entry in _places(state, name):
            if entry not in self.pieces:
                size, _ = self.stored[entry]
                like = torch.empty(()).expand(size)
                self._add(entry, like, Piece.of(entry, like))

    def _plan_state(self, name: str) -> None:
        self._add_wholes(self.structure[name]["state"], name)

    def _plan_module(self, name: str) -> None:
        own: dict[str, Piece] = {}
        state = self.objects.objects[name].state_dict()
        take_out(state, name, own, self.objects.piece_of)
        saved = set(_places(self.structure[name]["state"], name))
        if own.keys() != saved:
            raise ValueError(
                f"{name}: only in the checkpoint: {_listed(saved - own.keys()) or 'none'}; only "
                f"here: {_listed(own.keys() - saved) or 'none'}: make it as it was made for the "
                "checkpoint, with the same margin and options (head.change_margin comes after it)"
            )
        for prefix, head in self.objects.heads():
            entry = f"{prefix}.weight"
            if entry in own and self.stored[entry][0][0] != head.num_classes:
                raise ValueError(
                    f"{entry} has {self.stored[entry][0][0]} rows in the checkpoint, and the head "
                    f"{head.num_classes} classes: make the head with the saved number, load, and "
                    "then change it with extend_classes or select_rows"
                )
        differ = [
            f"{entry}: {self.stored[entry][0]} {self.stored[entry][1]} in the checkpoint, "
            f"{piece.size} {piece.tensor.dtype} here"
            for entry, piece in own.items()
            if self.stored[entry] != (piece.size, piece.tensor.dtype)
        ]
        if differ:
            raise ValueError("; ".join(differ[:SHOWN]) + ": make it with the saved sizes and dtype")
        originals: dict[str, Tensor] = {}
        replace(Tensor, state, name, originals.__setitem__)
        for entry, piece in own.items():
            self._add(entry, originals[entry], piece)

    def _plan_optimizer(self, name: str) -> None:
        optimizer, entry = self.objects.objects[name], self.structure[name]
        for i, (saved, here) in enumerate(
            itertools.zip_longest(entry["sizes"], self.objects.sizes(optimizer))
        ):
            for j, (old, new) in enumerate(itertools.zip_longest(saved or [], here or [])):
                if old != new:
                    raise ValueError(
                        f"{name}: parameter {j} of group {i} has shape {old} in the checkpoint "
                        f"and {new} here: make it for the same parameters in the same order"
                    )
        of_parameters = entry["state"]["state"]
        for i, parameter in enumerate(_parameters(optimizer)):
            for part in _places(of_parameters.get(i), f"{name}.state.{i}"):
                self._plan_state_of(part, parameter)
        self._add_wholes(entry["state"], name)

    def _plan_state_of(self, entry: str, parameter: Tensor) -> None:
        """A parameter's state is sharded as the parameter, if its shape matches."""
        size, _ = self.stored[entry]
        shard = self.objects.shards.get(id(parameter))
        if shard is not None and size:
            if size[0] != shard.num_classes:
                raise ValueError(
                    f"{entry} has shape {size} in the checkpoint, which has no row for each of "
                    f"{shard.num_classes} classes: it cannot be shared out"
                )
            like = torch.empty(()).expand(shard.stop - shard.start, *size[1:])
            self._add(entry, like, Piece.of_rows(like, shard.start, shard.num_classes))
        elif size == tuple(parameter.shape) and hasattr(parameter, "placements"):
            self._add(entry, parameter, Piece.of(entry, parameter))

    def _state(self, name: str) -> Any:
        return put_back(
            self.structure[name]["state"],
            lambda entry: self.pieces[entry].back(self._originals[entry]),
        )

    def values(self) -> dict[str, Any]:
        """The plain values that were saved."""
        return {name: self._state(name) for name, e in self.structure.items() if e["kind"] == VALUE}

    def keep_sums_once(self) -> None:
        """Keeps buffers that were summed over processes on the first one, zero on the others."""
        for name, _, first in self.objects.summed():
            if not first and name in self.pieces:
                self.pieces[name].tensor.zero_()

    def put_others(self) -> Callable[[], None]:
        """Restores everything but modules; returns an undo function. All or nothing."""
        undo: list[tuple[Any, Any]] = []

        def take_back() -> None:
            for thing, state in reversed(undo):
                thing.load_state_dict(state)

        try:
            for name, thing in self.objects.of_kind(STATE).items():
                undo.append((thing, copy.deepcopy(thing.state_dict())))
                thing.load_state_dict(self._state(name))
            for name, optimizer in self.objects.of_kind(OPTIMIZER).items():
                # its tensors are replaced, not written to: no copy is needed
                undo.append((optimizer, optimizer.state_dict()))
                options = [set(group) for group in optimizer.param_groups]
                optimizer.load_state_dict(self._state(name))
                self._check_options(name, optimizer, options)
        except Exception:
            take_back()
            raise
        return take_back

    def _check_options(
        self, name: str, optimizer: torch.optim.Optimizer, options: list[set[str]]
    ) -> None:
        for before, group in zip(options, optimizer.param_groups, strict=True):
            if lost := before - set(group):
                raise ValueError(
                    f"{name}: a {self.structure[name]['type']} was saved, which has no "
                    f"{_listed(lost)}: load it into the same optimiser"
                )

    def put_modules(self) -> None:
        """Restores modules, which were checked."""
        for name, module in self.objects.of_kind(MODULE).items():
            module.load_state_dict(self._state(name))


def _places(state: Any, name: str) -> list[str]:
    """Names of the tensors that were replaced in a state."""
    found: list[str] = []
    replace(Place, state, name, lambda _, place: found.append(place.name))
    return found
