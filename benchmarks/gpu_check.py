"""The check on a GPU: build, tests, then a short benchmark, in one command under ten minutes.

Writes ``benchmarks/results/<gpu>.json``, anew after every step: a report of ``fastmargin bench``
with what became of build and tests beside it. Contenders that are wrong get no time, and what fails
or no longer fits into the time is a row that says so. Every case is a process of its own, so that
a device in disorder costs that case alone. ``make gpu-check`` runs it. With ``--tune`` tile shapes
are measured last, and ``<gpu>_tuned.json`` is their table, which nothing uses.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks import RESULTS, ROOT

TEST_FILES = ("gpu", "rounding", "backends", "ops", "margins", "head")
TEST_FILES += ("sampling", "hinge_loss", "row_normals")
SELECTED = "triton or cuda or gpu"
WORKERS = 6
"""Of pytest, where xdist is there. Each may hold some 20 GB in tests of large offsets."""
MOST_FAILURES = 30
TEST_SHARE = 0.5
"""Of the time that the build leaves, for the tests."""
RESERVE = 60
"""Seconds at the end: no case is begun in them."""
CASE_LIMIT = 150
"""Seconds after which a case is held to hang."""
GRACE = 15
"""Seconds that a command has to say how far it came, after its limit."""
WORKER = (sys.executable, "-m", "benchmarks.one_case")


def run(command: list[str], limit: float) -> dict:
    """Exit status, seconds and the end of the output. Nothing that it started outlives it."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | str = process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            status = "timeout"
            process.send_signal(signal.SIGINT)  # pytest then lists what has failed
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        tail = output.read()[-3000 if status == 0 else -30_000 :]
    return {
        "command": " ".join(command[1:]),
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "tail": tail,
    }


def test_command() -> list[str]:
    """Of the tests that have a kernel to run. One that dies is one failure among others."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--maxfail={MOST_FAILURES}"]
    command += ["--continue-on-collection-errors", "-k", SELECTED]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(WORKERS)]
    return command + [f"tests/test_{name}.py" for name in TEST_FILES]


def alone(case, device: str, settings, limit: float) -> dict:
    """The report of one case out of its own process; a row alone that tells how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        words = json.dumps(asdict(case)), device, json.dumps(asdict(settings)), str(file)
        done = run([*WORKER, *words], limit)
        if file.exists():
            return json.loads(file.read_text())
    late, at = done["status"] == "timeout", re.findall("^at (.+)", done["tail"], re.MULTILINE)
    ended = f"was stopped after {limit:.0f} s" if late else f"ended with {done['status']}"
    at, end = at[-1] if at else "its start", " ".join(done["tail"].split())[-300:]
    row = _row(case, f"its process {ended} at {at}: {end}")
    if not late or limit >= CASE_LIMIT:  # less was the end of the time
        row |= {"ours": True, "status": "failed"}
    return {"rows": [row]}


def _row(case, reason: str) -> dict:
    row = {"case": asdict(case), "contender": "everybody", "ours": False}
    return row | {"status": "not run", "reason": reason}


def joined(whole: dict, found: dict) -> dict:
    """Two reports as one. Ceilings and settings are those of the first."""
    rows = whole["rows"] + found["rows"]
    if "schema" not in whole or "schema" not in found:
        return whole | found | {"rows": rows}
    both = whole["canary"], found["canary"]
    seconds = [one for part in both for one in part["seconds"]]
    disturbed = sum(part["disturbed_share"] * len(part["seconds"]) for part in both)
    canary = {"seconds": seconds, "disturbed_share": disturbed / len(seconds)}
    accuracy = whole["accuracy"] or found["accuracy"]
    return whole | {"rows": rows, "canary": canary, "accuracy": accuracy}


def benchmark(
    cases, device: str, settings, end: float, keep: Callable[[dict], None], clock=time.monotonic
) -> dict:
    """One report of case after case; rows of those that died, or that time is up for, say so.

    end: by the clock; no case is begun in the last RESERVE seconds. keep: gets what is there.
    """
    whole: dict = {"rows": []}
    for place, case in enumerate(cases):
        if clock() > end - RESERVE:
            whole = joined(whole, {"rows": [_row(case, "no time left")]})
            continue
        # once is enough, and what two cases die of is not tried again
        wanted = settings.accuracy and place < 2 and not whole.get("accuracy")
        limit = min(CASE_LIMIT, end - GRACE - clock())
        whole = joined(whole, alone(case, device, replace(settings, accuracy=wanted), limit))
        keep(whole)
    return whole


def file_name(gpu: str) -> str:
    """Of the results: letters and digits of the GPU's name."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def write(path: Path, report: dict) -> None:
    """The file is whole whenever the program ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


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
    parts = [report[name] for name in ("build", "tests") if name in report]
    parts += report.get("tune", [])
    wrong = ("failed gate", "failed")
    return any(part["status"] != 0 for part in parts) or any(
        row["ours"] and row["status"] in wrong for row in report["rows"]
    )


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=9, help="for everything")
    add("--skip-tests", action="store_true", help="benchmark only")
    add(
        "--tune", type=float, default=0, metavar="SECONDS", help="measure tile shapes so long, last"
    )
    add("--output", type=Path, default=RESULTS, help="the report, a .json, or a folder for it")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check needs a CUDA device; there is none here")
    end = time.monotonic() + 60 * options.minutes - options.tune
    path = options.output.absolute()
    if path.suffix != ".json":
        path = path / file_name(torch.cuda.get_device_name())
    report: dict = {"rows": []}

    def keep(found: dict) -> None:
        report.update(found)
        write(path, report)

    keep({"build": run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 240)})
    if not options.skip_tests:
        keep({"tests": run(test_command(), (end - time.monotonic()) * TEST_SHARE)})
    # after the build, which these load
    import fastmargin as fm
    from benchmarks import bench, cases, provenance

    origin = provenance.provenance("make gpu-check", torch.device("cuda"))
    keep({"provenance": origin, "backends": fm.backends.available()})
    settings = bench.Settings(repeats=10, seconds=5, rounds=1)
    suite = cases.of_suites(["gpu"])
    keep(benchmark(suite, "cuda", settings, end, keep))
    if options.tune:
        commands = tuning(suite, options.tune, path.with_stem(path.stem + "_tuned"))
        limit = options.tune / len(commands) + RESERVE
        for command in commands:
            keep({"tune": [*report.get("tune", []), run(command, limit)]})
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
    if "ceilings" in report:
        print_report(console, report)
    else:  # no case came to its end
        console.print_json(data=report["rows"])
    console.print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
