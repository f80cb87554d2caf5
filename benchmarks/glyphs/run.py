"""The whole benchmark: fonts, classes, every margin at every rate by both heads, figures."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import PIL
import torch
import torch.nn.functional as F

import fastmargin as fm
from benchmarks.glyphs import identification, memory
from benchmarks.glyphs.classes import cached_classes
from benchmarks.glyphs.data import Split, draw_split
from benchmarks.glyphs.fonts import HELD_OUT, NOTO, SMALL, find_faces
from benchmarks.glyphs.heads import HEADS, MARGINS, NudgedHead
from benchmarks.glyphs.training import Recipe, Trained, largest_gap, train_in_step
from benchmarks.provenance import provenance
from fastmargin.progress import Progress, Silent

RATES = (1.0, 0.3, 0.1)
CURVE_POINTS = 60
FIRST_STEP_GAP = 1e-4
NUDGED = "one_bit_apart"

Figures = dict[str, Any]
"""What ``glyphs.json`` holds."""


class BenchmarkError(RuntimeError):
    """The benchmark cannot run, or a result is wrong; the message says which."""


@dataclass(frozen=True)
class Settings:
    """Options of ``python -m benchmarks.glyphs``. fonts: a folder to look in instead of the usual
    ones. epochs None: the recipe's. threads None: torch's own choice. one_bit: the plain head that
    starts one bit apart trains to the end, and its accuracies are given too."""

    classes: int = 2000
    margins: tuple[str, ...] = tuple(MARGINS)
    rates: tuple[float, ...] = RATES
    epochs: int | None = None
    seed: int = 0
    out: Path = Path("glyphs")
    noto: bool = False
    fonts: Path | None = None
    device: str = "cpu"
    threads: int | None = None
    one_bit: bool = False


def run(settings: Settings, progress: Progress | None = None) -> Figures:
    """Runs everything and writes ``glyphs.json`` and the plots to ``settings.out``.

    Raises:
        FontsMissingError, BenchmarkError, ValueError: fonts are not installed, an option cannot
            be met, or the two heads disagree in the first step.
    """
    start = time.perf_counter()
    progress = progress or Silent()
    _check(settings)
    device = torch.device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    recipe = Recipe() if settings.epochs is None else Recipe(epochs=settings.epochs)
    split, fonts = _draw(settings, progress)
    split = replace(split, training=split.training.to(device), unseen=split.unseen.to(device))

    pairs = [(margin, rate) for margin in settings.margins for rate in settings.rates]
    command = " ".join(["python -m benchmarks.glyphs", *sys.argv[1:]])
    origin = provenance(command, device)
    progress.begin("training", recipe.epochs * len(pairs))
    runs = [
        compare(margin, rate, split, recipe, settings.seed, progress.advance, settings.one_bit)
        for margin, rate in pairs
    ]
    progress.begin("memory", 1)
    task = memory.Task(
        split.num_classes, recipe.batch_size, pairs, settings.device, torch.get_num_threads()
    )
    for row, peaks in zip(runs, memory.peaks_in_new_process(task), strict=True):
        for name in HEADS:
            row[name]["peak_bytes"] = peaks[name]
        row["memory_ratio"] = peaks["fastmargin"] / peaks["plain"]
    progress.advance()

    figures: Figures = {
        "classes": split.num_classes,
        "fonts": fonts,
        "held_out": HELD_OUT.name,
        "training_glyphs": len(split.training.labels),
        "unseen_glyphs": len(split.unseen.labels),
        "seed": settings.seed,
        "recipe": asdict(recipe),
        "margins": {name: repr(MARGINS[name]()) for name in settings.margins},
        "backend": fm.backends.select("auto", device, torch.float32).name,
        "raw_pixels": identification.raw_pixel_figures(split),
        "runs": runs,
        "pillow": PIL.__version__,
        **origin,
        "seconds": round(time.perf_counter() - start, 1),
    }
    write(figures, settings.out)
    return figures


def write(figures: Figures, out: Path) -> None:
    """``glyphs.json`` and the plots."""
    # matplotlib takes half a second to import
    from benchmarks.glyphs.plots import PICTURES
    from benchmarks.plots import draw

    out.mkdir(parents=True, exist_ok=True)
    (out / "glyphs.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(figures, out, formats=("png",), pictures=PICTURES)


def compare(
    margin: str,
    rate: float,
    split: Split,
    recipe: Recipe,
    seed: int,
    after_epoch: Callable[[], None] = lambda: None,
    one_bit: bool = False,
) -> Figures:
    """One margin at one rate by both heads: curves, figures of the unseen font, head times.

    The plain head from one bit apart stops after the first epoch; with ``one_bit`` it trains to
    the end, and there are figures of it too: what rounding alone does to them.

    Raises:
        BenchmarkError: the losses of the first step, from the same weights, differ.
    """

    def maker(head):
        return lambda size, classes: head(size, classes, MARGINS[margin](), rate)

    heads = {name: maker(head) for name, head in HEADS.items()} | {NUDGED: maker(NudgedHead)}
    stops = () if one_bit else (NUDGED,)
    trained = train_in_step(heads, split, recipe, seed, stops, after_epoch)
    first_epoch = len(trained["plain"].losses) // recipe.epochs
    plain = trained["plain"].losses
    first_gap = largest_gap(trained["fastmargin"].losses, plain, 1)
    if not first_gap <= FIRST_STEP_GAP:
        raise BenchmarkError(
            f"{margin} at rate {rate:g}: the losses of the first step differ by {first_gap:.1e} of "
            "their size, so there is nothing to compare"
        )
    row: Figures = {
        "margin": margin,
        "rate": rate,
        "first_step_gap": first_gap,
        "first_epoch_steps": first_epoch,
        "first_epoch_gap": largest_gap(trained["fastmargin"].losses, plain, first_epoch),
        "first_epoch_gap_of_one_bit": largest_gap(trained[NUDGED].losses, plain, first_epoch),
    }
    for name in HEADS:
        row[name] = _summary(trained[name], split)
    if one_bit:
        row[NUDGED] = _summary(trained[NUDGED], split)
    row["time_ratio"] = row["fastmargin"]["head_ms"] / row["plain"]["head_ms"]
    return row


def _summary(trained: Trained, split: Split) -> Figures:
    if isinstance(trained.head, fm.MarginHead):
        centres = trained.head.export_centers()
    else:
        centres = F.normalize(trained.head.weight.detach())
    return {
        **identification.figures(trained.network, centres, split),
        "final_loss": trained.losses[-10:].mean().item(),
        "head_ms": trained.head_ms(),
        "loss": _thinned(trained.losses.tolist()),
    }


def _thinned(losses: Sequence[float]) -> list[float]:
    """Means of about CURVE_POINTS pieces of a curve, all of the same number of steps."""
    piece = max(1, len(losses) // CURVE_POINTS)
    starts = range(0, len(losses) - piece + 1, piece)
    return [float(f"{sum(losses[i : i + piece]) / piece:.6g}") for i in starts]


def _check(settings: Settings) -> None:
    unknown = [name for name in settings.margins if name not in MARGINS]
    if unknown or not settings.margins:
        raise BenchmarkError(f"--margins must be some of {', '.join(MARGINS)}, got {unknown}")
    if not settings.rates or not all(0 < rate <= 1 for rate in settings.rates):
        raise BenchmarkError(f"--rates must be in (0, 1], got {settings.rates}")
    if settings.epochs is not None and settings.epochs < 1:
        raise BenchmarkError(f"--epochs must be at least 1, got {settings.epochs}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: torch finds no CUDA device here; use --device cpu")


def _draw(settings: Settings, progress: Progress) -> tuple[Split, list[str]]:
    fonts = (*SMALL, *NOTO) if settings.noto else SMALL
    faces = find_faces(fonts, None if settings.fonts is None else [settings.fonts])
    progress.begin("classes", len(faces))
    classes = cached_classes(settings.out, faces, progress.advance).some(settings.classes)
    progress.begin("glyphs", len(faces))
    split = draw_split(faces, classes, HELD_OUT, after_font=progress.advance)
    return split, [face.font.name for face in faces]
