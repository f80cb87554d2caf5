"""The shipped Triton kernels compile for each architecture, without a GPU, and nothing spills.

A representative part, about half a minute per architecture; FASTMARGIN_AOT_FULL=1 compiles every
configuration, which takes hours on two cores. Triton's own cache makes the second run quick.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
FULL = os.environ.get("FASTMARGIN_AOT_FULL") == "1"


def run(*command, **options):
    """A fresh process: this one may have Triton's interpreter, which compiles nothing."""
    options = {"env": ENVIRONMENT} | options
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_everything_fits(arch):
    command = ["-m", "fastmargin.backends.triton.aot", "--json", "--arch", str(arch)]
    result = run(*command, *(["--full"] if FULL else []))
    assert result.stdout, result.stderr[-2000:]
    reports = json.loads(result.stdout)
    kernels = {report["name"].split()[0] for report in reports}
    assert kernels == {
        *("centre_pass", "compact", "margin_loss", "margin_rows", "norm_statistics", "own_rows"),
        *("permutation", "row_prologue", "rows_backward", "stage", "stats_finish"),
        *("stats_forward", "stats_merge", "topk_backward", "topk_merge", "topk_scan"),
    }
    names = [report["name"] for report in reports]
    assert len(names) == len(set(names)) > 40
    for report in reports:
        assert report["arch"] == arch and report["registers"] > 0
        assert report["stack"] == 0, report
        assert report["shared"] <= report["shared_limit"], report
        assert report["fits"], report
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
def test_a_spill_shows():
    code = (
        "import sys; from fastmargin.backends.triton import aot;"
        "from fastmargin.backends.triton.configs import TileConfig;"
        "aot.choose = lambda *_: TileConfig(64, 128, 64, 512, 8, 2);"
        "build = next(b for b in aot.builds(90) if b.name.startswith('centre_pass D=512 fp16'));"
        "report = aot.compile_build(build, 90);"
        "sys.stdout.write(f'{report.stack} {report.fits}')"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr[-2000:]
    stack, fits = result.stdout.split()
    assert int(stack) > 0 and fits == "False"


def test_says_why_it_cannot_run_in_the_interpreter():
    result = run(
        "-m", "fastmargin.backends.triton.aot", env=ENVIRONMENT | {"TRITON_INTERPRET": "1"}
    )
    assert result.returncode == 2 and "TRITON_INTERPRET" in result.stderr
