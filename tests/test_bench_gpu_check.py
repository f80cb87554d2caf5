"""gpu-check as far as it goes without a GPU: time runs out, failures are told."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks import ROOT, bench, gpu_check
from benchmarks.cases import Case

CASES = [Case(f"c{place}", 4, 10, 8) for place in range(4)]
CPU = torch.device("cpu")


def test_cases_beyond_the_deadline_are_rows(monkeypatch):
    now, asked = [0.0], []

    def run(cases, device, settings):
        now[0] += 10
        asked.append(settings.accuracy)
        row = {"case": vars(cases[0]), "contender": "x", "ours": True, "status": "measured"}
        return {"rows": [row], "canary": {"seconds": [1.0]}}

    monkeypatch.setattr(bench, "run", run)
    found = gpu_check.benchmark(CASES, CPU, bench.Settings(), 15, clock=lambda: now[0])
    assert [row["status"] for row in found["rows"]] == ["measured"] * 2 + ["not run"] * 2
    assert asked == [True, False] and len(found["canary"]["seconds"]) == 2
    assert [row["case"]["name"] for row in found["rows"]] == ["c0", "c1", "c2", "c3"]


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


def test_commands_have_a_limit():
    done = gpu_check.run([sys.executable, "-c", "print('told')"], 60)
    assert done["status"] == 0 and done["tail"] == "told\n"
    late = gpu_check.run([sys.executable, "-c", "import time; time.sleep(60)"], 0)
    assert late["status"] == "timeout"
    assert gpu_check.file_name("NVIDIA H200 (SXM)") == "nvidia_h200_sxm.json"
    for name in gpu_check.TEST_FILES:
        assert (ROOT / "tests" / f"test_{name}.py").exists()


def test_tuning_is_on_the_middle_problem_of_each_width(tmp_path):
    many = [
        *(Case("a", 4, 10, 8), Case("b", 4, 30, 8), Case("c", 4, 20, 8), Case("d", 4, 40, 8)),
        *(Case("pfc", 4, 20, 8, rate=0.5), Case("half", 4, 20, 8, dtype="float16")),
        Case("wide", 2, 10, 16),
    ]
    table = tmp_path / "t.json"
    first, second = gpu_check.tuning(many, 80, table)
    assert first[1:4] == second[1:4] == ["-m", "fastmargin.cli", "tune"]
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
