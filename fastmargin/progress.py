"""Progress bars of long commands."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class RichProgress:
    """One bar per part of a command, on the given console (standard error, beside ``--json``)."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:<32}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Bars(*columns, console=console)
        self._task = None

    def begin(self, what: str, steps: int) -> None:
        self._task = self._bars.add_task(what, total=steps)

    def advance(self, steps: int = 1) -> None:
        self._bars.advance(self._task, steps)

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()


class NoProgress:
    """Shows nothing, for all processes but the first."""

    def begin(self, what: str, steps: int) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        pass

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(self, *_) -> None:
        pass
