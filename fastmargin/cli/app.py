"""The application that the commands register with, and what they share."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any

import typer

from fastmargin import __version__

app = typer.Typer(
    name="fastmargin",
    help="Margin-softmax heads for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[
    bool, typer.Option("--json", help="Print the figures as JSON instead of tables.")
]
"""The option of all commands that print figures."""


class Device(str, Enum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def fastmargin(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Margin-softmax heads for PyTorch."""


def failure(error: Exception | str) -> typer.Exit:
    """Prints an error to standard error; returns the exit to raise."""
    from rich.console import Console

    errors = Console(stderr=True)
    errors.print("[red]error:[/red]", end=" ")
    errors.print(str(error), highlight=False, markup=False, soft_wrap=True)
    return typer.Exit(1)


def show(figures: Any, as_json: bool, print_report: Callable) -> None:
    """Prints figures as JSON, or by ``print_report(console, figures)``."""
    from rich.console import Console

    if as_json:
        typer.echo(json.dumps(figures))
    else:
        print_report(Console(), figures)
