"""Step time and peak memory by number of identities: fastmargin beside plain PyTorch.

One step is forward and backward of the ArcFace head, with gradients for the embeddings and all
centres, without optimiser. Each measurement runs in a new process, so that no memory of an earlier
one is counted or reused.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmargin as fm
from fastmargin.demo.plain_head import plain_arcface_loss

IDENTITIES = (1_000, 10_000, 50_000, 200_000)
IMPLEMENTATIONS = ("fastmargin", "plain")
MIB = 2**20
TIMED_SECONDS, MAX_STEPS, MIN_STEPS = 1.0, 20, 3
WARM_UP_IDENTITIES = 500


@dataclass(frozen=True)
class Scene:
    """What is measured: features [B, D] of faces, their labels [B], trained centres [C0, D].

    Further centres are random directions.
    """

    features: Tensor
    labels: Tensor
    centers: Tensor
    m: float
    s: float
    device: str
    backend: str
    threads: int


@dataclass(frozen=True)
class StepCost:
    """One row of the comparison.

    step_ms: the fastest timed step, milliseconds. peak_mib: peak memory of one step beyond centres
    and features, MiB, including the gradient of the centres, ``centers_gradient_mib``, which both
    implementations must return.
    """

    implementation: str
    identities: int
    step_ms: float
    peak_mib: float
    centers_gradient_mib: float
    loss: float


def measure_all(scene: Scene, identities: tuple[int, ...] = IDENTITIES) -> Iterator[StepCost]:
    """Measures both implementations for each number of identities, smallest first."""
    for count in identities:
        for implementation in IMPLEMENTATIONS:
            yield measure_in_new_process(scene, implementation, count)


def measure_in_new_process(scene: Scene, implementation: str, identities: int) -> StepCost:
    """:func:`measure` in a new interpreter, which inherits no memory of this one."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scene.pt"
        torch.save(asdict(scene), file)
        command = [sys.executable, "-m", __name__, str(file), implementation, str(identities)]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"measuring {implementation} with {identities} identities failed:\n{done.stderr}"
        )
    return StepCost(**json.loads(done.stdout.splitlines()[-1]))


def _main(file: str, implementation: str, identities: str) -> None:
    """Runs in the new interpreter: one measurement, printed as a line of JSON."""
    scene = Scene(**torch.load(file))
    cost = measure(scene, implementation, int(identities))
    sys.stdout.write(json.dumps(asdict(cost)) + "\n")


def measure(scene: Scene, implementation: str, identities: int) -> StepCost:
    """Time and memory of one step, in this process."""
    torch.set_num_threads(scene.threads)
    device = torch.device(scene.device)
    # A small step first: thread pools, library workspaces and kernels are set up once per process,
    # and do not depend on the number of identities.
    for _ in range(2):
        _step_of(scene, implementation, WARM_UP_IDENTITIES, device)()
    step = _step_of(scene, implementation, identities, device)
    peak, loss = _peak_bytes(step, device)
    gradient = identities * scene.features.shape[1] * 4
    return StepCost(
        implementation=implementation,
        identities=identities,
        step_ms=_fastest(step, device) * 1e3,
        peak_mib=peak / MIB,
        centers_gradient_mib=gradient / MIB,
        loss=loss,
    )


def _step_of(
    scene: Scene, implementation: str, identities: int, device: torch.device
) -> Callable[[], float]:
    """A function that runs one forward and backward pass and returns the loss."""
    generator = torch.Generator().manual_seed(0)
    extra = identities - len(scene.centers)
    random = torch.randn(extra, scene.centers.shape[1], generator=generator)
    weight = torch.cat([F.normalize(scene.centers), F.normalize(random)]).to(device)
    weight.requires_grad_()
    features = scene.features.to(device).requires_grad_()
    labels = scene.labels.to(device)
    margin = fm.ArcFace(m=scene.m, s=scene.s)

    def step() -> float:
        weight.grad = features.grad = None
        if implementation == "fastmargin":
            loss = fm.margin_loss(features, weight, labels, margin, backend=scene.backend)
        else:
            loss = plain_arcface_loss(features, weight, labels, scene.m, scene.s)
        loss.backward()
        return loss.item()

    return step


def _peak_bytes(step: Callable[[], float], device: torch.device) -> tuple[int, float]:
    """Peak memory during one step minus the memory in use before it, and the loss."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        loss = step()
        return torch.cuda.max_memory_allocated(device) - before, loss
    _return_freed_memory()
    _reset_high_water_mark()
    before = _resident_bytes("VmRSS")
    loss = step()
    return max(0, _resident_bytes("VmHWM") - before), loss


def _fastest(step: Callable[[], float], device: torch.device) -> float:
    """Seconds of the fastest step, since other load on the machine can only add time."""
    seconds: list[float] = []
    while len(seconds) < MIN_STEPS or (sum(seconds) < TIMED_SECONDS and len(seconds) < MAX_STEPS):
        start = time.perf_counter()
        step()  # ends with .item(), which waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _resident_bytes(field: str) -> int:
    """Resident memory of this process: now ("VmRSS"), or its high-water mark ("VmHWM").

    Without /proc (macOS) both are the high-water mark of getrusage. After the small warm-up step
    it is slightly above the memory in use, so differences are slightly too small there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _return_freed_memory() -> None:
    """Returns memory freed by the warm-up to the system (glibc); if a step reused it, it would not
    be counted."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # another C library


def _reset_high_water_mark() -> None:
    """Resets VmHWM to VmRSS (Linux), so that start-up does not count."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux, or not allowed: the mark of start-up remains, which may hide a small step


if __name__ == "__main__":
    _main(*sys.argv[1:])
