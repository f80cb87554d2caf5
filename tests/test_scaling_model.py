"""The model of scaling: simple cases by hand, and what the documentation shows of it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    path = ROOT / "benchmarks" / "scaling_model.py"
    spec = importlib.util.spec_from_file_location("scaling_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_document_shows_what_the_script_prints(model):
    text = (ROOT / "docs" / "distributed.md").read_text()
    shown = re.findall(r"<!-- scaling_model: (\w+) -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert dict(shown) == model.tables()
    assert len(shown) == len(model.tables())


def test_bytes_of_exchanges(model):
    """Every GPU ends with everybody's bytes; a ring for a sum takes twice the vector."""
    for gpus in (1, 8, 64, 1024):
        gathered = model.gather(gpus, 10.0)
        assert gathered.nvlink + gathered.infiniband == 10 * (gpus - 1)
    assert model.total(8, 80.0).nvlink == 140 and model.total(8, 80.0).infiniband == 0
    assert model.total(64, 80.0).infiniband == 2 * 7 / 8 * 10


def test_times_and_memory(model):
    # many rows: 8 D operations for a row and a class
    assert sum(model.passes(4096, 1e6)) == pytest.approx(4096e6 * 8 * 512 / 600e12)
    # one GPU exchanges nothing
    whole, useful = model.flat(1, 1e6, 1.0)
    assert whole == useful > sum(model.passes(128, 1e6))
    # more GPUs never help the part that is useful, and never change the passes
    shares = [model.flat(gpus, 1e8, 0.1) for gpus in (8, 64, 256, 1024)]
    assert [s[1] for s in shares] == pytest.approx([shares[0][1]] * 4)
    assert sorted(s[0] for s in shares) == [s[0] for s in shares]
    # few rows: the pass reads the centres once, and the backward writes their gradient
    assert model.passes(1, 1e6) == pytest.approx((2.048e9 / 4.3e12, 4.096e9 / 4.3e12))
    state, gradient, _ = model.memory(8, 8e6, 1.0)
    assert (state, gradient) == (4096e6, 2048e6)
    classes = model.break_even(64)
    assert model.meshed(64, classes, 1.0) == pytest.approx(model.flat(64, classes, 1.0)[0])
