"""The command: joins the processes, trains, reports."""

from __future__ import annotations

import contextlib

from rich.console import Console
from rich.table import Table

from fastmargin.progress import RichProgress, Silent
from fastmargin.train.out import Figures
from fastmargin.train.place import joined
from fastmargin.train.run import Training
from fastmargin.train.settings import Settings


def run(settings: Settings, console: Console) -> Figures | None:
    """Trains with progress on ``console``; the figures, on other than the first process None.

    Raises:
        TrainError, OSError, ProcessError: see :class:`Training`.
    """
    with joined(settings.device) as place:
        with contextlib.closing(Training(settings, place)) as training:
            if not place.first:
                training.run(Silent())
                return None
            with RichProgress(console, keep=False) as progress:
                epochs = training.run(progress)
    return {
        "images": len(training.faces),
        "identities": training.faces.num_classes,
        "processes": place.world,
        "out": str(settings.out),
        "epochs": epochs,
    }


def print_report(console: Console, figures: Figures) -> None:
    """The figures as a table, an epoch per row."""
    table = Table(title=f"{figures['images']:,} images of {figures['identities']:,} identities")
    for heading in ("epoch", "loss", "top-1", "target\ncosine", "images\na second"):
        table.add_column(heading, justify="right")
    validated = [row["validation"] for row in figures["epochs"]]
    columns = {(name, key): 0 for row in validated for name, found in row.items() for key in found}
    for name, key in columns:
        table.add_column(f"{name}\n{key}", justify="right")
    for row in figures["epochs"]:
        cells = [str(row["epoch"]), f"{row['loss']:.3f}", f"{row['top1']:.3f}"]
        cells += [f"{row['target_cosine']:.3f}", f"{row['images_per_second']:,.0f}"]
        for name, key in columns:  # another run of this log may have had other sets
            found = row["validation"].get(name, {}).get(key)
            cells.append("" if found is None else f"{found:.4f}")
        table.add_row(*cells)
    console.print(table)
    console.print(f"The network is {figures['out']}/backbone.pt, the log log.jsonl beside it.")
