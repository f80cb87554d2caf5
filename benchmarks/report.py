"""A report as tables on a console, and its numbers and cases as text."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.cases import Case, from_dict


def digits(value: float) -> str:
    """Three significant digits, or all before the decimal point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= 0.9995 * unit or name == "us":  # 1000 ms after rounding is 1 s
            return f"{digits(value / unit)} {name}"
    raise AssertionError


def size(count: float) -> str:
    """Three digits and a unit of bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= 0.9995 * unit:
            return f"{digits(count / unit)} {name}"
    return f"{count:.0f} B"


def several(values: list[float]) -> str:
    """Seconds in the unit of the largest: "12.3 + 4.5 ms"."""
    unit = seconds(max(values)).split()[1]
    factor = {"s": 1, "ms": 1e3, "us": 1e6}[unit]
    return " + ".join(digits(value * factor) for value in values) + f" {unit}"


def spread(summary: dict) -> str:
    """median (low to high), seconds."""
    unit = seconds(summary["median"]).split()[1]
    factor = {"s": 1, "ms": 1e3, "us": 1e6}[unit]
    median, low, high = (summary[name] * factor for name in ("median", "low", "high"))
    return f"{digits(median)} {unit} ({digits(low)} to {digits(high)})"


def ratio(summary: dict) -> str:
    return f"{summary['median']:.2f} ({summary['low']:.2f} to {summary['high']:.2f})"


UPDATES = {
    "none": "forward and backward",
    "sgd": "SGD with momentum",
    "sgd-16-bit": "SGD with momentum in 16 bits",
    "sgd-16-bit-plain": "SGD without momentum",
}


def title(case: Case) -> str:
    """A case in words."""
    text = f"{case.name}: {case.margin}, {case.batch} rows, {case.classes:,} classes, "
    text += f"{case.dim} dimensions, centres {case.dtype}"
    if case.rate < 1:
        text += f", {case.sampled:,} classes sampled"
    if case.world > 1:
        text += f", sharded over {case.world} processes"
    return f"{text}, {UPDATES[case.state]}"


def worst_error(row: dict) -> float:
    """Largest relative error of the gate."""
    return max(error for parts in row["gate"]["errors"].values() for error in parts.values())


def by_case(report: dict) -> dict[str, tuple[Case, list[dict]]]:
    """Rows by the name of their case, in order."""
    found: dict[str, tuple[Case, list[dict]]] = {}
    for row in report["rows"]:
        case = from_dict(row["case"])
        found.setdefault(case.name, (case, []))[1].append(row)
    return found


def print_report(console: Console, report: dict) -> None:
    """One table per case; contenders not run are listed below, by reason."""
    idle: dict[str, list[str]] = {}
    for case, rows in by_case(report).values():
        shown = [row for row in rows if row["status"] != "not run"]
        for row in rows:
            if row["status"] == "not run":
                names = idle.setdefault(row["reason"], [])
                if row["contender"] not in names:
                    names.append(row["contender"])
        table = Table(title=title(case), title_justify="left")
        wide = console.width >= WIDE
        for name in _COLUMNS[: None if wide else -2]:
            table.add_column(name, justify="right" if name else "left", overflow="fold")
        for row in shown:
            table.add_row(*_cells(row)[: None if wide else -2])
        console.print(table)
    for reason, names in idle.items():
        console.print(f"not run: {', '.join(names)}: {reason}", highlight=False, markup=False)
    ceilings = report["ceilings"]
    console.print(
        "Step: median (10th to 90th percentile); ratio: turn by turn; peak: beyond persistent "
        "memory; floor: least time by the ceilings of this run, "
        f"{ceilings['flops'] / 1e9:,.0f} GFLOP/s ({ceilings['dtype']} matrix product) and "
        f"{ceilings['bytes'] / 1e9:.1f} GB/s (copy); error: largest in the gate. The canary was "
        f"disturbed {report['canary']['disturbed_share']:.0%} of the times; * marks rows with more "
        "than a quarter of the turns disturbed.",
        highlight=False,
    )


WIDE = 120
_PHASES = ("forward", "backward", "update")
_COLUMNS = (
    *("", "step", "forward, backward, update", "ratio", "peak", "of floor", "error"),
    *("GFLOP/s", "GB/s"),
)


def _cells(row: dict) -> list[str]:
    if row["status"] != "measured":
        return [row["contender"], escape(f"{row['status']}: {row['reason']}"), *[""] * 7]
    summary = row["summary"]
    return [
        row["contender"],
        spread(summary["step"]) + " *" * row["disturbed"],
        several([summary[phase]["median"] for phase in _PHASES if phase in summary]),
        f"{row['ratio']['median']:.2f}" if "ratio" in row else "",
        size(row["peak_bytes"]) if "peak_bytes" in row else "",
        f"{row['share_of_floor']:.0%}",
        f"{worst_error(row):.0e}",
        f"{row['flops_per_s'] / 1e9:.4g}",
        f"{row['bytes_per_s'] / 1e9:.3g}",
    ]
