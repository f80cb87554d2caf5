"""A few processes on gloo that run one function after the other, for the tests of sharding."""

from __future__ import annotations

import atexit
import datetime
import functools
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COUNT = 4
TIMEOUT = datetime.timedelta(seconds=60)


def _serve(rank: int, count: int, store: str, pipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=TIMEOUT
    )
    groups = {n: dist.new_group(range(n), timeout=TIMEOUT) for n in range(1, count + 1)}
    while (task := pipe.recv()) is not None:
        n, function, args = task
        try:
            torch.manual_seed(0)
            pipe.send((function(groups[n], *args) if rank < n else None, None))
        except Exception:
            pipe.send((None, traceback.format_exc()))


class Processes:
    """A number of processes, started once."""

    def __init__(self, count: int) -> None:
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.pipes, self.processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, store, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)
        atexit.register(self.stop)

    def run(self, n: int, function, *args) -> list:
        """What ``function(group, *args)`` returns on each of the first ``n`` processes."""
        for pipe in self.pipes:
            pipe.send((n, function, args))
        results = [pipe.recv() for pipe in self.pipes]
        errors = [error for _, error in results if error]
        if errors:
            # the processes may no longer agree on which collective comes next
            self.stop()
            running.cache_clear()
            raise AssertionError("\n".join(errors))
        return [result for result, _ in results[:n]]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


@functools.cache
def running(count: int = COUNT) -> Processes:
    return Processes(count)


def run(n: int, function, *args) -> list:
    """Runs a function of a test module on ``n`` processes; it gets their group first."""
    return running().run(n, function, *args)


def run_world(n: int, function, *args) -> list:
    """The same on processes that are ``n`` in all: for code that takes the default group."""
    return running(n).run(n, function, *args)
