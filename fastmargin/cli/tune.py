"""``fastmargin tune``: tile shapes for this GPU."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastmargin.cli.app import AsJson, app, failure, show


class Operand(str, Enum):
    """Operand types of the Triton kernels."""

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"
    fp16 = "fp16"


class Kernel(str, Enum):
    """Triton kernels with tunable tiles."""

    stats_pull = "stats_pull"
    stats_sum = "stats_sum"
    centre_pass = "centre_pass"
    topk = "topk"


@app.command()
def tune(
    dim: Annotated[
        list[int] | None,
        typer.Option(help="Width of the embeddings; may be repeated. Default: 512."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the timed problem.")] = 1024,
    classes: Annotated[int, typer.Option(min=2, help="Its classes.")] = 1_000_000,
    precision: Annotated[Operand, typer.Option(help="Operand type.")] = Operand.fp16,
    kernel: Annotated[
        list[Kernel] | None,
        typer.Option(help="Kernel; may be repeated. Default: all four."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="Time per kernel and width, including compilation.")
    ] = 120.0,
    output: Annotated[
        Path | None,
        typer.Option(help="Write this file instead of the user's table; it is not used then."),
    ] = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="Delete the table; measure nothing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be tried; measure and write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure tile shapes of the Triton kernels on this GPU and keep those that are faster.

    Tries tiles similar to the shipped one, for each kernel and width: a tile must compile, not
    spill registers and agree with float64 before it is timed, and is kept only if it is faster by
    more than the spread of the times. Adds the results to a JSON table: --output, or
    $FASTMARGIN_TUNED, or ~/.cache/fastmargin/tuned.json ($XDG_CACHE_HOME replaces ~/.cache).
    Training uses an entry only with the same GPU model, Triton and fastmargin; only this command
    measures. FASTMARGIN_TUNED= (empty) turns the table off; fastmargin doctor says which entries
    apply here. Exits with status 1 without a GPU.
    """
    from rich.console import Console

    try:
        from fastmargin.backends.triton.tuned import KERNELS, TableError
        from fastmargin.progress import RichProgress
        from fastmargin.tune import command
    except ImportError as error:
        raise failure(f"{error}: pip install triton on Linux") from error
    try:
        if reset:
            figures = command.reset(output, dry_run)
        else:
            settings = command.Settings(
                dims=tuple(dim or (512,)),
                batch=batch,
                classes=classes,
                precision=precision.value,
                kernels=tuple(one.value for one in kernel or ()) or KERNELS,
                seconds=seconds,
                dry_run=dry_run,
                output=output,
            )
            on = command.machine()
            with RichProgress(Console(stderr=True)) as progress:
                figures = command.run(settings, on, progress)
    except (command.TuneError, TableError, OSError) as error:
        raise failure(error) from error
    show(figures, as_json, command.print_reset if reset else command.print_report)
    if figures.get("interrupted"):
        raise typer.Exit(130)  # as after SIGINT in a shell
    raise typer.Exit(1 if figures.get("error") else 0)
