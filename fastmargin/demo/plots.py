"""The plots of the demo. Each function takes plain numbers and writes one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

# Okabe and Ito's palette: distinguishable by colour-blind readers and in print
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
GREY = "#7f7f7f"
RAW = "raw pixels"
DPI = 150
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "legend.frameon": False,
    "savefig.facecolor": "white",
}


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.0, 4.6), **kwargs):
    """A figure without pyplot: no global state, no display."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def plot_roc(
    path: Path,
    far: Sequence[float],
    tar: dict[str, Sequence[float]],
    auc: dict[str, float],
    title: str,
) -> None:
    """ROC of each row of the table. far: [T] ascending; tar: name -> [T]; both fractions 0..1.

    Raw pixels, which are not a head, are dashed and grey, and last in the legend.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        colors = iter(COLORS)
        for name in sorted(tar, key=lambda name: name == RAW):
            raw = name == RAW
            axes.plot(
                [100 * x for x in far],
                [100 * y for y in tar[name]],
                color=GREY if raw else next(colors),
                linestyle="--" if raw else "-",
                linewidth=1.8,
                drawstyle="steps-post",
                label=f"{name} (AUC {auc[name]:.4f})",
            )
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.annotate("FAR 1 %", (1, 2), xytext=(4, 0), textcoords="offset points", fontsize=9)
        axes.set(xscale="log", xlim=(100 * far[0], 100), ylim=(0, 101), title=title)
        axes.set_xlabel("false accept rate: impostor pairs accepted (%)")
        axes.set_ylabel("true accept rate: genuine pairs accepted (%)")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.legend(loc="lower right")
        figure.savefig(path, dpi=DPI)


def plot_adaface(
    path: Path,
    norm: Sequence[float],
    margin: dict[int, Sequence[float]],
    norms_whole: Sequence[float],
    norms_hidden: Sequence[float],
    title: str,
) -> None:
    """AdaFace's margin against the embedding norm, above a histogram of norms.

    margin: target angle in degrees -> ``cos_y - psi`` [len(norm)], cosine units.
    norms_whole, norms_hidden: norms of training views without and with an erased rectangle.
    """
    with matplotlib.rc_context(STYLE):
        ratios = {"height_ratios": [2.2, 1]}
        figure, (top, bottom) = new_figure(2, 1, (7.0, 5.6), sharex=True, gridspec_kw=ratios)
        for (degrees, values), color in zip(margin.items(), COLORS, strict=False):
            label = f"target angle {degrees}°"
            top.plot(norm, values, color=color, linewidth=1.8, label=label)
        top.set(title=title, ylabel="margin taken off the\ntarget's cosine")
        top.legend(loc="best")
        bins = [norm[0] + i * (norm[-1] - norm[0]) / 40 for i in range(41)]
        for values, color, label in (
            (norms_whole, COLORS[0], "whole face"),
            (norms_hidden, COLORS[3], "partly hidden"),
        ):
            bottom.hist(values, bins, color=color, alpha=0.5, label=label, density=True)
        bottom.set(ylabel="density of\ntraining views", xlim=(norm[0], norm[-1]))
        bottom.set_xlabel("norm of the raw embedding, AdaFace's measure of image quality")
        bottom.legend(loc="upper right")
        figure.savefig(path, dpi=DPI)


def plot_kappaface(
    path: Path,
    kappa: Sequence[float],
    margin: Sequence[float],
    thumbnails: Sequence[Sequence[Sequence[float]]],
    title: str,
) -> None:
    """KappaFace's margin (radians) against the concentration kappa, one point per person.

    thumbnails: mean image of each person, grey 0..1; shown for the three least and the three most
    concentrated people.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        axes.scatter(kappa, margin, color=COLORS[0], s=28, zorder=3)
        order = sorted(range(len(kappa)), key=lambda person: kappa[person])
        shown = [*order[:3], *order[-3:]] if len(order) >= 6 else order
        low, high = min(kappa), max(kappa)
        for place, person in enumerate(shown):
            image = OffsetImage(thumbnails[person], cmap="gray", norm=Normalize(0, 1), zoom=0.75)
            # in a row along the top, so that they do not overlap
            at = (0.08 + 0.84 * place / max(1, len(shown) - 1), 0.88)
            axes.add_artist(
                AnnotationBbox(
                    image,
                    (kappa[person], margin[person]),
                    xybox=at,
                    boxcoords="axes fraction",
                    frameon=False,
                    pad=0.1,
                    arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7},
                )
            )
        axes.set(title=title, xlim=(low - 0.06 * (high - low), high + 0.06 * (high - low)))
        spread = max(margin) - min(margin)
        axes.set_ylim(min(margin) - 0.08 * spread, max(margin) + 0.55 * spread)
        axes.set_xlabel(
            "concentration $\\kappa$ of the person's embeddings (left: scattered, right: tight)"
        )
        axes.set_ylabel("angular margin $m\\,w$ (radians)")
        figure.savefig(path, dpi=DPI)


def plot_scaling(path: Path, costs: Sequence[dict], title: str) -> None:
    """Step time and peak memory of both implementations against the number of identities.

    costs: rows of :class:`fastmargin.demo.scaling.StepCost` as dictionaries.
    """
    styles = {
        "fastmargin": (COLORS[0], "o", "fastmargin"),
        "plain": (COLORS[3], "s", "plain PyTorch"),
    }
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = new_figure(1, 2, (9.6, 4.2))
        for name, (color, marker, label) in styles.items():
            rows = [row for row in costs if row["implementation"] == name]
            counts = [row["identities"] for row in rows]
            look = {"color": color, "marker": marker, "linewidth": 1.8, "label": label}
            left.plot(counts, [row["step_ms"] for row in rows], **look)
            right.plot(counts, [max(row["peak_mib"], 0.1) for row in rows], **look)
            right.plot(
                *(counts, [row["centers_gradient_mib"] for row in rows]),
                **{"color": GREY, "linestyle": "--", "linewidth": 1.2},
                label="of which gradient of the centres" if name == "plain" else None,
            )
        left.set(title=title, ylabel="forward + backward (ms)")
        right.set(title="Peak memory of one step", ylabel="beyond centres and features (MiB)")
        for axes in (left, right):
            _log_log(axes)
            axes.legend(loc="upper left")
        figure.savefig(path, dpi=DPI)


def _log_log(axes: Axes) -> None:
    axes.set(xscale="log", yscale="log", xlabel="identities")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 4)  # room for the legend
