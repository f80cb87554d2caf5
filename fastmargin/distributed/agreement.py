"""Agreement between processes outside the training step: all succeed, or all raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from fastmargin.distributed.collectives import ProcessError, named, world

_channels: WeakKeyDictionary = WeakKeyDictionary()


def channel(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A gloo group of the processes of ``group`` (None: all) for use outside the training step.

    Another thread may use it while the training step uses ``group``, whatever its backend. It is
    created in the first call, a collective one, with the group's timeout. None without other
    processes.

    Raises:
        TypeError, ValueError: it is no process group, or one without this process.
    """
    group = world() if group is None else group
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be None or a ProcessGroup, got {type(group).__name__}")
    if group is None or group.size() == 1:
        return None
    if dist.get_rank(group) < 0:
        raise ValueError("process_group: this process is not part of it; call this elsewhere")
    if group not in _channels:
        everybody = group.size() == dist.get_world_size()
        if not everybody:
            _check_same_groups(group)
        with named("the first exchange beside the training step", group):
            _channels[group] = dist.new_group(
                dist.get_process_group_ranks(group),
                timeout=_timeout(group),
                backend="gloo",
                use_local_synchronization=not everybody,
            )
    return _channels[group]


def _check_same_groups(group: dist.ProcessGroup) -> None:
    """Raises where torch would name a new group differently on its processes, a deadlock.

    A group made by its members alone is named by how many groups each is in.
    """
    counts = gather_objects("counting groups", len(dist.distributed_c10d._world.pg_names), group)
    if len(set(counts)) > 1:
        raise ValueError(
            f"process_group: its processes are in different numbers of groups ({counts}), where "
            "torch cannot make another one: make groups so that all are in as many, as "
            "init_device_mesh does, or leave process_group=None for all processes"
        )


def _timeout(group: dist.ProcessGroup):
    """The group's timeout; None, torch's default, where it is unknown."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if hasattr(options, "_timeout"):
            return options._timeout
    return None


def gather_objects(what: str, value: Any, group: dist.ProcessGroup | None) -> list:
    """The ``value`` of every process, anything that pickles, in rank order."""
    if group is None:
        return [value]
    values = [None] * group.size()
    with named(what, group):
        dist.all_gather_object(values, value, group=group)
    return values


def all_or_none(what: str, function: Callable[[], Any], group: dist.ProcessGroup | None) -> list:
    """The results of ``function()`` on all processes; if it fails on one, it raises on all.

    Raises:
        Exception: what ``function`` raised here.
        ProcessError: it raised on another process, or that one has died.
    """
    result = error = told = None
    try:
        result = function()
    except Exception as caught:
        error, told = caught, f"{type(caught).__name__}: {caught}"
    try:
        reports = gather_objects(what, (result, told), group)
    except ProcessError:
        if error is None:
            raise
        raise error from None
    if error is not None:
        raise error
    for process, (_, told) in enumerate(reports):
        if told is not None:
            raise ProcessError(f"{what} failed on process {process} of {len(reports)}: {told}")
    return [result for result, _ in reports]
