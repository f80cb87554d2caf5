"""The check on a GPU: build, tests, then a short benchmark, in one command under ten minutes.

Writes ``benchmarks/results/<gpu>.json``, updated after each step: a report of ``fastmargin bench``
plus the outcome of build and tests. Contenders with wrong results are not timed; failures, and
cases for which no time is left, become rows with a reason. Each case runs in its own process, so
that a device error costs only that case. ``make gpu-check`` runs it. With ``--tune`` tile shapes
are measured last and written to ``<gpu>_tuned.json``, which is not used automatically.
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
"""Of pytest, with xdist. Each may use about 20 GB in tests of large offsets."""
MOST_FAILURES = 30
TEST_SHARE = 0.5
"""Fraction of the time left after the build that the tests may take."""
RESERVE = 60
"""No case is started in the last seconds."""
CASE_LIMIT = 150
"""Seconds after which a case counts as hanging."""
GRACE = 15
"""Seconds for a command to report its progress after its limit."""
WORKER = (sys.executable, "-m", "benchmarks.one_case")


def run(command: list[str], limit: float) -> dict:
    """Exit status, seconds and the end of the output. Kills all processes that it started."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | str = process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            status = "timeout"
            process.send_signal(signal.SIGINT)  # pytest then lists its failures
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
    """Runs the tests that use kernels. With xdist, a crash is one failure among others."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--maxfail={MOST_FAILURES}"]
    command += ["--continue-on-collection-errors", "-k", SELECTED]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(WORKERS)]
    return command + [f"tests/test_{name}.py" for name in TEST_FILES]


def alone(case, device: str, settings, limit: float) -> dict:
    """Runs a case in its own process; the report, or a single row that says how it ended."""
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
    if not late or limit >= CASE_LIMIT:  # else the time was up
        row |= {"ours": True, "status": "failed"}
    return {"rows": [row]}


def _row(case, reason: str) -> dict:
    row = {"case": asdict(case), "contender": "everybody", "ours": False}
    return row | {"status": "not run", "reason": reason}


def joined(whole: dict, found: dict) -> dict:
    """Merges two reports. Ceilings and settings are those of the first."""
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
    """One report of all cases; crashed cases, and those without time left, become rows that say so.

    end: by ``clock``; no case starts in the last RESERVE seconds. keep: called with each interim
    report.
    """
    whole: dict = {"rows": []}
    for place, case in enumerate(cases):
        if clock() > end - RESERVE:
            whole = joined(whole, {"rows": [_row(case, "no time left")]})
            continue
        # once is enough, and it is not tried after two cases
        wanted = settings.accuracy and place < 2 and not whole.get("accuracy")
        limit = min(CASE_LIMIT, end - GRACE - clock())
        whole = joined(whole, alone(case, device, replace(settings, accuracy=wanted), limit))
        keep(whole)
    return whole


def file_name(gpu: str) -> str:
    """Name of the results file: letters and digits of the GPU's name."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def write(path: Path, report: dict) -> None:
    """Writes atomically: the file is complete whenever the program ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def tuning(cases, seconds: float, table) -> list[list[str]]:
    """Commands that tune each width of the suite, in ``seconds`` altogether.

    Each on the median problem of its width, since tiles are chosen by width, not by rows and
    classes.
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
        commands.append([sys.executable, "-m", "fastmargin", "tune", *map(str, options)])
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
    add("--minutes", type=float, default=9, help="for everything together")
    add("--skip-tests", action="store_true", help="benchmark only")
    add("--tune", type=float, default=0, metavar="SECONDS", help="then measure tile shapes so long")
    add("--output", type=Path, default=RESULTS, help="a .json file for the report, or a folder")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check needs a CUDA device, and torch sees none")
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
    # imported after the build, whose results they load
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
    """Prints tables, and the end of failures' output."""
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
    else:  # no case was completed
        console.print_json(data=report["rows"])
    console.print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
