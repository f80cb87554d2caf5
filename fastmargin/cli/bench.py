"""``fastmargin bench``: heads and peers, side by side."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from fastmargin.cli.app import app


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def bench(context: typer.Context) -> None:
    """Measure heads and their peers side by side; needs a source checkout. See bench --help."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").exists():
        typer.echo(
            "error: fastmargin bench needs a source checkout, with benchmarks/ beside the package; "
            "this is an installed copy. Clone the repository and install it with "
            "pip install -e .",
            err=True,
        )
        raise typer.Exit(2)
    sys.path.insert(0, str(root))
    from benchmarks.run import main as run

    raise typer.Exit(run(context.args))
