"""The command ``fastmargin convert``."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastmargin import convert
from fastmargin.convert.centres import Centres, Rows, Writing
from fastmargin.convert.formats import format_of

Figures = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The options of the command, as in :func:`fastmargin.convert.read` and ``write``.

    source_format: None: detected from the files. momentum: convert it if there is one.
    """

    source: Path
    dest: Path | None
    source_format: str | None = None
    dest_format: str = "fastmargin"
    world_size: int = 1
    num_classes: int | None = None
    sub_centers: int = 1
    head: str | None = None
    key: str | None = None
    transposed: bool = False
    margin: str | None = None
    sampler_seed: int | None = None
    momentum: bool = True
    backbone: Path | None = None
    overwrite: bool = False
    dry_run: bool = False


def run(settings: Settings, progress) -> Figures:
    """Converts, or only inspects; returns what ``--json`` prints.

    progress: ``begin(what, steps)`` and ``advance(steps)``.

    Raises:
        ConvertError, OSError: it fails; nothing has changed.
    """
    began, form = time.monotonic(), format_of(settings.dest_format)
    if settings.dest is None and not settings.dry_run:
        raise convert.ConvertError("DEST is missing: name a file or folder, or use --dry-run")
    found = convert.read(
        settings.source,
        settings.source_format,
        num_classes=settings.num_classes,
        sub_centers=settings.sub_centers,
        head=settings.head,
        key=settings.key,
        transposed=settings.transposed,
    )
    figures = describe(settings.source, found)
    centres = found
    if not settings.momentum and found.momentum is not None:
        centres = replace(found, momentum=None, left_out=(*found.left_out, "momentum: as asked"))
    writing = Writing(settings.world_size, settings.margin, settings.sampler_seed)
    lost = convert.left_out(centres, form, writing, settings.backbone is not None)
    figures["left_out"] = lost
    figures["notes"] = _notes(found, settings)
    figures["to"] = None
    if settings.dest is not None:
        convert.check_target(
            centres,
            settings.dest,
            form,
            writing,
            settings.backbone,
            settings.overwrite,
        )
        figures["to"] = {
            "path": str(settings.dest),
            "format": form.name,
            "world_size": settings.world_size,
            "backbone": None if settings.backbone is None else str(settings.backbone),
        }
    figures["dry_run"] = settings.dry_run
    if not settings.dry_run:
        total = centres.weight.num_rows * (2 if centres.momentum and form.momentum else 1)
        progress.begin(f"{found.format} to {form.name}", total)
        convert.write(
            _watched(centres, progress.advance),
            settings.dest,
            form.name,
            world_size=settings.world_size,
            margin=settings.margin,
            sampler_seed=settings.sampler_seed,
            backbone=settings.backbone,
            overwrite=settings.overwrite,
        )
        figures["to"]["files"] = _sizes(settings.dest)
    if figures["to"] is not None and form.name == "fastmargin":
        figures["to"]["margin"] = settings.margin or ("adaface" if found.statistics else None)
    figures["seconds"] = time.monotonic() - began
    return figures


def _notes(found: Centres, settings: Settings) -> list[str]:
    """Remarks on what the files do not record."""
    if len(found.weight.shards) > 1 and settings.num_classes is None:
        return ["if the last shards were missing, nothing would show it: --num-classes would"]
    return []


def _watched(centres: Centres, tick) -> Centres:
    momentum = centres.momentum and replace(centres.momentum, tick=tick)
    return replace(centres, weight=replace(centres.weight, tick=tick), momentum=momentum)


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of a file, or of all in a folder."""
    if path.is_file():
        return {path.name: path.stat().st_size}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.stat().st_size for file in files}


def describe(path: Path, centres: Centres) -> Figures:
    """The findings, as plain values."""
    rows = centres.weight
    return {
        "source": str(path),
        "from": centres.format,
        "shards": [{"file": shard.path.name, "rows": shard.num_rows} for shard in rows.shards],
        "classes": centres.num_classes,
        "sub_centers": centres.sub_centers,
        "pad_rows": sum(shard.num_rows for shard in rows.shards) - rows.num_rows,
        "dim": rows.dim,
        "dtype": _name(rows),
        "bytes": rows.nbytes,
        "momentum": None if centres.momentum is None else _name(centres.momentum),
        "statistics": {name: value.tolist() for name, value in centres.statistics.items()},
        "backbone_tensors": 0 if centres.backbone is None else centres.backbone.num_tensors,
    }


def _name(rows: Rows) -> str:
    return str(rows.dtype).removeprefix("torch.")


def print_report(console: Console, figures: Figures) -> None:
    """The figures as tables."""
    table = Table(title=f"{escape(figures['source'])}: {figures['from']}")
    table.add_column("file")
    table.add_column("rows", justify="right")
    for shard in figures["shards"]:
        table.add_row(escape(shard["file"]), f"{shard['rows']:,}")
    console.print(table)
    facts = Table(show_header=False)
    facts.add_row("classes", f"{figures['classes']:,}")
    if figures["sub_centers"] > 1:
        facts.add_row("centres per class", str(figures["sub_centers"]))
    if figures["pad_rows"]:
        facts.add_row("pad rows", str(figures["pad_rows"]))
    facts.add_row("dimension", str(figures["dim"]))
    facts.add_row("dtype", figures["dtype"])
    facts.add_row("size", f"{figures['bytes'] / 2**20:,.1f} MiB")
    facts.add_row("momentum", figures["momentum"] or "none")
    for name, value in figures["statistics"].items():
        facts.add_row(name, str(value))
    facts.add_row("backbone", f"{figures['backbone_tensors']} tensors")
    facts.add_row("left out", escape("\n".join(figures["left_out"])) or "nothing")
    console.print(facts)
    for note in figures["notes"]:
        console.print(f"Note: {note}", style="dim")
    target = figures["to"]
    if figures["dry_run"] or target is None:
        console.print("Nothing was written.")
        return
    size = sum(target["files"].values()) / 2**20
    console.print(
        f"Written to {escape(target['path'])} as {target['format']}: "
        f"{len(target['files'])} files, {size:,.1f} MiB, {figures['seconds']:.1f} s"
    )
    if target["format"] == "fastmargin":
        margin = target["margin"] or "a margin without state, such as arcface"
        console.print(
            f"For a fm.MarginHead of {figures['dim']} dimensions and {figures['classes']} classes "
            f"with {margin}",
            highlight=False,
        )
        objects = '{"head": head}'
        if figures["momentum"] and "momentum: as asked" not in figures["left_out"]:
            objects = '{"head": head, "optimizer": row_sgd}'
        console.print(
            escape(f'Load it with fm.checkpoint.load("{target["path"]}", {objects})'),
            soft_wrap=True,
        )
