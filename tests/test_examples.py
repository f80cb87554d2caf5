"""The examples run and end as they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def output(name):
    command = [sys.executable, str(EXAMPLES / name)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_minimal():
    lines = output("minimal.py")
    first, last = (float(lines[i].split("loss ")[1].split(",")[0]) for i in (0, 3))
    assert last < first / 4
    assert "[[0, " in lines[-1]  # the image's own class comes first


def test_custom_margin():
    easy, hard = (float(part.split()[-1]) for part in output("custom_margin.py")[-1].split(", "))
    assert easy > hard
