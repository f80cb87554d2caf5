"""The shipped Triton kernels compile for each architecture, without a GPU, and nothing spills.

A representative part, one or two minutes per architecture; FASTMARGIN_AOT_FULL=1 compiles every
configuration, which takes hours on two cores. Triton's own cache makes the second run quick.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
ROOT = Path(__file__).parent.parent
KERNELS = {
    *("centre_pass", "compact", "hinge_loss", "margin_loss", "margin_rows", "mark"),
    *("norm_statistics", "own_rows", "permutation", "place", "row_normals", "row_prologue"),
    *("rows_backward", "stage", "stats_finish", "stats_forward", "stats_merge", "through_norm"),
    *("through_stats", "topk_backward", "topk_merge", "topk_scan"),
}
PASSES = ("stats_forward", "centre_pass", "topk_scan")
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""Matrix instructions of 16-bit operands."""
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
    assert kernels == KERNELS
    names = [report["name"] for report in reports]
    assert len(names) == len(set(names)) > 40
    multiplied = set()
    for report in reports:
        assert report["arch"] == arch and report["registers"] > 0
        assert report["stack"] == 0, report
        assert report["shared"] <= report["shared_limit"], report
        assert not report["serial"], report
        assert report["fits"], report
        kernel, operands = (*report["name"].split(), "", "")[0:3:2]
        if kernel in PASSES and operands in ("fp16", "bf16"):
            assert report["products"] == PRODUCTS[arch], report
            multiplied.add(kernel)
        elif kernel not in PASSES:
            assert report["products"] == "", report
    assert multiplied == set(PASSES)
    assert result.returncode == 0, result.stderr[-2000:]


def printed_by(code) -> list[str]:
    """Words of the output of a fresh process."""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split()


@pytest.mark.slow
def test_a_spill_shows():
    code = (
        "import sys; from fastmargin.backends.triton import aot, centre_pass;"
        "from fastmargin.backends.triton.configs import TileConfig;"
        "centre_pass.choose = lambda *_: TileConfig(64, 128, 64, 512, 8, 2);"
        "found = aot.builds(90, aot.problems());"
        "build = next(b for b in found if b.name.startswith('centre_pass D=512 fp16'));"
        "report = aot.compile_build(build);"
        "sys.stdout.write(f'{report.stack} {report.fits}')"
    )
    stack, fits = printed_by(code)
    assert int(stack) > 0 and fits == "False"


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["stats_forward", "centre_pass"])
def test_products_that_wait_for_each_other_show(kernel):
    """The second product of a tile left under way, as Triton has it without a branch around."""
    code = (
        f"import sys; from fastmargin.backends.triton import aot, {kernel} as module;"
        "own = module.constants;"
        "module.constants = lambda *a: own(*a) | {'AHEAD': None};"
        "of = [p for p in aot.problems() if p.name.startswith('D=512 bf16')];"
        f"build = next(b for b in aot.builds(90, of) if b.name.startswith('{kernel}'));"
        "report = aot.compile_build(build);"
        "sys.stdout.write(f'{report.serial} {report.fits} {report.products}')"
    )
    assert printed_by(code) == ["True", "False", "wgmma.mma_async"]


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [True, False])
def test_the_next_tile_is_copied_while_this_one_is_multiplied(ahead):
    """Hopper: between the wait for a tile and its products the copy of the next one begins."""
    late = "" if ahead else "module.constants = lambda *a, own=own: own(*a) | {'AHEAD': None}"
    code = f"""
import re
from fastmargin.backends.triton import aot, centre_pass, stats_forward
for module in (centre_pass, stats_forward):
    own = module.constants
    {late}
of = [p for p in aot.problems() if re.match("D=(128|256|512) (fp16|bf16) W=fp32", p.name)]
for build in aot.builds(90, of):
    if re.search("stats_forward.* pull|centre_pass.*sgd_momentum", build.name):
        steps = re.findall(
            "(mbarrier.try_wait)|(cp.async.bulk.tensor)|(wgmma.mma)", build.compiled().asm["ptx"]
        )
        text = "".join("WCP"[[bool(part) for part in step].index(True)] for step in steps)
        print(build.name.replace(" ", "_"), "P" in text and "WP" not in text)
"""
    words = printed_by(code)
    names, found = words[::2], words[1::2]
    assert len(names) > 10 and {name.split("_D=")[0] for name in names} == {*PASSES[:2]}
    found = dict(zip(names, found, strict=True))
    if not ahead:  # of two buffers; where there are three, one copy is under way in any case
        found = {name: begins for name, begins in found.items() if "D=512_fp16" in name}
    assert set(found.values()) == {str(ahead)}, found


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["stats_forward", "centre_pass"])
def test_whole_rows_for_the_cosines_and_some_columns_of_the_sum(kernel):
    """A user's table may have such tiles; none that ships is one."""
    code = (
        f"import sys; from fastmargin.backends.triton import aot, {kernel} as module;"
        "from fastmargin.backends.triton.configs import TileConfig;"
        "module.choose = lambda *_: TileConfig(64, 64, 256, 128, 8, 2);"
        "of = [p for p in aot.problems() if p.name.startswith('D=256 fp16')];"
        f"build = next(b for b in aot.builds(90, of) if b.name.startswith('{kernel}'));"
        "report = aot.compile_build(build);"
        "sys.stdout.write(f'{report.stack} {report.products}')"
    )
    assert printed_by(code) == ["0", "wgmma.mma_async"]


