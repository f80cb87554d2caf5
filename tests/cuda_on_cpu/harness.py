"""Compiles ``rows_harness.cpp`` with g++ and calls it: the row kernels and the headers they share.

The library is kept in ``build/tests`` under a name made of its sources, so that a second run
compiles nothing.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from fastmargin.norms import compute_dtype
from fastmargin.spec import MarginForm, NormEma

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# hidden: a second library, of changed sources, must not meet the statics of the first
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-shared", "-fvisibility=hidden"]
PADDING = 64
"""Elements behind every output that must stay as they were."""


def cached(suffix: str, key: str, sources: list[Path]) -> Path:
    """Where something made from ``key`` and these files belongs in the build folder."""
    digest = hashlib.sha256(key.encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    folder = ROOT / "build" / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{digest.hexdigest()[:20]}{suffix}"


def sources_below(csrc: Path) -> list[Path]:
    """The headers that kernels and harness can include; those of the CPU backend are not."""
    found = [*csrc.glob("*.h"), *csrc.glob("cuda/*.h"), *csrc.glob("cuda/*.cuh")]
    return sorted(found)


def compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else []
    return next(filter(None, map(shutil.which, (*names, "g++", "c++"))), None)


def build(csrc: Path = ROOT / "csrc") -> Path:
    """The compiled harness of these sources."""
    sources = [*sources_below(csrc), HERE / "cuda_runtime.h", HERE / "rows_harness.cpp"]
    target = cached(".so", " ".join([compiler(), *FLAGS]), sources)
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}")
        # the stand-in for cuda_runtime.h must be found before a real one
        include = [f"-I{HERE}", f"-I{csrc}"]
        command = [compiler(), *FLAGS, *include, str(HERE / "rows_harness.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        made.replace(target)
    return target


def mutated(folder: Path, *changes: tuple[str, str, str]) -> Path:
    """A copy of ``csrc`` in which, per (file, text, other text), the text is replaced."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for name, right, wrong in changes:
        text = (csrc / name).read_text()
        assert text.count(right) == 1, f"{name} has {text.count(right)} times {right!r}"
        (csrc / name).write_text(text.replace(right, wrong))
    return csrc


class LaunchError(RuntimeError):
    """What the CUDA launch came back with."""


class Rows:
    """Calls into one compiled harness. ``engine`` is "host" (headers) or "cuda" (kernels)."""

    def __init__(self, library: Path):
        self.lib = ctypes.CDLL(str(library))

    def call(self, name: str, *args) -> None:
        function = getattr(self.lib, name)
        function.restype = ctypes.c_char_p
        error = function(*args)
        if error:
            raise LaunchError(error.decode())

    def set_order(self, order: int) -> None:
        """0 forward, 1 backward, else the seed of a random order of threads and blocks."""
        self.lib.set_order(ctypes.c_uint(order))

    def row_prologue(
        self,
        engine: str,
        x: Tensor,
        labels: Tensor | None,
        ema: NormEma | None,
        max_blocks: int = 65536,
    ):
        dtype = compute_dtype(x.dtype)
        rows, cols = x.shape
        outputs = [_Output(n, dtype) for n in (rows * cols, rows, 1, 1)]
        x_hat, norm, mean, std = (o.pointer for o in outputs)
        state = (None, None) if ema is None else (ema.mean.to(dtype), ema.std.to(dtype))
        old = [0 if t is None else t.data_ptr() for t in state]
        known = 0 if labels is None else labels.data_ptr()
        pointers = _pointers([x.data_ptr(), x_hat, norm, known, *old, mean, std])
        params = None if ema is None else _doubles([ema.alpha, ema.low, ema.high])
        extra = [ctypes.c_int64(max_blocks)] if engine == "cuda" else []
        name = str(x.dtype).removeprefix("torch.")
        sizes = _ints([rows, cols, *x.stride()])
        self.call(f"{engine}_row_prologue_{name}", pointers, sizes, params, *extra)
        x_hat, norm, mean, std = (o.checked() for o in outputs)
        return x_hat.view(rows, cols), norm, mean, std

    def margin_rows(
        self,
        engine: str,
        cos_y: Tensor,
        lse_neg: Tensor,
        norm: Tensor,
        labels: Tensor,
        form: MarginForm,
        max_blocks: int = 65536,
    ):
        outputs = [_Output(len(cos_y), cos_y.dtype) for _ in range(5)]
        state = [
            None if t is None else t.to(cos_y.dtype) for t in (form.mean, form.std, form.table)
        ]
        inputs = [cos_y, lse_neg, norm, labels, *state]
        assert all(t is None or t.is_contiguous() for t in inputs)
        pointers = [0 if t is None else t.data_ptr() for t in inputs]
        self.call(
            f"{engine}_margin_rows_{str(cos_y.dtype).removeprefix('torch.')}",
            _pointers([*pointers, *(o.pointer for o in outputs)]),
            ctypes.c_int64(len(cos_y)),
            ctypes.c_int64(0 if form.table is None else form.table.numel()),
            _doubles(form.params()),
            _ints(form.codes()),
            *([ctypes.c_int64(max_blocks)] if engine == "cuda" else []),
        )
        return tuple(o.checked() for o in outputs)

    def faulty(self, fault: int) -> Tensor:
        """Runs the kernel with this planted fault; 0 is none."""
        out = torch.zeros(64)
        self.call("faulty", ctypes.c_int(fault), ctypes.c_void_p(out.data_ptr()))
        return out


@functools.cache
def load(csrc: Path = ROOT / "csrc") -> Rows:
    return Rows(build(csrc))


class _Output:
    """NaN where the call is to write, and a border behind it where it is not."""

    BORDER = -12345.0

    def __init__(self, count: int, dtype: torch.dtype):
        self.whole = torch.full((count + PADDING,), math.nan, dtype=dtype)
        self.whole[count:] = self.BORDER
        self.count = count

    @property
    def pointer(self) -> int:
        return self.whole.data_ptr()

    def checked(self) -> Tensor:
        assert bool((self.whole[self.count :] == self.BORDER).all()), "written past the end"
        return self.whole[: self.count]


def _pointers(values: list[int]):
    return (ctypes.c_void_p * len(values))(*values)


def _ints(values):
    return (ctypes.c_int64 * len(values))(*values)


def _doubles(values):
    return (ctypes.c_double * len(values))(*values)
