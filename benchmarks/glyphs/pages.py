"""The committed figures as text for docs: what glyphs.json holds, as tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.glyphs.plots import rate_name
from benchmarks.markdown import table

PAIR = ("plain", "fastmargin")
ACCURACIES = ("rank_1_centres", "rank_1_means", "tar_at_far_1e-4")

Row = dict[str, Any]


def origin(figures: Row) -> str:
    """Where the figures are from, in a line."""
    dirty = " with uncommitted changes" if figures["uncommitted_changes"] else ""
    return (
        f"{figures['classes']:,} characters, {figures['training_glyphs']:,} glyphs of "
        f"{len(figures['fonts']) - 1} fonts to train on, {figures['unseen_glyphs']:,} of "
        f"{figures['held_out']} to identify; {figures['recipe']['epochs']} epochs, seed "
        f"{figures['seed']}. On {figures['device']}, torch {figures['versions']['torch']}, commit "
        f"{figures['commit'][:10]}{dirty}, {figures['date'][:10]}, `{figures['command']}`, "
        f"{figures['seconds']:.0f} s"
    )


def accuracies(figures: Row) -> str:
    """Every margin at every rate, plain / fastmargin."""
    head = ["", "classes", "rank-1 by centres", "rank-1 by means", "TAR at FAR 1e-4"]
    body = [
        [row["margin"], rate_name(row["rate"]), *(_both(row, key, "{:.3f}") for key in ACCURACIES)]
        for row in figures["runs"]
    ]
    raw = figures["raw_pixels"]
    cells = (f"{raw[key]:.3f}" for key in ACCURACIES[1:])
    return table(head, [*body, ["raw pixels", "", "", *cells]])


def costs(figures: Row) -> str:
    """Curves and costs of every margin at every rate; where there are two, plain / fastmargin."""
    head = ["", "classes", "difference", "one bit", "head", "ratio", "peak", "ratio"]
    body = []
    for row in figures["runs"]:
        peaks = {name: {"mb": row[name]["peak_bytes"] / 1e6} for name in PAIR}
        body.append(
            [
                row["margin"],
                rate_name(row["rate"]),
                f"{row['first_epoch_gap']:.1%}",
                f"{row['first_epoch_gap_of_one_bit']:.1%}",
                _both(row, "head_ms", "{:.2f}") + " ms",
                f"{row['time_ratio']:.2f}",
                _both(peaks, "mb", "{:.1f}") + " MB",
                f"{row['memory_ratio']:.2f}",
            ]
        )
    return table(head, body)


def curves(figures: Row) -> str:
    """How far the losses are apart, in a sentence."""
    rows = figures["runs"]
    first = max(row["first_step_gap"] for row in rows)
    against = sorted(row["first_epoch_gap"] / row["first_epoch_gap_of_one_bit"] for row in rows)
    return (
        f"The losses of the first step differ by {first:.0e} of their size at most. "
        f"Difference over one bit is {statistics.median(against):.1f} in the median of the "
        f"{len(rows)} pairs, {against[0]:.1f} to {against[-1]:.1f}."
    )


def differences(figures: Row) -> str:
    """Of the accuracies of both heads, in a sentence."""
    found = [points("fastmargin")(row) for row in figures["runs"]]
    error = statistics.stdev(found) / len(found) ** 0.5
    return (
        f"Rank-1 by means, fastmargin less plain PyTorch: {min(found):+.1f} to {max(found):+.1f} "
        f"points, {statistics.fmean(found):+.1f} on average over the {len(found)} pairs, with a "
        f"standard error of {error:.1f}."
    )


def summary(figures: Row) -> str:
    """Lowest and highest of all margins, a line for every rate."""
    head = ["classes", "difference of losses", "one bit", "rank-1", "head time", "peak memory"]
    body = [
        [
            rate_name(rate),
            *(
                f"{100 * low:.1f} to {100 * high:.1f} %"
                for low, high in (
                    _range(rows, lambda row: row["first_epoch_gap"]),
                    _range(rows, lambda row: row["first_epoch_gap_of_one_bit"]),
                )
            ),
            "{:+.1f} to {:+.1f} points".format(*_range(rows, points("fastmargin"))),
            *(
                "{:.2f} to {:.2f}".format(*_range(rows, lambda row, key=key: row[key]))
                for key in ("time_ratio", "memory_ratio")
            ),
        ]
        for rate, rows in _by_rate(figures).items()
    ]
    return table(head, body)


def rounding(figures: Row) -> str:
    """Accuracies against plain PyTorch: those of fastmargin, and of plain from one bit apart."""
    head = ["classes", "fastmargin", "on average", "one bit apart", "on average"]
    every = {**_by_rate(figures), None: figures["runs"]}
    body = []
    for rate, rows in every.items():
        cells = []
        for name in ("fastmargin", "one_bit_apart"):
            found = [points(name)(row) for row in rows]
            average = statistics.fmean(found)
            cells += [f"{min(found):+.1f} to {max(found):+.1f}", f"{average:+.1f}"]
        body.append(["together" if rate is None else rate_name(rate), *cells])
    return table(head, body)


def points(name: str) -> Callable[[Row], float]:
    """Rank-1 by means less that of plain PyTorch, in percentage points, of a row."""
    return lambda row: 100 * (row[name]["rank_1_means"] - row["plain"]["rank_1_means"])


def _by_rate(figures: Row) -> dict[float, list[Row]]:
    found: dict[float, list[Row]] = {}
    for row in figures["runs"]:
        found.setdefault(row["rate"], []).append(row)
    return found


def _range(rows: list[Row], value: Callable[[Row], float]) -> tuple[float, float]:
    found = [value(row) for row in rows]
    return min(found), max(found)


def _both(row: Row, key: str, form: str) -> str:
    return " / ".join(form.format(row[name][key]) for name in PAIR)
