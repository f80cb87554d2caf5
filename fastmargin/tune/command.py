"""The command ``fastmargin tune``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastmargin.backends.triton import BACKEND as TRITON
from fastmargin.backends.triton import tuned
from fastmargin.backends.triton.configs import TileConfig
from fastmargin.tune import candidates
from fastmargin.tune.clock import DeviceClock, Spread
from fastmargin.tune.problem import Shape
from fastmargin.tune.search import Found, search
from fastmargin.tune.trial import Machine, Trial, TuneError

Figures = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The options of the command.

    dims: widths D. batch, classes: B and C of the timed problem. seconds: per kernel and width.
    output: file of the table, instead of the user's default.
    """

    dims: tuple[int, ...] = (512,)
    batch: int = 1024
    classes: int = 1_000_000
    precision: str = "fp16"
    kernels: tuple[str, ...] = tuned.KERNELS
    seconds: float = 120.0
    dry_run: bool = False
    output: Path | None = None

    def check(self) -> None:
        """Raises TuneError for invalid values."""
        for name, least in (("batch", 1), ("classes", 2)):
            if getattr(self, name) < least:
                raise TuneError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        for dim in self.dims:
            if not 1 <= dim <= TRITON.max_dim:
                raise TuneError(f"--dim must be from 1 to {TRITON.max_dim}, got {dim}")
        if self.precision not in TRITON.precisions:
            known = ", ".join(TRITON.precisions)
            raise TuneError(f"--precision must be one of {known}, got {self.precision!r}")
        for kernel in self.kernels:
            if kernel not in tuned.KERNELS:
                known = ", ".join(tuned.KERNELS)
                raise TuneError(f"--kernel must be one of {known}, got {kernel!r}")
        if not self.seconds > 0:
            raise TuneError(f"--seconds must be more than 0, got {self.seconds}")


