"""Processes on gloo for one function, some of which may die in it."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing as mp
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Outcome(NamedTuple):
    """What became of a process: a value, an error as "Type: text", or only an exit code."""

    value: Any
    error: str | None
    code: int | None


def _run(rank: int, n: int, store: str, seconds: float, pipe, function, args) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=n, timeout=timeout
    )
    try:
        pipe.send((function(dist.group.WORLD, *args), None))
    except Exception as error:
        pipe.send((None, f"{type(error).__name__}: {error}"))
    pipe.recv()  # stays until all are heard: a process that ends would be an error to others
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def run_fresh(n: int, function, *args, seconds: float = 20) -> list[Outcome]:
    """What ``function(group, *args)`` makes of each of ``n`` processes.

    seconds: timeout of the group; a process that says nothing for three times as long fails.
    """
    # its server imports once; what is slow to import and only imported when needed is there, too
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.checkpoint", "torch._dynamo", "pytest"])
    with tempfile.TemporaryDirectory() as folder:
        store, pipes, processes = str(Path(folder) / "store"), [], []
        for rank in range(n):
            here, there = context.Pipe()
            process = context.Process(
                target=_run, args=(rank, n, store, seconds, there, function, args), daemon=True
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return _collect(pipes, processes, time.monotonic() + 60 + 3 * seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes, processes, deadline: float) -> list[Outcome]:
    outcomes = []
    for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
        assert pipe.poll(max(0, deadline - time.monotonic())), f"process {rank} hangs"
        try:
            outcomes.append(Outcome(*pipe.recv(), None))
        except EOFError:
            process.join()
            outcomes.append(Outcome(None, None, process.exitcode))
    for pipe in pipes:
        with contextlib.suppress(OSError):
            pipe.send(None)
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        assert process.exitcode is not None, "a process does not end"
    return outcomes
