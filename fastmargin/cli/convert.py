"""``fastmargin convert``: class centres from and to other code bases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastmargin.cli.app import AsJson, app, failure, show


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder or file; any one of several shards.")],
    dest: Annotated[
        Path | None, typer.Argument(help="Folder or file to write; not needed with --dry-run.")
    ] = None,
    source_format: Annotated[
        str | None, typer.Option("--from", help="Format of SOURCE; default: detected.")
    ] = None,
    dest_format: Annotated[str, typer.Option("--to", help="Format of DEST.")] = "fastmargin",
    world_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of processes the classes will be sharded over: shards in DEST. A "
            "fastmargin checkpoint loads into any number.",
        ),
    ] = 1,
    num_classes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of classes. Needed for several shards of CVLface, which have padding rows;"
            " else checked, which detects missing last shards.",
        ),
    ] = None,
    sub_centers: Annotated[
        int, typer.Option(min=1, help="Centres per class in SOURCE (pml, wespeaker, --key).")
    ] = 1,
    head: Annotated[
        str | None,
        typer.Option(help="Name of the head in a fastmargin checkpoint that has several."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="Take the matrix of this name in any torch.save file, instead of --from, e.g. "
            "model.heads.weight (fast-reid) or weight (speechbrain)."
        ),
    ] = None,
    transposed: Annotated[
        bool, typer.Option("--transposed", help="The matrix of --key is (D, C).")
    ] = False,
    margin: Annotated[
        str | None,
        typer.Option(
            help="Margin of the head that will load the fastmargin checkpoint, e.g. kappaface: its "
            "state is then written, too. Default: adaface if SOURCE has its statistics, else a "
            "margin without state, such as arcface."
        ),
    ] = None,
    sampler_seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the head that will load the fastmargin checkpoint, if it samples classes."
        ),
    ] = None,
    momentum: Annotated[
        bool, typer.Option(help="Also convert SGD's momentum if both formats have it.")
    ] = True,
    backbone: Annotated[
        Path | None, typer.Option(help="Write the state_dict of SOURCE's backbone to this file.")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace DEST, unless it is a folder with other files."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report what SOURCE contains; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Convert class centres from and to the files of other code bases, for any number of GPUs.

    Formats: fastmargin (a checkpoint folder), safetensors, insightface (checkpoint_gpu_N.pt),
    kappaface (rank_N_softmax_weight.pt, also of insightface's old PartialFC), cvlface
    (classifier_rankN.pt), adaface (Lightning .ckpt), npt, pml (pytorch-metric-learning) and
    wespeaker. Files are read without running code from them. Exits with status 1, and writes
    nothing, if a shard is missing or invalid.
    """
    from rich.console import Console

    from fastmargin.convert.centres import ConvertError
    from fastmargin.convert.command import Settings, print_report, run
    from fastmargin.progress import RichProgress

    settings = Settings(
        source=source,
        dest=dest,
        source_format=source_format,
        dest_format=dest_format,
        world_size=world_size,
        num_classes=num_classes,
        sub_centers=sub_centers,
        head=head,
        key=key,
        transposed=transposed,
        margin=margin,
        sampler_seed=sampler_seed,
        momentum=momentum,
        backbone=backbone,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    try:
        with RichProgress(Console(stderr=True)) as progress:
            figures = run(settings, progress)
    except (ConvertError, OSError) as error:
        raise failure(error) from error
    show(figures, as_json, print_report)
