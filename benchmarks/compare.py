"""Two reports: ratios of the second to the first, with the spread of both."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.report import ratio
from benchmarks.spread import Spread, ratio_of_runs


@dataclass(frozen=True)
class Difference:
    """step: ratio of the second report's step to the first's. memory: of the peaks, or None."""

    case: str
    contender: str
    step: Spread
    memory: float | None

    @property
    def verdict(self) -> str:
        """ "same" where the spreads overlap."""
        if self.step.low <= 1 <= self.step.high:
            return "same"
        return "slower" if self.step.low > 1 else "faster"


def differences(first: dict, second: dict) -> list[Difference]:
    """Of every row that was measured in both."""
    old = {_key(row): row for row in first["rows"] if row["status"] == "measured"}
    found = []
    for row in second["rows"]:
        before = old.get(_key(row))
        if before is None or row["status"] != "measured":
            continue
        memory = None
        if before.get("peak_bytes") and "peak_bytes" in row:
            memory = row["peak_bytes"] / before["peak_bytes"]
        step = ratio_of_runs(row["seconds"]["step"], before["seconds"]["step"])
        found.append(Difference(row["case"]["name"], row["contender"], step, memory))
    return found


def _key(row: dict) -> tuple:
    case = {name: value for name, value in row["case"].items() if name not in ("name", "suites")}
    return row["contender"], tuple(sorted(case.items()))


def warnings(first: dict, second: dict) -> list[str]:
    """What makes the two hard to compare."""
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
    table = Table("case", "", "step, second / first", "memory", "", title="Second run / first run")
    for found in differences(first, second):
        memory = "" if found.memory is None else f"{found.memory:.2f}"
        step = ratio(vars(found.step))
        table.add_row(found.case, found.contender, step, memory, found.verdict)
    console.print(table)
    for line in warnings(first, second):
        console.print(line, highlight=False)
