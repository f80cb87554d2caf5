"""The pictures of what glyphs.json holds; :func:`benchmarks.plots.draw` writes them."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.plots import COLOURS, INK


def _colours(figures: dict[str, Any]) -> dict[float, str]:
    rates = dict.fromkeys(row["rate"] for row in figures["runs"])
    return {rate: COLOURS[i % len(COLOURS)] for i, rate in enumerate(rates)}


def rate_name(rate: float) -> str:
    return "all classes" if rate == 1 else f"{100 * rate:g} % sampled"


def _rate_lines(figures: dict[str, Any]) -> list[Line2D]:
    return [
        Line2D([], [], color=colour, linewidth=3, label=rate_name(rate))
        for rate, colour in _colours(figures).items()
    ]


def curves(figures: dict[str, Any]) -> Figure:
    """Training loss against epochs, one panel a margin: plain as a broad pale line, fastmargin as
    a thin one on top of it."""
    colours = _colours(figures)
    margins = list(figures["margins"])
    columns = min(4, len(margins))
    rows = math.ceil(len(margins) / columns)
    figure = Figure(figsize=(2.9 * columns + 0.6, 2.5 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for axes, margin in zip(grid.flat, margins, strict=False):
        for row in figures["runs"]:
            if row["margin"] != margin:
                continue
            for name, width, alpha in (("plain", 5.0, 0.45), ("fastmargin", 1.1, 1.0)):
                loss = row[name]["loss"]
                epochs = figures["recipe"]["epochs"]
                at = [(i + 0.5) * epochs / len(loss) for i in range(len(loss))]
                axes.plot(at, loss, color=colours[row["rate"]], linewidth=width, alpha=alpha)
        axes.set_title(margin)
        axes.set_ylim(bottom=0)
    for number in range(len(margins), grid.size):
        grid.flat[number].remove()
        grid.flat[number - columns].tick_params(labelbottom=True)  # now the lowest
    for axes in grid[:, 0]:
        axes.set_ylabel("training loss")
    figure.supxlabel("epoch", fontsize=10)
    lines = [
        *_rate_lines(figures),
        Line2D([], [], color=INK, linewidth=5, alpha=0.45, label="plain PyTorch"),
        Line2D([], [], color=INK, linewidth=1.1, label="fastmargin"),
    ]
    across = len(lines) if len(margins) > 1 else 2
    figure.legend(handles=lines, loc="outside upper center", ncols=across)
    return figure


def accuracy(figures: dict[str, Any]) -> Figure:
    """Rank-1 of the held-out font by margin and rate, both heads."""
    colours = _colours(figures)
    margins = list(figures["margins"])
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (rate, colour) in enumerate(colours.items()):
        shift = 0.22 * (number - (len(colours) - 1) / 2)
        for row in figures["runs"]:
            if row["rate"] != rate:
                continue
            x = margins.index(row["margin"]) + shift
            plain, fused = (100 * row[name]["rank_1_means"] for name in ("plain", "fastmargin"))
            axes.plot([x, x], [plain, fused], color=colour, linewidth=1)
            axes.plot(x, plain, "o", markersize=10, color=colour, alpha=0.4, linestyle="")
            axes.plot(x, fused, "o", markersize=4, color=colour, linestyle="")
    raw = 100 * figures["raw_pixels"]["rank_1_means"]
    axes.axhline(raw, color=INK, linewidth=1.2, linestyle="--")
    axes.set_xticks(range(len(margins)), margins)
    axes.set_ylim(0, 101)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("rank-1 identification (%)")
    axes.set_title(
        f"Glyphs of an unseen font ({figures['held_out']}), {figures['classes']:,} characters"
    )
    dot = {"marker": "o", "linestyle": "", "color": INK}
    lines = [
        *_rate_lines(figures),
        Line2D([], [], markersize=10, alpha=0.4, label="plain PyTorch", **dot),
        Line2D([], [], markersize=4, label="fastmargin", **dot),
        Line2D([], [], color=INK, linestyle="--", label="raw pixels"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=3)
    return figure


PICTURES = {"curves": curves, "accuracy": accuracy}
