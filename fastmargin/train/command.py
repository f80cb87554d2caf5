"""The command: joins the processes, trains, reports."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fastmargin.progress import NoProgress, RichProgress
from fastmargin.train.place import joined
from fastmargin.train.run import Figures, Training
from fastmargin.train.settings import Settings


def run(settings: Settings, console: Console) -> Figures | None:
    """Trains with progress on ``console``; the figures, on other than the first process None.

    Raises:
        TrainError, OSError, ProcessError: see :class:`Training`.
    """
    epochs: list[Figures] = []
    with joined(settings.device) as place:
        training = Training(settings, place)
        with RichProgress(console) if place.first else NoProgress() as progress:
            training.run(progress, epochs.append)
        if not place.first:
            return None
    return {
        "images": len(training.faces),
        "identities": training.classes,
        "processes": place.world,
        "out": str(settings.out),
        "epochs": epochs,
    }


def print_report(console: Console, figures: Figures) -> None:
    """The figures as a table, an epoch per row."""
    if not figures["epochs"]:
        console.print(f"Nothing to do: all epochs are in {figures['out']}.", highlight=False)
        return
    table = Table(title=f"{figures['images']:,} images of {figures['identities']:,} identities")
    for heading in ("epoch", "loss", "top-1", "target\ncosine", "images\na second"):
        table.add_column(heading, justify="right")
    validated = figures["epochs"][-1]["validation"]
    columns = [(name, key) for name, found in validated.items() for key in found]
    for name, key in columns:
        table.add_column(f"{name}\n{key}", justify="right")
    for row in figures["epochs"]:
        cells = [str(row["epoch"]), f"{row['loss']:.3f}", f"{row['top1']:.3f}"]
        cells += [f"{row['target_cosine']:.3f}", f"{row['images_per_second']:,.0f}"]
        cells += [f"{row['validation'][name][key]:.4f}" for name, key in columns]
        table.add_row(*cells)
    console.print(table)
    console.print(f"The network is {figures['out']}/backbone.pt, the log log.jsonl beside it.")
