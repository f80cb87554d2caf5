"""Cases with classes sharded over several processes: starts, gates and times them together.

python -m torch.distributed.run ... -m benchmarks.sharded <case as JSON> <contender> ...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import ROOT, cases, contenders, data, gate, timing
from fastmargin import testing


def measure(
    case: cases.Case, contender: str, device: torch.device, repeats: int
) -> tuple[gate.Verdict, timing.Times]:
    """Starts the processes; each phase of a turn counts with the slowest process.

    Raises:
        RuntimeError: a process failed, or there are fewer GPUs than processes.
    """
    if device.type == "cuda" and torch.cuda.device_count() < case.world:
        raise RuntimeError(f"needs {case.world} GPUs, there are {torch.cuda.device_count()}")
    threads = max(1, torch.get_num_threads() // case.world)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={case.world}", "-m", "benchmarks.sharded"]
        command += [json.dumps(asdict(case)), contender, device.type, str(repeats), str(file)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"a process failed: {done.stderr.strip()[-300:]}")
        found = json.loads(file.read_text())
    return gate.Verdict(**found["verdict"]), timing.Times(found["phases"])


def main(case: str, name: str, kind: str, repeats: str, file: str) -> None:
    """Runs in each process; the first one writes the result."""
    rank = int(os.environ["RANK"])
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    case = cases.from_dict(json.loads(case))
    contender = contenders.by_name(name, device)
    verdict = _check(contender, case, device)
    phases = _times(contender, case, device, int(repeats)) if verdict.passed else {}
    if rank == 0:
        Path(file).write_text(json.dumps({"verdict": asdict(verdict), "phases": phases}))
    dist.destroy_process_group()


def _check(contender, case: cases.Case, device: torch.device) -> gate.Verdict:
    """Loss and gradients of this process's embeddings and centres against one float64 process.

    The gradient of the embeddings is multiplied by the number of processes, as DDP averages.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    small = cases.gate_case(case)
    whole = replace(small, world=1)
    weight = data.centres(small, device)
    parts = [data.batches(small, device, seed=1 + place)[0] for place in range(world)]
    x = torch.cat([x.detach() for x, _ in parts])
    labels = torch.cat([labels for _, labels in parts])
    head = contender.make(replace(small, world=world), weight.clone())
    loss, d_x, d_weight = gate.solve(head, *parts[rank])
    truth = gate.solve_truth(contender, whole, weight, x, labels, None)
    own = torch.chunk(torch.arange(len(weight), device=device), world)[rank]
    rows = slice(rank * small.batch, (rank + 1) * small.batch)
    truth = truth[0], world * truth[1][rows], truth[2][own]
    found = [
        testing.relative_error(a, b) for a, b in zip((loss, d_x, d_weight), truth, strict=True)
    ]
    worst = torch.tensor(found, dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    errors = {"start": dict(zip(gate.PARTS, worst.tolist(), strict=True))}
    return gate.Verdict(errors, gate.allowed(contender, case))


def _times(contender, case: cases.Case, device: torch.device, repeats: int) -> dict:
    clock = timing.clock_for(device)
    head = contender.make(case, data.centres(case, device))
    batches = {contender.name: data.batches(case, device, seed=1 + dist.get_rank())}
    canary = timing.Canary(clock, lambda: None)
    found = timing.measure(
        {contender.name: head}, batches, clock, canary, repeats, before_step=dist.barrier
    )
    times = found[contender.name]
    if times.error is not None:
        raise times.error
    laps = torch.tensor(list(times.phases.values()), dtype=torch.float64, device=device)
    dist.all_reduce(laps, dist.ReduceOp.MAX)
    return dict(zip(times.phases, laps.tolist(), strict=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Gloo's threads may still release the last tensors, which needs Python's lock; if Python shuts
    # down meanwhile, that aborts the process
    os._exit(0)
