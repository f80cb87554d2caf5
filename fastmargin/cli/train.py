"""``fastmargin train``: a face network from images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastmargin.cli.app import Device, app, failure, show


@app.command()
def train(
    data: Annotated[
        Path,
        typer.Argument(help="Folder with train.rec, or with a folder of images per identity."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, backbone.pt and log.jsonl.")],
    validation: Annotated[
        list[Path] | None,
        typer.Option(
            help="After every epoch, verify on lfw.bin and the like (insightface), or on a folder "
            "of other people. May be repeated."
        ),
    ] = None,
    backbone: Annotated[
        str,
        typer.Option(
            help="iresnet18, 34, 50, 100 or 200; or module:function, called with the embedding "
            "size, for a network of your own."
        ),
    ] = "iresnet50",
    pretrained: Annotated[
        Path | None, typer.Option(help="Start from this state_dict of the backbone.")
    ] = None,
    embedding_size: Annotated[int, typer.Option(help="Width of the embeddings.")] = 512,
    image_size: Annotated[int, typer.Option(help="Images are resized to this square.")] = 112,
    margin: Annotated[
        str,
        typer.Option(
            help="arcface, cosface, adaface, curricularface, elasticface, kappaface, magface, npt."
        ),
    ] = "arcface",
    setting: Annotated[
        list[str] | None,
        typer.Option(help="Setting of the margin, e.g. m=0.4 or s=32. May be repeated."),
    ] = None,
    sample_rate: Annotated[
        float, typer.Option(help="Fraction of the classes in a step (partial FC).")
    ] = 1.0,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 20,
    batch: Annotated[int, typer.Option(help="Images per step of each process.")] = 128,
    lr: Annotated[
        float | None,
        typer.Option(help="Highest learning rate. Default: 0.1 per 1,024 images of a step."),
    ] = None,
    warm_up: Annotated[float, typer.Option(help="Epochs until it is reached.")] = 0.0,
    momentum: Annotated[float, typer.Option(help="Momentum of SGD.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of SGD.")] = 5e-4,
    clip: Annotated[float, typer.Option(help="Largest norm of the backbone's gradient.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of weights, order, mirroring, sampling.")] = 0,
    device: Annotated[Device, typer.Option(help="auto takes GPUs if there are any.")] = Device.auto,
    workers: Annotated[int, typer.Option(help="Processes that decode, for each process.")] = 4,
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; one is written after every epoch, too.")
    ] = 2000,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue from the checkpoint in --out, if there is one."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures of all epochs as JSON.")
    ] = False,
) -> None:
    """Train a face network on images, with any of the margins.

    SGD with a quadratic schedule, images mirrored at random, bfloat16 on a GPU.
    Several GPUs share the classes among them: torchrun --nproc-per-node 8 -m fastmargin train ...
    A checkpoint continues on any number of them, in the middle of an epoch, too. Ends with status
    1, and keeps the last checkpoint, when the loss is no longer finite.
    """
    from rich.console import Console

    from fastmargin.distributed.collectives import ProcessError
    from fastmargin.train.command import print_report, run
    from fastmargin.train.settings import Settings, TrainError

    settings = Settings(
        data=data,
        out=out,
        validation=tuple(validation or ()),
        backbone=backbone,
        pretrained=pretrained,
        embedding_size=embedding_size,
        image_size=image_size,
        margin=margin.lower(),
        margin_settings=tuple(setting or ()),
        sample_rate=sample_rate,
        epochs=epochs,
        batch=batch,
        lr=lr,
        warm_up=warm_up,
        momentum=momentum,
        weight_decay=weight_decay,
        clip=clip,
        seed=seed,
        device=device.value,
        workers=workers,
        save_every=save_every,
        resume=resume,
    )
    try:
        figures = run(settings, Console(stderr=True))
    except (TrainError, ProcessError, OSError) as error:
        raise failure(error) from error
    if figures is None:  # not the first process
        return
    show(figures, as_json, print_report)
