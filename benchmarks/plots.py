"""Plots of a report, as PNG and SVG, readable on light and dark pages.

Backgrounds are transparent, and each colour has a contrast of at least 3 with white and with a dark
page. The same report gives the same SVG.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cases import Case, from_dict
from benchmarks.roofline import floor

INK = "#808080"
COLOURS = ("#3b82d6", "#c9700f", "#1f9a57", "#e0484d", "#a060d0", "#1593a5", "#9c7440", "#d6549a")
MARKERS = "osD^vPX*"
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 10,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastmargin",
}
DPI = 150
Picture = Callable[[dict], Figure | None]
"""Plots a report; None if it has no data for the plot."""


def draw(
    report: dict,
    folder: Path,
    formats: tuple[str, ...] = ("png", "svg"),
    pictures: dict[str, Picture] | None = None,
) -> list[Path]:
    """Writes the plots that the report has data for; returns the files. pictures: by file stem;
    default: those of ``fastmargin bench``."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name, make in (PICTURES if pictures is None else pictures).items():
        for kind in formats:
            with matplotlib.rc_context(STYLE):
                figure = make(report)  # a new figure, since a layout depends on the last drawing
                if figure is None:
                    break
                path = folder / f"{name}.{kind}"
                metadata = {"Date": None, "Description": digest(report)} if kind == "svg" else None
                figure.savefig(path, dpi=DPI, metadata=metadata)
                found.append(path)
    return found


def digest(report: dict) -> str:
    """Hash of the report that a plot was drawn from."""
    return "sha256:" + hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()


# ---- the plots; each returns None without data ----


def identities(report: dict) -> Figure | None:
    """Step time and peak memory against the number of classes, all else equal."""
    rows = _largest_family(report, "classes")
    if not rows:
        return None
    case = from_dict(rows[0]["case"])
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, look in _looks(rows).items():
        own = [row for row in rows if row["contender"] == name]
        measured = [row for row in own if row["status"] == "measured"]
        _line(left, [(_of(r, "classes"), r["summary"]["step"]["median"]) for r in measured], look)
        with_memory = [row for row in measured if "peak_bytes" in row]
        points = [(_of(r, "classes"), max(r["peak_bytes"], 1e5)) for r in with_memory]
        _line(right, points, look)
        for axes in (left, right):
            _mark_limit(axes, [row for row in own if row["status"] == "out of memory"], look)
    gradient = [(_of(r, "classes"), _of(r, "classes") * case.dim * 4) for r in rows]
    label = "gradient of the centres alone"
    right.plot(*zip(*sorted(set(gradient)), strict=True), color=INK, ls=":", label=label)
    left.set(title=f"Step time: {_setting(case)}", ylabel="seconds")
    right.set(title="Extra peak memory of a step", ylabel="bytes")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="identities")
    _legend_below(figure, right)
    return figure


def rates(report: dict) -> Figure | None:
    """Step time against the fraction of classes sampled."""
    rows = [row for row in _largest_family(report, "rate") if row["status"] == "measured"]
    if not rows:
        return None
    case = from_dict(rows[0]["case"])
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, look in _looks(rows).items():
        own = [row for row in rows if row["contender"] == name]
        _line(axes, [(_of(row, "rate"), row["summary"]["step"]["median"]) for row in own], look)
    axes.set(xscale="log", yscale="log", xlabel="fraction of classes sampled")
    axes.set(ylabel="seconds", title=f"Whole step, {case.classes:,} classes, {_setting(case)}")
    _legend_below(figure, axes)
    return figure


def roofline(report: dict) -> Figure | None:
    """Useful FLOP/s against useful FLOP per byte, below the ceilings of the run."""
    rows = [row for row in report["rows"] if row["status"] == "measured"]
    if not rows:
        return None
    flops, copied = report["ceilings"]["flops"], report["ceilings"]["bytes"]
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    intensity = {_intensity(row) for row in rows}
    ends = (min(intensity) / 3, max([*intensity, flops / copied]) * 3)
    knee = sorted({*ends, flops / copied})
    axes.plot(knee, [min(flops, copied * x) for x in knee], color=INK, label="ceilings of the run")
    for name, look in _looks(rows).items():
        own = [row for row in rows if row["contender"] == name]
        points = sorted((_intensity(row), row["flops_per_s"]) for row in own)
        axes.plot(*zip(*points, strict=True), **look, ls="none")
    axes.set(xscale="log", yscale="log", title="Roofline: FLOP/s, counting only what a step needs")
    axes.set(xlabel="FLOP per byte that the case needs", ylabel="FLOP/s, counting 6 B K D")
    _legend_below(figure, axes)
    return figure


def error(report: dict) -> Figure | None:
    """Relative error of both gradients against float64, by logit gap."""
    series = [found for found in report["accuracy"] if found.get("points")]
    if not series:
        return None
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    looks = _looks(series)
    parts = {"d_embeddings": "gradient of the embeddings", "d_weight": "gradient of the centres"}
    for axes, (part, title) in zip(panels, parts.items(), strict=True):
        for found in series:
            points = [(p["gap"], max(p[part], 1e-9)) for p in found["points"]]
            _line(axes, points, looks[found["contender"]])
        axes.set(yscale="log", title=title.capitalize())
        axes.set_xlabel("target logit - log-sum-exp of the others")
    panels[0].set_ylabel("relative error against float64")
    _legend_below(figure, panels[0])
    return figure


PICTURES: dict[str, Picture] = {
    "identities": identities,
    "rates": rates,
    "roofline": roofline,
    "error": error,
}

# ---- shared helpers ----


def _largest_family(report: dict, field: str) -> list[dict]:
    """Rows of the largest set of cases (at least two) that differ only in ``field``."""
    plain = {"name": "", "suites": ()}
    families: dict[Case, list[dict]] = {}
    for row in report["rows"]:
        case = from_dict(row["case"])
        if row["status"] == "not run" or (field == "classes" and case.rate < 1):
            continue
        own = replace(case, **plain, **{field: 1})
        families.setdefault(own, []).append(row)
    best = max(families.values(), key=lambda rows: len({_of(r, field) for r in rows}), default=[])
    return best if len({_of(row, field) for row in best}) > 1 else []


def _of(row: dict, field: str):
    return row["case"][field]


def _intensity(row: dict) -> float:
    needed = floor(from_dict(row["case"]))
    return needed.flops / needed.bytes


def _setting(case: Case) -> str:
    return f"{case.margin}, {case.batch} rows, {case.dim} dimensions"


def _looks(rows: list[dict]) -> dict[str, dict]:
    """Colour, marker and label of each contender, in order of appearance."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    return {
        name: {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[place % len(MARKERS)],
            "label": name,
        }
        for place, name in enumerate(names)
    }


def _line(axes: Axes, points: list[tuple[float, float]], look: dict) -> None:
    if points:
        axes.plot(*zip(*sorted(points), strict=True), **look, lw=1.8, ms=5)


def _mark_limit(axes: Axes, rows: list[dict], look: dict) -> None:
    """A cross at the top of the axes where a contender no longer fits."""
    if rows:
        classes = min(_of(row, "classes") for row in rows)
        at = axes.get_xaxis_transform()
        axes.plot([classes], [0.97], transform=at, color=look["color"], marker="x", ms=9, mew=2)
        text = {"color": look["color"], "ha": "right", "va": "top", "fontsize": 8}
        axes.text(classes, 0.93, "out of memory", transform=at, **text)


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(3 if figure.get_figwidth() > 8 else 2, len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
