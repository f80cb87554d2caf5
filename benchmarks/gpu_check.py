"""The check on a GPU: build, tests, then a short benchmark, in one command under ten minutes.

Writes ``benchmarks/results/<gpu>.json``, a report of ``fastmargin bench`` with what became of the
build and the tests beside it. Contenders that are wrong get no time, and what fails or no longer
fits into the time is a row that says so. ``make gpu-check`` runs it.
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

TEST_FILES = ("gpu", "backends", "ops", "margins", "head")
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


def failed(report: dict) -> bool:
    """Whether the build, a test, or a contender of ours failed or was wrong."""
    parts = [report["build"], report["tests"]] if "tests" in report else [report["build"]]
    wrong = ("failed gate", "failed")
    return any(part["status"] != 0 for part in parts) or any(
        row["ours"] and row["status"] in wrong for row in report["rows"]
    )


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9, help="for everything")
    parser.add_argument("--skip-tests", action="store_true", help="benchmark only")
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
    settings = bench.Settings(repeats=10, seconds=5)
    found = benchmark(cases.of_suites(["gpu"]), device, settings, end - RESERVE)
    report = {"provenance": origin, **found, **beside, "backends": fm.backends.available()}
    path = RESULTS / file_name(origin["device"])
    path.write_text(json.dumps(report, indent=1) + "\n")
    print_summary(report, path)
    return int(failed(report))


def print_summary(report: dict, path) -> None:
    """Tables, and the end of what failed."""
    from rich.console import Console

    from benchmarks.report import print_report

    console = Console(width=160)
    for name in ("build", "tests"):
        part = report.get(name)
        if part and part["status"] != 0:
            console.print(part["tail"], markup=False)
        if part:
            console.print(f"{name}: status {part['status']}, {part['seconds']} s")
    print_report(console, report)
    console.print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
