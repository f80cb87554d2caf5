"""What a user gets on import, with and without compiled code and Triton."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastmargin as fm

ROOT = Path(__file__).parents[1]

BARE = """
import json, sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton" or name in ("fastmargin._C", "fastmargin._host"):
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hide())
import torch
import fastmargin as fm
assert not torch.cuda.is_initialized()
head = fm.MarginHead(4, 7, fm.AdaFace())
loss = head(torch.randn(3, 4, requires_grad=True), torch.tensor([0, 6, -1]))
loss.backward()
assert head.predict(torch.randn(2, 4), 3).label.shape == (2, 3)
print(json.dumps(fm.backends.available()))
"""


def python(code, **env):
    import os

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )


def test_works_with_nothing_compiled_and_no_triton():
    reasons = json.loads(python(BARE).stdout)
    assert reasons["reference"] is None
    for name in ("cpu", "triton", "cuda"):
        assert reasons[name], name


def test_import_is_quiet_and_lazy():
    code = (
        "import sys, fastmargin; "
        "loud = [m for m in ('triton', 'matplotlib', 'rich', 'typer', 'fastmargin._C', "
        "'torch.distributed.checkpoint', 'torch.distributed.tensor') "
        "if m in sys.modules]; assert not loud, loud"
    )
    result = python(code)
    assert result.stdout == "" and result.stderr == ""


def test_every_backend_gives_a_reason():
    available = fm.backends.available()
    assert list(available) == ["reference", "cpu", "triton", "cuda"]
    assert available["reference"] is None
    assert available["cpu"] is None, "the C++ extension is part of the development set-up"
    assert all(reason is None or len(reason) > 10 for reason in available.values())


def test_public_names_have_docstrings():
    for name in fm.__all__:
        if not name.startswith("__"):
            assert getattr(fm, name).__doc__, name


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs"])
def test_no_dangling_links(page):
    path = ROOT / page
    for text in sorted(path.glob("*.md")) if path.is_dir() else [path]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text.read_text()):
            assert (text.parent / target).exists(), f"{text.name} points to {target}"


def test_readme_is_short():
    """Its tables of numbers are tested in test_bench_publish.py."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_command_is_there_without_being_installed():
    done = subprocess.run(
        [sys.executable, "-m", "fastmargin", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, fm.__version__), done.stderr
