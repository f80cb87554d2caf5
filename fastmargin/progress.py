"""Progress of long commands."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Progress(Protocol):
    """Receives the progress of a command."""

    def begin(self, what: str, steps: int) -> None:
        """A part of the command with this many steps starts."""

    def advance(self, steps: int = 1) -> None:
        """One step, or several, are done."""

    def describe(self, what: str) -> None:
        """Something about the current part has changed, such as its loss."""

    def note(self, text: str) -> None:
        """A line to keep."""


class Silent:
    """Ignores progress."""

    def begin(self, what: str, steps: int) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        pass

    def describe(self, what: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class RichProgress:
    """One bar per part of a command, on the given console (standard error, beside ``--json``).

    keep: whether bars stay when the next part begins; for commands with few parts.
    """

    def __init__(self, console: Console, keep: bool = True) -> None:
        columns = (
            TextColumn("{task.description:<32}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Bars(*columns, console=console)
        self._task, self._keep = None, keep

    def begin(self, what: str, steps: int) -> None:
        if self._task is not None and not self._keep:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(what, total=steps)

    def advance(self, steps: int = 1) -> None:
        self._bars.advance(self._task, steps)

    def describe(self, what: str) -> None:
        self._bars.update(self._task, description=what)

    def note(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()