def machine() -> Machine:
    """The current GPU.

    Raises:
        TuneError: there is none, or this process does not compile kernels.
    """
    at = tuned.here()
    if tuned.INTERPRETER in at.devices.get(0, ()):
        raise TuneError("TRITON_INTERPRET is set, so nothing is compiled: unset it")
    if not torch.cuda.is_available():
        raise TuneError("tile shapes are measured on a CUDA GPU, and there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = TRITON.refuses(device, torch.float32)
    if reason:
        raise TuneError(f"the Triton kernels do not run here: {reason}")
    found = torch.cuda.get_device_properties(device)
    return Machine(device, found.name, found.major * 10 + found.minor, DeviceClock(device))


def target(output: Path | None) -> Path:
    """The file to write.

    Raises:
        TuneError: there is none.
    """
    file = output or tuned.user_file()
    if file is None:
        raise TuneError(
            f"there is no place for a table of tile shapes: {tuned.why_none()}; name a file with"
            f" --output or {tuned.VARIABLE}"
        )
    return file


def reset(output: Path | None, dry_run: bool = False) -> Figures:
    """Deletes the table; returns what ``--json`` prints.

    Raises:
        TuneError, OSError: it cannot be deleted.
    """
    file = target(output)
    found = file.exists()
    if found and not dry_run:
        file.unlink()
    return {"file": str(file), "existed": found, "deleted": found and not dry_run}


def run(
    settings: Settings,
    on: Machine,
    progress,
    now: Callable[[], float] = time.monotonic,
) -> Figures:
    """Measures, and keeps the faster tiles; returns what ``--json`` prints.

    The table is written after every kernel, so an interrupt loses only the current kernel's result,
    and the command ends normally.

    Raises:
        TuneError, TableError, OSError: nothing could be measured or written.
    """
    settings.check()
    file = target(settings.output)
    _check_folder(file)  # before spending minutes on results that could not be written
    known = tuned.read(file)
    at = tuned.here()
    figures: Figures = {
        "device": on.name,
        "arch": on.arch,
        "triton": at.triton,
        "torch": torch.__version__,
        "batch": settings.batch,
        "classes": settings.classes,
        "precision": settings.precision,
        "file": str(file),
        "dry_run": settings.dry_run,
        "left_out": list(known.refused),
        "results": [],
        "interrupted": False,
        "error": None,
    }
    begun = time.monotonic()
    for dim in dict.fromkeys(settings.dims):
        for kernel in dict.fromkeys(settings.kernels):
            shape = Shape(settings.batch, settings.classes, dim)
            if settings.dry_run:
                figures["results"].append(_plan(kernel, shape, settings, on))
                continue
            key = (kernel, dim, settings.precision, on.name, on.arch, at.triton, at.fastmargin)
            try:
                found = _search(kernel, shape, settings, on, progress, now, known, key)
            except KeyboardInterrupt:
                figures["interrupted"] = True
                break
            except TuneError as error:
                if not figures["results"]:
                    raise
                figures["error"] = str(error)
                break
            tuned.merge(file, _entry(found, key, shape) if found.faster else None, key)
            figures["results"].append(_result(found, kernel, shape, settings))
        if figures["interrupted"] or figures["error"]:
            break
    figures["seconds"] = time.monotonic() - begun
    return figures


def _search(kernel, shape, settings, on, progress, now, known: tuned.Table, key) -> Found:
    # in a function of its own, so that the tensors of one trial are gone before the next
    trial = Trial(kernel, shape, settings.precision, on)
    tiles = candidates.grid(kernel, shape.dim, settings.precision, on.arch)
    first = [TileConfig(**entry.tile) for entry in known.entries if entry.key == key]
    return search(trial, tiles, settings.seconds, progress, now, first)


def _check_folder(file: Path) -> None:
    """Raises OSError if no file can be written there."""
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder: name a file")
    folder = next(folder for folder in file.absolute().parents if folder.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder, so {file} cannot be written")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to: name another file with --output")


def _entry(found: Found, key: tuple, shape: Shape) -> tuned.Entry:
    made = {
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "batch": shape.batch,
        "classes": shape.classes,
        "shipped_tile": asdict(found.shipped),
        "shipped_ms": 1e3 * found.shipped_time.median,
        "chosen_ms": 1e3 * found.chosen_time.median,
        "turns": found.turns,
    }
    return tuned.Entry(*key, tile=asdict(found.chosen), made=made)


def _plan(kernel: str, shape: Shape, settings: Settings, on: Machine) -> Figures:
    tiles = candidates.grid(kernel, shape.dim, settings.precision, on.arch)
    base = candidates.shipped(kernel, shape.dim, settings.precision, on.arch)
    return {
        "kernel": kernel,
        "dim": shape.dim,
        "shipped": asdict(base),
        "candidates": [asdict(tile) for tile in tiles],
    }


def _result(found: Found, kernel: str, shape: Shape, settings: Settings) -> Figures:
    return {
        "kernel": kernel,
        "dim": shape.dim,
        "shipped": asdict(found.shipped),
        "shipped_ms": _milliseconds(found.shipped_time),
        "chosen": asdict(found.chosen),
        "chosen_ms": _milliseconds(found.chosen_time),
        "ratio": found.chosen_time.median / found.shipped_time.median,
        "faster": found.faster,
        "turns": found.turns,
        "candidates": found.of,
        "looked_at": found.looked_at,
        "refused": [{"tile": asdict(tile), "reason": reason} for tile, reason in found.refused],
    }


def _milliseconds(spread: Spread) -> dict[str, float]:
    return {name: 1e3 * value for name, value in asdict(spread).items()}


def short(tile: dict[str, int]) -> str:
    """E.g. ``64 32 512 512, 8 warps, 2 stages``: rows, classes, K, D."""
    blocks = " ".join(str(tile[name]) for name in tuned.BLOCKS)
    stages = tile["num_stages"]
    return f"{blocks}, {tile['num_warps']} warps, {stages} {'stage' if stages == 1 else 'stages'}"


def print_reset(console: Console, figures: Figures) -> None:
    """Prints what :func:`reset` did."""
    verb = "Deleted" if figures["deleted"] else "Would delete"
    text = f"{verb} {figures['file']}" if figures["existed"] else f"No {figures['file']}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_report(console: Console, figures: Figures) -> None:
    """The figures as a table."""
    title = (
        f"{escape(figures['device'])}: {figures['batch']:,} rows, {figures['classes']:,} classes,"
        f" {figures['precision']}; tiles: rows, classes, K, D"
    )
    if figures["dry_run"]:
        table = Table("kernel", "D", "as shipped", "candidates", title=title)
        for row in figures["results"]:
            counts = str(row["dim"]), short(row["shipped"]), str(len(row["candidates"]))
            table.add_row(row["kernel"], *counts)
        console.print(table)
        console.print(f"Nothing was measured. A table would be at {escape(figures['file'])}")
        return
    head = ("kernel", "D", "as shipped", "ms", "chosen", "ms", "ratio", "timed", "refused")
    table = Table(*head, title=title)
    for row in figures["results"]:
        chosen = ("", "", "")
        if row["faster"]:
            times = f"{row['chosen_ms']['median']:.3f}", f"{row['ratio']:.3f}"
            chosen = short(row["chosen"]), *times
        base = short(row["shipped"]), f"{row['shipped_ms']['median']:.3f}"
        counts = f"{row['looked_at']} of {row['candidates']}", str(len(row["refused"]))
        table.add_row(row["kernel"], str(row["dim"]), *base, *chosen, *counts)
    console.print(table)
    for line in figures["left_out"]:
        console.print(f"Left out of the table: {line}", markup=False, highlight=False)
    if figures["interrupted"]:
        console.print("Interrupted: what was not finished is not in the table.")
    if figures["error"]:
        console.print(f"Ended early: {figures['error']}", markup=False, highlight=False)
    kept = sum(row["faster"] for row in figures["results"])
    what = f"{kept} of {len(figures['results'])} faster than as shipped"
    where = f"; they are in {figures['file']}" if kept else ""
    console.print(f"{what}{where}", markup=False, highlight=False, soft_wrap=True)
