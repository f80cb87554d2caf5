"""Writes the tables of README.md and docs, and the plots, from committed reports.

    python -m benchmarks.publish           (make docs)
    python -m benchmarks.publish --check   exits with 1 if something is out of date

Replaces the text between ``<!-- bench: name -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import RESULTS, ROOT
from benchmarks.bench import SCHEMA
from benchmarks.cases import CASES, Case
from benchmarks.glyphs import pages as glyph_pages
from benchmarks.markdown import NOT_YET, table
from benchmarks.report import by_case, seconds, several, size, spread, title, worst_error

PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "data", "glyphs", "migrating")),
)
PICTURES = ROOT / "docs" / "benchmarks"
BLOCK = re.compile(r"(<!-- bench: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADLINES = ("arc-200k", "pfc-1m-r0.1")
"""Cases shown in README."""
GLYPHS = "glyphs_cpu"
ONE_BIT = "glyphs_one_bit_cpu"
MANY_GLYPHS = "glyphs_19k_cpu"
PHASES = ("forward", "backward", "update")


def reports() -> dict[str, dict]:
    """Committed reports of ``fastmargin bench`` by the stem of their file."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    return {name: report for name, report in found.items() if report.get("schema") == SCHEMA}


def committed(name: str) -> dict | None:
    """A results file by its stem, or None."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


# ---- README ----


def share(value: float) -> str:
    """Two decimals, or one significant digit if below 0.01."""
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def headlines(found: dict[str, dict]) -> str:
    """The cases of HEADLINES, plain PyTorch beside fastmargin."""
    rows, where = [], []
    for report in found.values():
        for name, (case, own) in by_case(report).items():
            measured = [row for row in own if row["status"] == "measured"]
            ours = next((row for row in measured if row["ours"]), None)
            base = next(
                (row for row in measured if row.get("ratio", {}).get("to") == row["contender"]),
                None,
            )
            if name not in HEADLINES or ours is None or base is None:
                continue
            where.append(report["provenance"]["device"])
            compiled = next(
                (row for row in measured if row["contender"] == f"{base['contender']}, compiled"),
                None,
            )
            words = title(case).partition(": ")[2]
            times = [
                seconds(row["summary"]["step"]["median"]) if row else ""
                for row in (base, compiled, ours)
            ]
            rows.append([f"{words}: time of a step", *times, share(ours["ratio"]["median"])])
            if "peak_bytes" in ours and "peak_bytes" in base:
                peaks = [
                    size(row["peak_bytes"]) if row and "peak_bytes" in row else ""
                    for row in (base, compiled, ours)
                ]
                fraction = share(ours["peak_bytes"] / base["peak_bytes"])
                rows.append(["extra peak memory of a step", *peaks, fraction])
    if not rows:
        return f"{NOT_YET}: `make results` takes the numbers and writes this table.\n"
    head = ["", "plain PyTorch, eager", "torch.compile", "fastmargin", "ratio to eager"]
    return (
        f"On {where[0]}, in one run, taking turns. Plain PyTorch is our own implementation of "
        f"insightface's operations:\n\n{table(head, rows)}\n"
    )


def sampling() -> str:
    """Results of benchmarks/sampling.py."""
    found = committed("sampling_cpu")
    if found is None:
        return f"{NOT_YET}: `python -m benchmarks.sampling`.\n"
    rows = []
    for case in found["cases"]:
        both = case["seconds_median"]
        rows.append(
            [
                f"{case['classes']:,}",
                *(f"{1e3 * both[name]:.1f} ms" for name in ("partial_fc", "sampler")),
                f"{case['time_ratio_median']:.3f}",
            ]
        )
    head = [f"{found['sampled']:,} sampled of", "rand, topk, sort", "fastmargin", "ratio"]
    machine = found["machine"]
    return f"{table(head, rows)}\n\nOn {machine['cpu']}, {machine['threads']} thread.\n"


def dropins() -> str:
    """Results of benchmarks/dropins.py."""
    found = committed("dropins_cpu")
    if found is None:
        return f"{NOT_YET}: `python -m benchmarks.dropins`.\n"
    body = []
    for row in found["rows"]:
        if row["status"] != "measured":
            body.append([row["dropin"], row["status"], "", "", "", ""])
            continue
        times, peaks = row["seconds"], row["peak_bytes_beyond_gradient"]
        body.append(
            [
                row["dropin"],
                *(seconds(times[name]["median"]) for name in ("faithful", "default")),
                f"{row['ratio']['median']:.2f}",
                *(size(peaks[name]) for name in ("faithful", "default")),
            ]
        )
    head = ["", "original's operations", "default", "ratio", "peak, original's", "default"]
    case, where = found["case"], found["device"]
    return (
        f"{table(head, body)}\n\nForward and backward in float32, {case['batch']} rows, "
        f"{case['classes']:,} classes, {case['dim']} dimensions; peak memory beyond the gradient "
        f"of the centres. On {where}, {found['date'][:10]}, `{found['command']}`.\n"
    )


READING = {
    "in_file_order": "all, in the order of the file",
    "random_batches": "batches at random",
    "first_labels": "labels alone",
    "scan": "scan of a file without an index",
}
"""In-memory tasks of benchmarks/record_reading.py."""


def record_reading() -> str:
    """Results of benchmarks/record_reading.py: both readers, and both orders."""
    found = committed("record_reading")
    if found is None:
        return f"{NOT_YET}: `python -m benchmarks.record_reading`.\n"

    def line(words: str, measured: dict, *names: str) -> list[str]:
        rates = measured["records_per_second"]
        ratio = f"{measured['time_ratio_median']:.2f}"
        return [words, *(f"{float(f'{rates[name]:.3g}'):,.0f}/s" for name in names), ratio]

    memory = table(
        ["from memory", "in Python", "compiled", "ratio of times"],
        [
            line(words, found["from_memory"][task], "python", "compiled")
            for task, words in READING.items()
        ],
    )
    cold = found["from_disk"]
    order = f"blocks of {cold['block']}, window of {cold['window']:,}"
    disk = table(
        ["cold, compiled reader", "full shuffle", "`BlockShuffleSampler`", "ratio of times"],
        [line(order, cold, "random_batches", "block_shuffle")],
    )
    threads = found["machine"]["threads"]
    return (
        f"{memory}\n\n{disk}\n\nRecords a second, of {found['records']:,} with "
        f"{found['mean_bytes']:,} bytes on average, in batches of {found['batch']}; no image is "
        f"decoded. On {found['machine']['cpu']}, {threads} thread{'s' * (threads > 1)}, "
        f"{found['date'][:10]}, `{found['command']}`.\n"
    )


# ---- docs/glyphs.md ----


def glyphs() -> str:
    """Results of benchmarks/glyphs: plots, accuracies, curves and costs."""
    found = committed(GLYPHS)
    if found is None:
        return f"{NOT_YET}: `python -m benchmarks.glyphs`.\n"
    pictures = [
        f"![{picture.stem}](benchmarks/{GLYPHS}/{picture.name})" for picture in _pictures(GLYPHS)
    ]
    parts = [
        f"{glyph_pages.origin(found)}, [{GLYPHS}.json](../benchmarks/results/{GLYPHS}.json).",
        *pictures,
        "Accuracies, plain / fastmargin:",
        glyph_pages.accuracies(found),
        glyph_pages.differences(found),
        "Curves and costs, plain / fastmargin:",
        glyph_pages.costs(found),
        glyph_pages.curves(found),
    ]
    return "\n\n".join(parts) + "\n"


def many_glyphs() -> str:
    """Accuracies and costs with ten times as many classes."""
    found = committed(MANY_GLYPHS)
    if found is None:
        return f"{NOT_YET}: `python -m benchmarks.glyphs --classes 19000`.\n"
    where = f"[{MANY_GLYPHS}.json](../benchmarks/results/{MANY_GLYPHS}.json)"
    tables = glyph_pages.accuracies(found), glyph_pages.costs(found)
    return "\n\n".join((f"{glyph_pages.origin(found)}, {where}.", *tables)) + "\n"


def glyphs_summary() -> str:
    """Summary of :func:`glyphs`."""
    found = committed(GLYPHS)
    if found is None:
        return f"{NOT_YET}: `python -m benchmarks.glyphs`.\n"
    return glyph_pages.summary(found) + "\n"


def glyphs_rounding() -> str:
    """How much rounding alone changes accuracies."""
    found = committed(ONE_BIT)
    if found is None:
        return f"{NOT_YET}: `python -m benchmarks.glyphs --one-bit`.\n"
    where = f"[{ONE_BIT}.json](../benchmarks/results/{ONE_BIT}.json)"
    commit = found["commit"][:10]
    return f"{glyph_pages.rounding(found)}\n\nCommit {commit}, `{found['command']}`, {where}.\n"


# ---- docs/benchmarks.md ----


def results(found: dict[str, dict]) -> str:
    """A section per report: its provenance, plots, and a table per case."""
    if not found:
        return f"{NOT_YET}: `make results`.\n"
    return "\n".join(_section(name, report) for name, report in found.items())


def _section(name: str, report: dict) -> str:
    origin, ceilings = report["provenance"], report["ceilings"]
    dirty = " with uncommitted changes" if origin["uncommitted_changes"] else ""
    lines = [
        f"### {origin['device']}\n",
        f"torch {origin['versions']['torch']}, commit {origin['commit'][:10]}{dirty}, "
        f"{origin['date'][:10]}, `{origin['command']}`, "
        f"[{name}.json](../benchmarks/results/{name}.json). Ceilings of this run: "
        f"{ceilings['flops'] / 1e9:,.0f} GFLOP/s ({ceilings['dtype']} matrix product), "
        f"{ceilings['bytes'] / 1e9:.1f} GB/s (copy). The canary was disturbed "
        f"{report['canary']['disturbed_share']:.0%} of the times.\n",
    ]
    for picture in _pictures(name):
        lines.append(f"![{picture.stem}](benchmarks/{name}/{picture.name})\n")
    for case, rows in by_case(report).values():
        lines += [f"**{title(case)}**\n", case_table(rows), ""]
    idle = {
        (row["contender"], row["reason"]) for row in report["rows"] if row["status"] == "not run"
    }
    if idle:
        lines.append("Not run:\n")
        lines += [f"- {name}: {reason}" for name, reason in sorted(idle)]
        lines.append("")
    return "\n".join(lines)


def case_table(rows: list[dict]) -> str:
    """The table of one case; contenders not run are listed below all tables."""
    head = ["", "step", "forward, backward, update", "ratio", "peak", "of floor", "error"]
    body = []
    for row in rows:
        if row["status"] == "not run":
            continue
        if row["status"] != "measured":
            reason = re.sub(r"\s+", " ", row["reason"]).replace("|", "/")
            body.append([row["contender"], f"{row['status']}: {reason}", *[""] * 5])
            continue
        summary = row["summary"]
        body.append(
            [
                row["contender"],
                spread(summary["step"]) + " \\*" * row["disturbed"],
                several([summary[phase]["median"] for phase in PHASES if phase in summary]),
                f"{row['ratio']['median']:.2f}" if "ratio" in row else "",
                size(row["peak_bytes"]) if "peak_bytes" in row else "",
                f"{row['share_of_floor']:.0%}",
                f"{worst_error(row):.0e}",
            ]
        )
    return table(head, body)


def peers() -> str:
    """Settings and limits of all contenders."""
    import torch

    from benchmarks.contenders import everybody

    takers = {}
    for device in ("cpu", "cuda"):
        takers |= {taker.name: taker for taker in everybody(torch.device(device))}
    rows = [[taker.name, taker.computes, taker.settings, taker.limits] for taker in takers.values()]
    lines = [["", "computes in", "settings", "limits"], ["---"] * 4, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def not_measured(found: dict[str, dict]) -> str:
    """Cases that no committed report contains."""
    have = {row["case"]["name"] for report in found.values() for row in report["rows"]}
    missing = [case for case in CASES if case.name not in have and "smoke" not in case.suites]
    if not missing:
        return "Every case of the table has a committed result.\n"
    return "".join(f"- {_listed(case)}\n" for case in missing)


def _listed(case: Case) -> str:
    return f"suite `{case.suites[0]}`, {title(case)}"


# ---- writing ----


def blocks() -> dict[str, str]:
    """Text by block name."""
    found = reports()
    return {
        "headlines": headlines(found),
        "sampling": sampling(),
        "dropins": dropins(),
        "record-reading": record_reading(),
        "glyphs": glyphs(),
        "glyphs-many": many_glyphs(),
        "glyphs-summary": glyphs_summary(),
        "glyphs-rounding": glyphs_rounding(),
        "results": results(found),
        "peers": peers(),
        "not-measured": not_measured(found),
    }


def documents() -> Iterator[tuple[Path, str]]:
    """Each page and its up-to-date text.

    Raises:
        KeyError: a page has a block that is not made here.
    """
    made = blocks()
    for page in PAGES:
        yield page, BLOCK.sub(lambda hit: hit[1] + made[hit[2]] + hit[3], page.read_text())


def drawn() -> Iterator[tuple[str, dict, dict]]:
    """Folder of plots, the report they show, and the plots by name."""
    from benchmarks import plots
    from benchmarks.glyphs.plots import PICTURES as OF_GLYPHS

    for name, report in reports().items():
        yield name, report, plots.PICTURES
    found = committed(GLYPHS)
    if found is not None:
        yield GLYPHS, found, OF_GLYPHS


def _pictures(name: str) -> list[Path]:
    return sorted((PICTURES / name).glob("*.svg"))


def pictures_match(name: str, report: dict) -> bool:
    """Whether the committed plots were drawn from this report."""
    from benchmarks.plots import digest

    found = _pictures(name)
    return bool(found) and all(digest(report) in path.read_text() for path in found)


def stale() -> list[str]:
    """Pages and plots that are out of date."""
    found = [str(page.relative_to(ROOT)) for page, text in documents() if page.read_text() != text]
    for name, report, _ in drawn():
        if not pictures_match(name, report):
            found.append(f"docs/benchmarks/{name}")
    return found


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        for what in (found := stale()):
            print(f"out of date: {what}; run make docs", file=sys.stderr)
        return int(bool(found))
    from benchmarks import plots

    for name, report, pictures in drawn():
        plots.draw(report, PICTURES / name, ("svg",), pictures)
    for page, text in documents():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
