"""The ``fastmargin`` command: a file per subcommand, which imports what it needs when called."""

from fastmargin.cli import bench, convert, demo, doctor, plan, train, tune  # noqa: F401
from fastmargin.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the console script."""
    app()
