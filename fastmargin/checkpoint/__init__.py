"""Training checkpoints that load into any number of processes.

::

    training = {"head": head, "backbone": net, "optimizer": optimizer}
    fm.checkpoint.save(path, {**training, "epoch": 3})
    epoch = fm.checkpoint.load(path, training)["epoch"]

All processes of the group call these functions, with objects of the same names. An object is

- a module. DDP wrappers are unwrapped; DTensors, such as a head's rows or those of ``fully_shard``,
  are stored in parts, and everything else as on the first process;
- an optimiser. Its state of a head's centres is sharded as these are, if the head is among the
  objects, by itself or inside a module;
- anything else with ``state_dict`` and ``load_state_dict``: schedulers, gradient scalers;
- a plain value that pickles, which :func:`load` returns.

``path`` is a folder on storage that all processes see. A new version is written next to the
previous one and replaces it atomically once every process has written its part, so after any
interruption there is a complete checkpoint. Tensors are in ``torch.distributed.checkpoint``'s
format.

Trust a checkpoint as you would code: loading unpickles ``.metadata`` and ``structure.pt``, which
may run anything. Tensors are read with ``weights_only``. Load checkpoints only from sources whose
code you would run; to exchange centres alone safely, use
:meth:`fastmargin.MarginHead.export_centers`.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fastmargin.checkpoint import folder
from fastmargin.checkpoint.objects import FORMAT, Loading, Objects, Taken, sum_up, take
from fastmargin.distributed import agreement, collectives

__all__ = ["Saving", "async_save", "load", "save"]


class Saving:
    """A checkpoint that is being written."""

    def __init__(self, future: Future) -> None:
        self._future, self._asked = future, False

    def done(self) -> bool:
        """Whether writing has ended, successfully or not."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> None:
        """Waits until the checkpoint is the current one, at most ``timeout`` seconds.

        Raises:
            ProcessError: another process failed or died; the previous checkpoint stays current.
            OSError: this process could not write.
            TimeoutError: it takes longer than that.
        """
        try:
            self._future.result(timeout)
        finally:
            self._asked = self._asked or self.done()

    def _end(self) -> None:
        """Waits, and raises an error that was not raised yet."""
        if not self._asked:
            self.result()


_writer: ThreadPoolExecutor | None = None
_last: Saving | None = None


def _end_last() -> None:
    """Waits for an asynchronous save before any other checkpoint operation."""
    global _last
    last, _last = _last, None
    if last is not None:
        last._end()


def save(path: str | os.PathLike, objects: dict[str, Any], *, process_group=None) -> None:
    """Writes a checkpoint and returns when it is the current one of ``path``.

    Lazy optimisers first bring all rows up to date. Of state that differs between processes
    without being sharded, the first process's is kept: statistics of ``AdaFace(stats="local")``,
    memories of ``KappaFace`` in replicas, plain values. KappaFace's sums over an epoch are added
    up.

    Args:
        path: folder; created if missing.
        objects: what to save, by name.
        process_group: the processes that save; default: all, or only this one without
            ``init_process_group``.

    Raises:
        ValueError, TypeError: something cannot be saved.
        ProcessError: another process failed or died, or took longer than the group's timeout.
        OSError: a file cannot be written. In all cases the previous checkpoint stays current.
    """
    _end_last()
    group = agreement.channel(process_group)
    _write(Path(path), _taken(path, objects, group), group, staged=False)


def async_save(path: str | os.PathLike, objects: dict[str, Any], *, process_group=None) -> Saving:
    """:func:`save` that copies the state to the host's memory and writes while training goes on.

    One is written at a time: the next call of any function of this module waits for it, and raises
    its error unless ``result()`` has. Call ``result()`` before ``destroy_process_group``.
    """
    global _writer, _last
    _end_last()
    group = agreement.channel(process_group)
    taken = _taken(path, objects, group)

    def stage() -> None:
        for name, piece in taken.pieces.items():
            taken.pieces[name] = piece.with_tensor(_copied_to_host(piece.tensor))

    agreement.all_or_none(f"staging the checkpoint {path}", stage, group)
    if _writer is None:
        _writer = ThreadPoolExecutor(1, "fastmargin-checkpoint")
    _last = Saving(_writer.submit(_write, Path(path), taken, group, staged=True))
    return _last


def _copied_to_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu").copy_(tensor)


