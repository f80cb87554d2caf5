"""The examples run and end as they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def output(name, *args, processes=0):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    command = [sys.executable, *(torchrun if processes else ()), str(EXAMPLES / name), *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_minimal():
    lines = output("minimal.py")
    first, last = (float(lines[i].split("loss ")[1].split(",")[0]) for i in (0, 3))
    assert last < first / 4
    assert "[[0, " in lines[-1]  # the image's own class comes first


def test_custom_margin():
    easy, hard = (float(part.split()[-1]) for part in output("custom_margin.py")[-1].split(", "))
    assert easy > hard


def figures(lines):
    """Loss and top-1 of every epoch."""
    return {
        int(epoch): tuple(float(part.split()[-1]) for part in rest.split(", "))
        for epoch, rest in (line.removeprefix("epoch ").split(": ") for line in lines)
    }


def test_class_parallel(tmp_path):
    """On two processes, and then, from their checkpoint, on one."""
    run = ("--checkpoint", str(tmp_path / "run"), "--images", "16000")
    first = figures(output("class_parallel.py", *run, "--epochs", "2", processes=2))
    assert list(first) == [0, 1] and first[1][0] < first[0][0] / 1.5
    more = figures(output("class_parallel.py", *run, "--epochs", "3"))
    assert list(more) == [2]
    assert more[2][0] < first[1][0] and more[2][1] > 0.9