@pytest.mark.slow
def test_tf32_operands_are_rounded():
    """Whatever makes one; the passes make the left one of their second product."""
    code = """
from fastmargin.backends.triton import aot
of = [p for p in aot.problems() if p.name.startswith("D=512 tf32")]
for build in aot.builds(90, of):
    kernel = build.name.split()[0]
    if kernel in ("stage", "centre_pass") or kernel == "stats_forward" and "pull" in build.name:
        print(kernel, "cvt.rna.tf32.f32" in build.compiled().asm["ptx"])
"""
    words = printed_by(code)
    assert set(words[::2]) == {"stage", *PASSES[:2]} and set(words[1::2]) == {"True"}


@pytest.mark.slow
def test_heads_launch_what_is_compiled():
    """Bound as on a GPU: types, specialised numbers, alignment, descriptors, grids."""
    result = run("tests/heads_launches.py", "90", cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    problems = json.loads(result.stdout)
    shipped = [problem for problem in problems if problem["ships"]]
    assert len(shipped) > 60
    for problem in shipped:
        assert not problem["unknown"], problem
    named = {problem["problem"]: problem for problem in problems}
    assert named["adaface"]["launches"] == [
        *("row_prologue", "stage", "stats_forward", "stats_finish", "margin_loss"),
        *("rows_backward", "centre_pass"),
        *("row_prologue", "stage", "stats_forward", "stats_finish", "margin_loss"),
    ]
    assert named["elasticface"]["launches"] == [
        *("row_normals", *named["adaface"]["launches"][:7]),
        *("row_normals", *named["adaface"]["launches"][7:]),
    ]
    launched = {kernel for problem in problems for kernel in problem["launches"]}
    assert KERNELS - launched <= {"norm_statistics"}  # of the operators one by one
    # shapes that nobody trains with: they launch, too, and show that the comparison is not blind
    others = [problem for problem in problems if not problem["ships"]]
    assert len(others) == 6 and all(problem["unknown"] for problem in others)


def test_the_same_is_compiled_once():
    code = (
        "import sys; from fastmargin.backends.triton import aot;"
        "found = list(aot.builds(90, aot.problems()));"
        "sys.stdout.write(f'{len(found)} {len({b.asked.key for b in found})} ');"
        "sys.stdout.write(str(len({b.name for b in found})))"
    )
    builds, keys, names = map(int, printed_by(code))
    assert builds == keys == names > 100


def test_says_why_it_cannot_run_in_the_interpreter():
    result = run(
        "-m", "fastmargin.backends.triton.aot", env=ENVIRONMENT | {"TRITON_INTERPRET": "1"}
    )
    assert result.returncode == 2 and "TRITON_INTERPRET" in result.stderr