@torch.no_grad()
def _taken(path: str | os.PathLike, objects: dict[str, Any], group) -> Taken:
    """What to store, after the processes have checked that their objects are consistent."""
    taken = of = None

    def take_here() -> dict[str, tuple]:
        nonlocal taken, of
        of = Objects(objects, group)
        of.settle()
        taken = take(of)
        facts = {f"object {name!r}": (kind, False) for name, kind in of.kinds.items()}
        for name, piece in taken.pieces.items():
            facts[name] = (f"{piece.tensor.dtype} {piece.size}", piece.split)
        return facts

    facts = agreement.all_or_none(f"preparing the checkpoint {path}", take_here, group)
    _check_alike(facts)
    sum_up(of, taken.pieces)
    return taken


def _check_alike(facts: list[dict[str, tuple]]) -> None:
    """Checks that entries of one name match; only parts of tensors may be missing on some."""
    for name in dict.fromkeys(name for own in facts for name in own):
        found = [own.get(name) for own in facts]
        known = {fact for fact in found if fact is not None}
        if len(known) > 1 or (None in found and not next(iter(known))[1]):
            raise ValueError(
                f"{name} differs between processes: "
                + ", ".join(f"{i}: {fact[0] if fact else 'none'}" for i, fact in enumerate(found))
                + ": all processes save the same objects"
            )


def _write(path: Path, taken: Taken, group, staged: bool) -> None:
    from fastmargin.checkpoint import storage  # takes seconds to import

    what, rank = f"saving the checkpoint {path}", collectives.rank_in(group)

    def together(step: str, function) -> list:
        return agreement.all_or_none(f"{what} ({step})", function, group)

    offers = together("its plan", lambda: storage.to_write(taken.pieces, rank == 0))
    plans, metadata = storage.plan(offers)
    names = together("its folder", lambda: folder.new_version(path).name if rank == 0 else None)
    version = path / names[0]
    writer = storage.writer(version, staged, rank == 0)
    plan = writer.prepare_global_plan(plans)[rank]

    def write() -> list:
        if not version.is_dir():
            raise FileNotFoundError(f"{version} is not there: use storage that all processes see")
        return storage.write(writer, plan, taken.pieces)

    results = together("its files", write)

    def complete() -> None:
        if rank == 0:
            with open(version / folder.STRUCTURE, "wb") as file:
                file.write(taken.structure)
                file.flush()
                os.fsync(file.fileno())
            writer.finish(metadata, results)
            folder.make_current(version)

    together("its end", complete)


@torch.no_grad()
def load(
    path: str | os.PathLike, objects: dict[str, Any], *, process_group=None, strict: bool = True
) -> dict[str, Any]:
    """Restores objects from a checkpoint, saved by any number of processes.

    Everything is read into host memory and checked on all processes before anything changes. An
    optimiser needs no state before; it gets the saved one.

    Args:
        path: folder.
        objects: as for :func:`save`, under the same names; plain values may be left out.
        process_group: the processes that load; default as in :func:`save`.
        strict: False to load only some of the objects, such as ``{"backbone": net}`` for another
            task; ``{}`` returns the plain values alone.

    Returns:
        The plain values, by name.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint does not match the objects: other numbers of classes, sizes,
            dtypes, margins, optimisers, or names.
        ProcessError: another process failed or died.
    """
    from fastmargin.checkpoint import storage

    _end_last()
    path, group = Path(path), agreement.channel(process_group)
    what = f"loading the checkpoint {path}"
    versions = agreement.all_or_none(what, lambda: folder.current_version(path), group)
    if versions[0] is None:
        raise FileNotFoundError(
            f"{path}: there is no checkpoint, or none that was finished: start afresh or see to "
            "the path"
        )
    version = path / versions[0].name
    loading = take_back = None

    def read() -> None:
        nonlocal loading
        structure = torch.load(version / folder.STRUCTURE, map_location="cpu", weights_only=False)
        if structure["format"] != FORMAT:
            raise ValueError(
                f"{path} has format {structure['format']}, this fastmargin reads {FORMAT}: "
                "use the one that wrote it"
            )
        metadata = storage.metadata_of(version)
        loading = Loading(
            Objects(objects, group), structure["objects"], storage.stored_in(metadata), strict
        )
        storage.read(version, metadata, loading.pieces)
        loading.keep_sums_once()

    def put_others() -> None:
        nonlocal take_back
        take_back = loading.put_others()

    agreement.all_or_none(f"{what} (reading it)", read, group)
    try:
        agreement.all_or_none(f"{what} (optimisers)", put_others, group)
    except Exception:
        if take_back is not None:
            take_back()
        raise
    agreement.all_or_none(f"{what} (modules)", loading.put_modules, group)
    return loading.values()
