"""The pictures of the benchmark. Each function takes what glyphs.json holds and writes one PNG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.lines import Line2D

from fastmargin.demo.plots import COLORS, DPI, GREY, STYLE, new_figure

RATE_COLORS = (COLORS[0], COLORS[3], COLORS[2], COLORS[1], COLORS[4], COLORS[5])


def _colors(figures: dict[str, Any]) -> dict[float, str]:
    rates = dict.fromkeys(row["rate"] for row in figures["runs"])
    return {rate: RATE_COLORS[i % len(RATE_COLORS)] for i, rate in enumerate(rates)}


def _rate_name(rate: float) -> str:
    return "all classes" if rate == 1 else f"{100 * rate:g} % sampled"


def plot_curves(path: Path, figures: dict[str, Any]) -> None:
    """Training loss against epochs, one panel a margin: plain as a broad pale line, fastmargin as
    a thin one on top of it."""
    colors = _colors(figures)
    margins = list(figures["margins"])
    columns = min(4, len(margins))
    rows = math.ceil(len(margins) / columns)
    with matplotlib.rc_context(STYLE):
        figure, grid = new_figure(
            rows, columns, (2.9 * columns + 0.6, 2.5 * rows + 0.8), sharex=True, squeeze=False
        )
        for axes, margin in zip(grid.flat, margins, strict=False):
            for row in figures["runs"]:
                if row["margin"] != margin:
                    continue
                for name, width, alpha in (("plain", 5.0, 0.3), ("fastmargin", 1.1, 1.0)):
                    loss = row[name]["loss"]
                    epochs = figures["recipe"]["epochs"]
                    at = [(i + 0.5) * epochs / len(loss) for i in range(len(loss))]
                    color = colors[row["rate"]]
                    axes.plot(at, loss, color=color, linewidth=width, alpha=alpha)
            axes.set_title(margin)
            axes.set_ylim(bottom=0)
        for number in range(len(margins), grid.size):
            grid.flat[number].remove()
            grid.flat[number - columns].tick_params(labelbottom=True)  # now the lowest
        for axes in grid[:, 0]:
            axes.set_ylabel("training loss")
        figure.supxlabel("epoch", fontsize=10)
        lines = [
            *(Line2D([], [], color=c, linewidth=3, label=_rate_name(r)) for r, c in colors.items()),
            Line2D([], [], color=GREY, linewidth=5, alpha=0.4, label="plain PyTorch"),
            Line2D([], [], color=GREY, linewidth=1.1, label="fastmargin"),
        ]
        across = len(lines) if len(margins) > 1 else 2
        figure.legend(handles=lines, loc="outside upper center", ncols=across)
        figure.savefig(path, dpi=DPI)


def plot_accuracy(path: Path, figures: dict[str, Any]) -> None:
    """Rank-1 of the held-out font by margin and rate, both heads."""
    colors = _colors(figures)
    margins = list(figures["margins"])
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size=(7.6, 4.6))
        for number, (rate, color) in enumerate(colors.items()):
            shift = 0.22 * (number - (len(colors) - 1) / 2)
            for row in figures["runs"]:
                if row["rate"] != rate:
                    continue
                x = margins.index(row["margin"]) + shift
                plain, fused = (100 * row[name]["rank_1_means"] for name in ("plain", "fastmargin"))
                axes.plot([x, x], [plain, fused], color=color, linewidth=1)
                axes.plot(x, plain, "o", markersize=10, color=color, alpha=0.35, linestyle="")
                axes.plot(x, fused, "o", markersize=4, color=color, linestyle="")
        raw = 100 * figures["raw_pixels"]["rank_1_means"]
        axes.axhline(raw, color=GREY, linewidth=1.2, linestyle="--")
        axes.set_xticks(range(len(margins)), margins)
        axes.set_ylim(0, 101)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("rank-1 identification (%)")
        axes.set_title(
            f"Glyphs of an unseen font ({figures['held_out']}), {figures['classes']:,} characters"
        )
        dot = {"marker": "o", "linestyle": "", "color": GREY}
        lines = [
            *(Line2D([], [], color=c, linewidth=3, label=_rate_name(r)) for r, c in colors.items()),
            Line2D([], [], markersize=10, alpha=0.35, label="plain PyTorch", **dot),
            Line2D([], [], markersize=4, label="fastmargin", **dot),
            Line2D([], [], color=GREY, linestyle="--", label="raw pixels"),
        ]
        figure.legend(handles=lines, loc="outside lower center", ncols=3)
        figure.savefig(path, dpi=DPI)
