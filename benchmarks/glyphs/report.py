"""The figures as rich tables; nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

PAIR = ("plain", "fastmargin")


def print_report(console: Console, figures: dict[str, Any], out: str) -> None:
    """Everything a reader of the terminal should know."""
    raw = figures["raw_pixels"]
    console.print(_accuracy_table(figures))
    console.print(
        f"{figures['training_glyphs']:,} glyphs by {len(figures['fonts']) - 1} fonts to train "
        f"on, {figures['unseen_glyphs']:,} of {figures['held_out']} to identify.\n"
        f"Raw pixels: rank-1 by means {raw['rank_1_means']:.3f}, "
        f"TAR {raw['tar_at_far_1e-4']:.3f}.\n",
        style="dim",
    )
    console.print(_cost_table(figures))
    console.print(
        "Difference: the largest of the losses in the first epoch, relative; one bit:\n"
        "plain from plain that started one bit apart. Head: forward, backward, optimiser\n"
        "and sampling, median. Peak: of such a step, beyond centres and momentum.\n",
        style="dim",
    )
    console.print(
        f"{figures['seconds']:.0f} s, backend {figures['backend']}, load average before the "
        f"training {figures['load_average_before']:.1f}.\n"
        f"Written to {out}: glyphs.json, curves.png, accuracy.png"
    )


def _accuracy_table(figures: dict[str, Any]) -> Table:
    title = f"An unseen font, {figures['classes']:,} characters: plain / fastmargin"
    headings = ("rank-1 by\ncentres", "rank-1 by\nmeans", "TAR at\nFAR 1e-4")
    table = _table(title, headings)
    for row in figures["runs"]:
        keys = ("rank_1_centres", "rank_1_means", "tar_at_far_1e-4")
        cells = [_both(row, key, "{:.3f}") for key in keys]
        table.add_row(row["margin"], f"{row['rate']:g}", *cells)
    return table


def _cost_table(figures: dict[str, Any]) -> Table:
    title = "The same curve, and what it costs: plain / fastmargin"
    headings = ("differ-\nence", "one\nbit", "head\nms", "\nratio", "peak\nMB", "\nratio")
    table = _table(title, headings)
    for row in figures["runs"]:
        peaks = {name: {"peak_mb": row[name]["peak_bytes"] / 1e6} for name in PAIR}
        table.add_row(
            row["margin"],
            f"{row['rate']:g}",
            f"{row['first_epoch_gap']:.0e}",
            f"{row['first_epoch_gap_of_one_bit']:.0e}",
            _both(row, "head_ms", "{:.2f}"),
            f"{row['time_ratio']:.2f}",
            _both(peaks, "peak_mb", "{:.1f}"),
            f"{row['memory_ratio']:.2f}",
        )
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    """Narrow enough for 80 columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("margin", no_wrap=True)
    for heading in ("rate", *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _both(row: dict[str, Any], key: str, form: str) -> str:
    return " / ".join(form.format(row[name][key]) for name in PAIR)
