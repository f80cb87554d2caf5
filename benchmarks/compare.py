"""Two reports: ratios of the second to the first, with the spread of both.

Between two runs the machine changes, too: clocks, other load, placement of pages. The peers of a
case run the same code both times, so each row's ratio is divided by that of its other peers.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.report import ratio
from benchmarks.spread import Spread, ratio_of_runs


@dataclass(frozen=True)
class Difference:
    """step: ratio of the second report's step time to the first's, divided by ``machine``.

    machine: median of that ratio over the case's peers, without this one; 1 if there are none.
    memory: ratio of the peaks, or None.
    """

    case: str
    contender: str
    step: Spread
    machine: float
    memory: float | None

    @property
    def verdict(self) -> str:
        """ "same" if the spread of the ratio includes 1."""
        if self.step.low <= 1 <= self.step.high:
            return "same"
        return "slower" if self.step.low > 1 else "faster"


def differences(first: dict, second: dict) -> list[Difference]:
    """Of each row measured in both."""
    old = {_key(row): row for row in first["rows"] if row["status"] == "measured"}
    both = [
        (row, old[_key(row)])
        for row in second["rows"]
        if row["status"] == "measured" and _key(row) in old
    ]
    steps = [ratio_of_runs(row["seconds"]["step"], then["seconds"]["step"]) for row, then in both]
    peers: dict[str, dict[str, float]] = defaultdict(dict)
    for (row, _), step in zip(both, steps, strict=True):
        if not row["ours"]:
            peers[row["case"]["name"]][row["contender"]] = step.median
    found = []
    for (row, then), step in zip(both, steps, strict=True):
        case, name = row["case"]["name"], row["contender"]
        others = [value for peer, value in peers[case].items() if peer != name]
        machine = statistics.median(others) if others else 1.0
        memory = None
        if then.get("peak_bytes") and "peak_bytes" in row:
            memory = row["peak_bytes"] / then["peak_bytes"]
        step = Spread(*(value / machine for value in (step.median, step.low, step.high)))
        found.append(Difference(case, name, step, machine, memory))
    return found


def _key(row: dict) -> tuple:
    case = {name: value for name, value in row["case"].items() if name not in ("name", "suites")}
    return row["contender"], tuple(sorted(case.items()))


def warnings(first: dict, second: dict) -> list[str]:
    """Reasons why the two are hard to compare."""
    one, two = first["provenance"], second["provenance"]
    found = [
        f"{what}: {a}, then {b}"
        for what, a, b in (
            ("device", one["device"], two["device"]),
            ("torch", one["versions"]["torch"], two["versions"]["torch"]),
        )
        if a != b
    ]
    for name, report in (("first", first), ("second", second)):
        marked = [row["contender"] for row in report["rows"] if row.get("disturbed")]
        if marked:
            found.append(f"the {name} run was disturbed in {len(marked)} rows")
    return found


def print_differences(console: Console, first: dict, second: dict) -> None:
    columns = "case", "", "step, over machine", "machine", "memory", ""
    table = Table(*columns, title="Second run / first run")
    for found in differences(first, second):
        memory = "" if found.memory is None else f"{found.memory:.2f}"
        step = ratio(vars(found.step))
        machine = f"{found.machine:.2f}"
        table.add_row(found.case, found.contender, step, machine, memory, found.verdict)
    console.print(table)
    for line in warnings(first, second):
        console.print(line, highlight=False)
