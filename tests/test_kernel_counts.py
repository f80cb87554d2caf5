"""The counts that docs/kernels.md states are those of the tiles that ship."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def counts():
    spec = importlib.util.spec_from_file_location("kernel_counts", DOCS / "kernel_counts.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_table_is_the_code(counts, monkeypatch):
    text = (DOCS / "kernels.md").read_text()
    assert "\n".join(counts.table()) in text
    choose = counts.choose
    monkeypatch.setattr(counts, "choose", lambda *a: replace(choose(*a), block_b=128))
    assert "\n".join(counts.table()) not in text


def test_counts_of_tiles_at_the_floor(counts):
    """One tile that holds all rows, classes and columns loads everything once."""
    from fastmargin.backends.triton.configs import TileConfig

    b, c, d = 64, 64, 512
    tile = TileConfig(b, c, d, d, 8, 2)
    once = c * d * 4 / 1e9
    forward, backward = (f(b, c, d, tile, 4) for f in (counts.forward, counts.centre_pass))
    assert forward.flops == backward.flops == 4
    assert [forward.weight, backward.weight] == pytest.approx([once, 3 * once])
    assert [forward.rows, backward.rows] == pytest.approx([b * d * 2 / 1e9] * 2)
    cut = replace(tile, block_d=256, block_k=128)
    assert counts.centre_pass(b, c, d, cut, 4).flops == 6
