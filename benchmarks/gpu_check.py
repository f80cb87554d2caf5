"""The check on a GPU: build, tests, then a short benchmark, in one command under ten minutes.

Writes ``benchmarks/results/<gpu>.json``, a report of ``fastmargin bench`` with what became of the
build and the tests beside it. Contenders that are wrong get no time, and what fails or no longer
fits into the time is a row that says so. ``make gpu-check`` runs it. With ``--tune`` tile shapes
are measured last, and ``benchmarks/results/<gpu>_tuned.json`` is their table, which nothing uses.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace

from benchmarks import RESULTS, ROOT

TEST_FILES = ("gpu", "rounding", "backends", "ops", "margins", "head")
TEST_FILES += ("sampling", "hinge_loss", "row_normals")
TEST_SHARE = 0.5
"""Of the time that the build leaves, for the tests."""
RESERVE = 60
"""Seconds at the end: no case is begun in them."""


def run(command: list[str], limit: float) -> dict:
    """Exit status, seconds and the end of the output."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(limit, 1)
        )
        status, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        status, output = "timeout", str(late.stdout or "")
    return {
        "command": " ".join(command[1:]),
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "tail": output[-3000:],
    }


def benchmark(cases, device, settings, deadline: float, clock=time.monotonic) -> dict:
    """One report of case after case until the deadline; rows of the rest say that time was up."""
    from benchmarks import bench

    whole: dict = {}
    late = []
    for case in cases:
        if whole and clock() > deadline:
            late.append(case)
            continue
        found = bench.run([case], device, settings)
        if not whole:
            whole = found
            settings = replace(settings, accuracy=False)  # once is enough
        else:
            whole["rows"] += found["rows"]
            whole["canary"]["seconds"] += found["canary"]["seconds"]
    for case in late:
        row = {"case": asdict(case), "contender": "everybody", "ours": False}
        whole["rows"].append(row | {"status": "not run", "reason": "no time left"})
    return whole


def file_name(gpu: str) -> str:
    """Of the results: letters and digits of the GPU's name."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def tuning(cases, seconds: float, table) -> list[list[str]]:
    """Commands that tune for each width of the suite, in so many seconds altogether.

    On the middle one of its problems: a tile is chosen by the width, not by rows and classes.
    """
    from fastmargin.backends.triton.tuned import KERNELS

    widths: dict[int, list] = {}
    for case in cases:
        if case.rate == 1 and case.dtype == "float32":
            widths.setdefault(case.dim, []).append(case)
    commands = []
    for dim, own in widths.items():
        own.sort(key=lambda case: (case.batch * case.classes, case.name))
        case = own[(len(own) - 1) // 2]
        each = max(1.0, seconds / (len(widths) * len(KERNELS)))
        shape = ["--dim", dim, "--batch", case.batch, "--classes", case.classes]
        options = [*shape, "--seconds", f"{each:.0f}", "--output", table]
        commands.append([sys.executable, "-m", "fastmargin.cli", "tune", *map(str, options)])
    return commands


def failed(report: dict) -> bool:
    """Whether the build, a test, tuning, or a contender of ours failed or was wrong."""
    parts = [report["build"], *report.get("tune", [])]
    parts += [report["tests"]] if "tests" in report else []
    wrong = ("failed gate", "failed")
    return any(part["status"] != 0 for part in parts) or any(
        row["ours"] and row["status"] in wrong for row in report["rows"]
    )


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9, help="for everything")
    parser.add_argument("--skip-tests", action="store_true", help="benchmark only")
    parser.add_argument(
        "--tune",
        type=float,
        default=0,
        metavar="SECONDS",
        help="measure tile shapes in so many seconds of them, and leave their table beside the"
        " results, not in use",
    )
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check needs a CUDA device; there is none here")
    end = time.monotonic() + 60 * options.minutes
    beside = {"build": run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 240)}
    if not options.skip_tests:
        files = [f"tests/test_{name}.py" for name in TEST_FILES]
        beside["tests"] = run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton or cuda or gpu", *files],
            (end - time.monotonic()) * TEST_SHARE,
        )
    # after the build, which these load
    import fastmargin as fm
    from benchmarks import bench, cases, provenance

    device = torch.device("cuda")
    origin = provenance.provenance("make gpu-check", device)
    settings = bench.Settings(repeats=10, seconds=5, rounds=1)
    suite = cases.of_suites(["gpu"])
    found = benchmark(suite, device, settings, end - RESERVE - options.tune)
    path = RESULTS / file_name(origin["device"])
    if options.tune:
        torch.cuda.empty_cache()  # for the other process
        table = path.with_stem(path.stem + "_tuned")
        commands = tuning(suite, options.tune, table)
        limit = options.tune / len(commands) + RESERVE
        beside["tune"] = [run(command, limit) for command in commands]
    report = {"provenance": origin, **found, **beside, "backends": fm.backends.available()}
    path.write_text(json.dumps(report, indent=1) + "\n")
    print_summary(report, path)
    return int(failed(report))


def print_summary(report: dict, path) -> None:
    """Tables, and the end of what failed."""
    from rich.console import Console

    from benchmarks.report import print_report

    console = Console(width=160)
    parts = [(name, report[name]) for name in ("build", "tests") if name in report]
    parts += [("tune", part) for part in report.get("tune", [])]
    for name, part in parts:
        if part["status"] != 0 or name == "tune":
            console.print(part["tail"], markup=False)
        console.print(f"{name}: status {part['status']}, {part['seconds']} s")
    print_report(console, report)
    console.print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
