"""``fastmargin doctor``: which backends run here, and whether the kernels fit."""

from __future__ import annotations

from typing import Annotated

import typer

from fastmargin.cli.app import app, failure, show


@app.command()
def doctor(
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Compile the Triton kernels for sm_80, sm_90 and sm_100 (no GPU needed; minutes) "
            "and list their registers, stack and shared memory.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON instead of tables.")
    ] = False,
) -> None:
    """Report which backends run here and why the others cannot; test them against float64.

    Exits with status 1 if a backend gives wrong results or a kernel does not fit its chip.
    """
    from rich.console import Console

    from fastmargin.doctor import examine, print_report

    try:
        with Console(stderr=True).status("compiling kernels" if kernels else "testing"):
            report = examine(kernels)
    except RuntimeError as error:
        raise failure(error) from error
    show(report, as_json, print_report)
    raise typer.Exit(0 if report["healthy"] else 1)
