"""gpu-check as far as it goes without a GPU: time runs out, cases die, failures are told."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import ROOT, bench, gpu_check, plots, provenance, publish, report
from benchmarks.cases import Case

CASES = [Case(f"c{place}", 4, 10, 8) for place in range(4)]
QUICK = bench.Settings(
    repeats=3, seconds=1, rounds=1, only=("fastmargin cpu fp32",), memory=False, small_ceilings=True
)


def part(case, accuracy=False):
    """Of a report, as the process of a case gives it."""
    row = {"case": vars(case), "contender": "x", "ours": True, "status": "measured"}
    canary = {"seconds": [1.0], "disturbed_share": 0.0}
    errors = [{"contender": "x"}] if accuracy else []
    return {"schema": 1, "rows": [row], "canary": canary, "accuracy": errors}


def test_cases_beyond_the_deadline_are_rows(monkeypatch):
    now, asked, kept = [0.0], [], []

    def alone(case, device, settings, limit):
        now[0] += 10
        asked.append((settings.accuracy, limit))
        return part(case, settings.accuracy)

    monkeypatch.setattr(gpu_check, "alone", alone)
    end = gpu_check.RESERVE + 15
    found = gpu_check.benchmark(
        CASES, "cpu", bench.Settings(), end, lambda so_far: kept.append(so_far), lambda: now[0]
    )
    assert [row["status"] for row in found["rows"]] == ["measured"] * 2 + ["not run"] * 2
    assert asked == [(True, end - gpu_check.GRACE), (False, end - 10 - gpu_check.GRACE)]
    assert len(found["canary"]["seconds"]) == 2 and len(found["accuracy"]) == 1
    assert [row["case"]["name"] for row in found["rows"]] == ["c0", "c1", "c2", "c3"]
    assert [len(so_far["rows"]) for so_far in kept] == [1, 2]


def test_errors_by_gap_are_asked_of_two_cases_at_most(monkeypatch):
    asked = []

    def alone(case, device, settings, limit):
        asked.append(settings.accuracy)
        return {"rows": []} if settings.accuracy else part(case)

    monkeypatch.setattr(gpu_check, "alone", alone)
    gpu_check.benchmark(CASES, "cpu", bench.Settings(), 1e4, lambda so_far: None, lambda: 0.0)
    assert asked == [True, True, False, False]


def test_reports_are_joined():
    dead = {"rows": [gpu_check._row(CASES[0], "died")]}
    one, two = part(CASES[1]), part(CASES[2], accuracy=True)
    two["canary"] = {"seconds": [2.0, 3.0, 4.0], "disturbed_share": 1.0}
    found = gpu_check.joined(gpu_check.joined({"rows": []}, dead), one)
    assert found["schema"] == 1 and found["canary"] == one["canary"]
    found = gpu_check.joined(gpu_check.joined(found, two), dead)
    assert [row["case"]["name"] for row in found["rows"]] == ["c0", "c1", "c2", "c0"]
    assert found["canary"] == {"seconds": [1.0, 2.0, 3.0, 4.0], "disturbed_share": 0.75}
    assert found["accuracy"] == two["accuracy"]


@pytest.mark.slow
def test_a_case_that_dies_costs_that_case(monkeypatch, tmp_path):
    """Real processes: each way to die is a row, and the file has what there is after each."""
    script = tmp_path / "spoilt.py"
    script.write_text(
        "import os, sys, time\n"
        "from benchmarks import bench, one_case\n"
        "real = bench.run\n"
        "def run(cases, device, settings, tell):\n"
        "    name = cases[0].name\n"
        "    tell(f'{name}: work')\n"
        "    if name == 'exits': os._exit(7)\n"
        "    if name == 'raises': raise RuntimeError('an illegal access')\n"
        "    if name == 'sleeps': time.sleep(600)\n"
        "    return real(cases, device, settings, tell)\n"
        "bench.run = run\n"
        "one_case.main(*sys.argv[1:])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(gpu_check, "WORKER", (sys.executable, str(script)))
    monkeypatch.setattr(gpu_check, "GRACE", 2)
    limits = {"sleeps": 20}
    alone = gpu_check.alone
    monkeypatch.setattr(
        gpu_check, "alone", lambda case, *rest: alone(case, *rest[:-1], limits.get(case.name, 300))
    )
    names = ("exits", "fine", "raises", "sleeps")
    cases = [Case(name, 8, 60, 16) for name in names]
    file, sizes = tmp_path / "deep" / "found.json", []

    def keep(found):
        gpu_check.write(file, found)
        sizes.append(len(json.loads(file.read_text())["rows"]))

    found = gpu_check.benchmark(cases, "cpu", QUICK, 1e9, keep)
    assert sizes == [1, 2, 3, 4] and [one.name for one in file.parent.iterdir()] == [file.name]
    assert json.loads(file.read_text()) == json.loads(json.dumps(found))
    rows = {row["case"]["name"]: row for row in found["rows"]}
    assert list(rows) == list(names)
    assert rows["fine"]["status"] == "measured" and found["schema"] == bench.SCHEMA
    assert found["accuracy"], "of the second case, since the first one died"
    assert rows["exits"]["status"] == rows["raises"]["status"] == "failed"
    assert "ended with 7 at exits: work" in rows["exits"]["reason"]
    assert "an illegal access" in rows["raises"]["reason"]
    # its time was shorter than that of a case, so it is nobody's failure
    assert rows["sleeps"]["status"] == "not run"
    assert "was stopped after 20 s at sleeps: work" in rows["sleeps"]["reason"]
    fine = {"status": 0}
    assert gpu_check.failed({"build": fine, **found})
    assert not gpu_check.failed({"build": fine, "rows": [rows["fine"], rows["sleeps"]]})

    console = Console(width=200, record=True, file=io.StringIO())
    report.print_report(console, found)
    assert "an illegal access" in console.export_text()
    assert "an illegal access" in publish.case_table(found["rows"])
    plots.draw({**found, "provenance": {"device": "x"}}, tmp_path / "pictures", ("svg",))


def test_a_case_that_hangs_is_a_failure(monkeypatch):
    late = {"status": "timeout", "tail": "at a gate\nat times of x\n"}
    monkeypatch.setattr(gpu_check, "run", lambda command, limit: late)
    (row,) = gpu_check.alone(CASES[0], "cpu", QUICK, gpu_check.CASE_LIMIT)["rows"]
    assert row["status"] == "failed" and row["ours"] and "s at times of x: " in row["reason"]


@pytest.mark.parametrize("output", ["folder", "own.json"])
def test_what_is_known_is_written_after_every_step(monkeypatch, tmp_path, output):
    """Whatever ends the program: here it is interrupted in the second case."""
    file = tmp_path / output / ("a_gpu.json" if output == "folder" else "")
    known, commands = [], []

    def known_now():
        known.append(set(json.loads(file.read_text())) if file.exists() else set())

    def run(command, limit):
        known_now()
        commands.append(command)
        return {"status": 0, "seconds": 1.0, "tail": "", "command": ""}

    def alone(case, device, settings, limit):
        known_now()
        if len(known) == 4:
            raise KeyboardInterrupt
        return part(case)

    for place, name, stand_in in (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_name", lambda: "A GPU"),
        (provenance, "provenance", lambda command, device: {"device": "A GPU"}),
        (gpu_check, "run", run),
        (gpu_check, "alone", alone),
    ):
        monkeypatch.setattr(place, name, stand_in)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--output", str(tmp_path / output)])
    assert known[:2] == [set(), {"rows", "build"}]
    assert known[2] == known[1] | {"tests", "provenance", "backends"}
    assert known[3] > known[2] | {"schema", "canary"}
    found = json.loads(file.read_text())
    assert [row["case"]["name"] for row in found["rows"]] == ["gpu-100k"]
    assert "build_ext" in commands[0] and commands[1] == gpu_check.test_command()


def test_verdict():
    fine = {"status": 0}
    row = {"ours": True, "status": "measured"}
    report = {"build": fine, "tests": fine, "rows": [row]}
    assert not gpu_check.failed(report)
    assert gpu_check.failed(report | {"tests": {"status": 1}})
    assert gpu_check.failed(report | {"build": {"status": "timeout"}})
    assert gpu_check.failed(report | {"rows": [row, row | {"status": "failed gate"}]})
    assert gpu_check.failed(report | {"tune": [fine, {"status": "timeout"}]})
    assert not gpu_check.failed(report | {"tune": [fine]})
    peer = row | {"ours": False, "status": "failed"}
    assert not gpu_check.failed({"build": fine, "rows": [peer, row | {"status": "out of memory"}]})


def test_commands_have_a_limit(monkeypatch):
    done = gpu_check.run([sys.executable, "-c", "print('told')"], 60)
    assert done["status"] == 0 and done["tail"] == "told\n"
    asleep = "import time\nprint('begun', flush=True)\ntime.sleep(60)"
    late = gpu_check.run([sys.executable, "-c", asleep], 2)
    assert late["status"] == "timeout" and late["seconds"] < 30
    assert late["tail"].startswith("begun\n") and "KeyboardInterrupt" in late["tail"]
    deaf = f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{asleep}"
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    assert gpu_check.run([sys.executable, "-c", deaf], 2)["seconds"] < 30
    assert gpu_check.file_name("NVIDIA H200 (SXM)") == "nvidia_h200_sxm.json"
    for name in gpu_check.TEST_FILES:
        assert (ROOT / "tests" / f"test_{name}.py").exists()


def test_nothing_outlives_a_command():
    """Workers of what was stopped, or has died, would stay on the device."""
    child = "import time; time.sleep(600)"
    for after in ("", "; time.sleep(600)"):
        code = "import subprocess, sys, time"
        code += f"; p = subprocess.Popen([sys.executable, '-c', {child!r}])"
        code += f"; print(p.pid, flush=True){after}"
        done = gpu_check.run([sys.executable, "-c", code], 3)
        state = Path("/proc") / re.match(r"\d+", done["tail"])[0] / "stat"
        deadline = time.monotonic() + 20
        while state.exists() and state.read_text().split()[2] not in "ZX":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_what_tests_are_chosen():
    """All that have a kernel to run, whatever they are called, and not those of the CPU alone."""
    command = gpu_check.test_command()
    assert "-x" not in command and any(word.startswith("--maxfail=") for word in command)
    workers = ["-n", str(gpu_check.WORKERS)]
    assert workers == command[command.index("-n") :][:2]  # xdist is here
    command = [word for word in command if word not in workers] + ["--collect-only"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    chosen = set(re.findall(r"::(\w+)", done.stdout))
    for file in gpu_check.TEST_FILES:
        text = (ROOT / "tests" / f"test_{file}.py").read_text()
        for name, body in re.findall(r"\ndef (test_\w+)\((.*?)(?=\n\S|\Z)", text, re.DOTALL):
            if re.search(r'(device_for|low_head)\(\s*"(triton|cuda)"', body):
                assert name in chosen, name
    assert {"test_low_precision_operands", "test_runs_on_the_current_stream"} <= chosen
    assert not {"test_bad_input", "test_npt_formula_and_zero_slot"} & chosen
    assert "[cpu" not in done.stdout and "reference" not in done.stdout


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    assert provenance.git("rev-parse", "HEAD")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git("rev-parse", "HEAD") == ""
    assert provenance.provenance("x", torch.device("cpu"))["commit"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_context_ends_its_process(workers, tmp_path):
    """Under xdist the other tests run in a new one; alone, they would only fail."""
    (tmp_path / "conftest.py").write_text("from dead_context import pytest_runtest_logfinish\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest, torch\n"
        "@pytest.mark.parametrize('number', range(5))\n"
        "def test_it(number):\n"
        "    if number == 1:\n"
        "        torch.cuda.is_initialized = lambda: True\n"
        "        def lost(): raise RuntimeError('illegal access')\n"
        "        torch.cuda.synchronize = lost\n"
        "        assert False, 'the first to see it'\n"
        "    assert not torch.cuda.is_initialized()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    command += ["-n", str(workers)] if workers else []
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert "the first to see it" in done.stdout
    if workers:
        assert "4 passed" in done.stdout and "crashed while running" in done.stdout
        assert re.search(r"crashed while running '?\S*test_it\[1\]", done.stdout)
    else:
        assert "the CUDA context is lost: illegal access" in done.stdout
        assert "1 failed, 1 passed" in done.stdout


def test_tuning_is_on_the_middle_problem_of_each_width(tmp_path):
    many = [
        *(Case("a", 4, 10, 8), Case("b", 4, 30, 8), Case("c", 4, 20, 8), Case("d", 4, 40, 8)),
        *(Case("pfc", 4, 20, 8, rate=0.5), Case("half", 4, 20, 8, dtype="float16")),
        Case("wide", 2, 10, 16),
    ]
    table = tmp_path / "t.json"
    first, second = gpu_check.tuning(many, 80, table)
    assert first[1:4] == second[1:4] == ["-m", "fastmargin", "tune"]
    options = dict(zip(first[4::2], first[5::2], strict=True))
    shape = {"--dim": "8", "--batch": "4", "--classes": "20"}
    assert options == shape | {"--seconds": "10", "--output": str(table)}
    assert second[4:10] == ["--dim", "16", "--batch", "2", "--classes", "10"]
    done = gpu_check.run([*first, "--help"], 60)
    assert done["status"] == 0 and "--seconds" in done["tail"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "needs a CUDA device" in done.stderr
