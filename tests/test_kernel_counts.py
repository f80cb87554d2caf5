"""The counts that docs/kernels.md states are those of the tiles that ship, and of the kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture
def counts():
    spec = importlib.util.spec_from_file_location("kernel_counts", DOCS / "kernel_counts.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def fp32(counts):
    return counts.STORED[0]


def tile(*sizes, warps=8):
    from fastmargin.backends.triton.configs import TileConfig

    return TileConfig(*sizes, warps, 2)


def test_tables_are_the_code(counts, monkeypatch):
    """`python docs/kernel_counts.py --write` after a change of tiles."""
    text = (DOCS / "kernels.md").read_text()
    tables = {name: "\n".join(table()) for name, table in counts.TABLES.items()}
    for name, table in tables.items():
        begin, end = counts.marks(name)
        assert f"{begin}{table}\n{end}" in text
    assert counts.filled_in(text) == text
    choose = counts.choose
    monkeypatch.setattr(counts, "choose", lambda *a: replace(choose(*a), block_b=128))
    for name in ("work", "shared memory"):
        assert "\n".join(counts.TABLES[name]()) not in text
    assert counts.filled_in(text) != text


def test_a_page_without_a_mark_is_refused(counts):
    with pytest.raises(ValueError, match="counts: work"):
        counts.filled_in("no table here")


def test_counts_of_tiles_at_the_floor(counts):
    """One tile that holds all rows, classes and columns loads everything once."""
    b, c, d = 64, 64, 512
    whole, gb = tile(b, c, d, d), 1e9
    staged, rows = c * d * 2, b * d * 2
    forward, backward = (
        counts.forward(b, c, d, whole),
        counts.centre_pass(b, c, d, whole, fp32(counts)),
    )
    assert forward.flops == backward.flops == 4
    assert forward.centres * gb == pytest.approx(staged)
    assert backward.centres * gb == pytest.approx(staged + 2 * staged + 4 * c)
    assert forward.rows * gb == pytest.approx(rows)
    assert backward.rows * gb == pytest.approx(rows + 16 * b)
    assert forward.stored * gb == pytest.approx(b * (d * 4 + 12))
    assert backward.stored * gb == pytest.approx(c * d * 4)
    asked = staged + rows + b * (d * 4 + 12)
    assert forward.intensity(b, c, d) == pytest.approx(4 * b * c * d / asked)
    stage = counts.stage(c, d, fp32(counts))
    assert [stage.centres * gb, stage.stored * gb] == pytest.approx([2 * c * d * 4, staged + 4 * c])
    finish = counts.merges(b, c, d, whole, fp32(counts))
    assert finish.rows * gb == pytest.approx(b * (d * 4 + 12) + b * d * 4)
    assert finish.stored * gb == pytest.approx(b * (d * 4 + 12))


def test_counts_of_cut_tiles(counts):
    """Two blocks of rows, of classes and of columns; K in parts, so nothing is read only once."""
    b, c, d = 128, 128, 512
    cut, gb, copy = tile(64, 64, 128, 256), 1e9, 128 * 512 * 2
    forward, backward = (
        counts.forward(b, c, d, cut),
        counts.centre_pass(b, c, d, cut, fp32(counts)),
    )
    assert forward.flops == backward.flops == 6
    # both blocks of columns go through all for the cosines, and share it for the second product
    assert forward.centres * gb == pytest.approx(2 * (2 + 1) * copy)
    assert forward.rows * gb == pytest.approx(2 * 2 * copy)
    assert backward.centres * gb == pytest.approx(2 * 2 * copy + copy + 2 * 4 * c)
    assert backward.rows * gb == pytest.approx(2 * (2 + 1) * copy + 2 * 2 * 16 * b)


def test_counts_of_pieces(counts, monkeypatch):
    """Three of 64 columns, 64 and 22: each has its splits, and the next one the sum of them."""
    b, c, d = 64, 150, 512
    whole, gb, one = tile(b, 32, d, d), 1e9, 64 * (512 * 4 + 12)
    monkeypatch.setattr(counts.centres, "STAGED_BYTES", 64 * d * 2 + 1)
    assert counts.pieces(c, d) == [64, 64, 22]
    forward = counts.forward(b, c, d, whole)
    assert forward.rows * gb == pytest.approx(3 * 2 * b * d * 2)  # 2 splits
    assert forward.stored * gb == pytest.approx(3 * 2 * one)
    merges = counts.merges(b, c, d, whole, fp32(counts))
    assert merges.rows * gb == pytest.approx((2 + 3 + 3) * one + b * d * 4)
    assert merges.stored * gb == pytest.approx(3 * one)
    again = counts.stage(c, d, fp32(counts))
    assert again.centres * gb == pytest.approx(2 * 2 * c * d * 4)
    assert again.stored * gb == pytest.approx(2 * c * (d * 2 + 4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches of the interpreter")
@pytest.mark.parametrize("columns", [100, 70, 35, 24, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pieces_and_launches_are_those_of_a_step(columns, dtype, counts, monkeypatch):
    from conftest import device_for
    from launches import counted

    import fastmargin as fm

    device_for("triton")
    monkeypatch.setattr(counts.centres, "STAGED_BYTES", columns * 24 * 2)
    head = fm.MarginHead(24, 70, fm.AdaFace(), backend="triton", precision="fp16", validate=False)
    head.to(dtype)
    x = torch.randn(4, 24, requires_grad=True)
    parts = list(counts.centres.centres_of(head.weight.detach(), None, "fp16"))
    assert [len(part.inverse) for part in parts] == counts.pieces(70, 24)
    with counted() as step:
        head(x, torch.tensor([0, 1, 69, -1])).backward()
    assert len(step.names) == counts.launches(len(parts)), step.names


# (stationary, streamed) rows of a tile, warps, and bytes and FLOPs in units that are easy to see
@pytest.mark.parametrize(
    ("sizes", "warps", "first", "second", "done"),
    [
        # each of 2 warpgroups: 64 rows, and half of the 64 that pass by
        ((64, 64, 256, 512), 8, 3 * 64 * 512, 64 * 512, 1.0),
        # the same where K is all of D
        ((64, 64, 512, 512), 8, 3 * 64 * 512, 64 * 512, 1.0),
        # one warpgroup: each operand once
        ((64, 64, 256, 256), 4, 2 * 64 * 512, 64 * 256, 1.0),
        # rows for both: each all of what passes by
        ((128, 64, 512, 256), 8, (128 + 2 * 64) * 512, 2 * 64 * 256, 1.0),
    ],
)
def test_what_products_read_from_shared_memory(sizes, warps, first, second, done, counts):
    made = counts.products(sizes[0], sizes[1], tile(*sizes, warps=warps), 512)
    assert (made.first, made.second) == (2 * first, 2 * second)
    assert made.asked == 2 * sizes[0] * sizes[1] * (512 + sizes[3])
    assert made.done / made.asked == pytest.approx(done)
    assert counts.products(32, 64, tile(32, 64, 512, 512), 512) is None  # no such instruction


COMPILED = r"""
import json, re, sys
from fastmargin.backends.triton import aot, centre_pass, stats_forward
from fastmargin.backends.triton.configs import TileConfig
from fastmargin.backends.triton.problems import Pass, passes

WANTED = ("stats_forward D=512 fp16 W=fp32 pull online", "centre_pass D=512 fp16 W=fp32")
INSTRUCTION = r"wgmma\.mma_async\S*m64n(\d+)k16\S* \{[^}]*\}, (\{?)"
for sizes in json.loads(sys.argv[1]):
    centre_pass.choose = stats_forward.choose = lambda *a: TileConfig(*sizes)
    builds = {build.name: build for build in aot.builds(90, passes(Pass(512, "fp16"), False))}
    for name in WANTED:
        found = re.findall(INSTRUCTION, builds[name].compiled().asm["ptx"])
        print(json.dumps([[int(width), held == "{"] for width, held in found]))
"""


@pytest.mark.slow
def test_instructions_are_those_of_compiled_kernels(counts):
    """Bytes and FLOPs of the matrix instructions that Triton makes for sm_90."""
    tiles = [tile(64, 64, 512, 512), tile(64, 64, 256, 512), tile(64, 64, 32, 128)]
    sizes = [[t.block_b, t.block_c, t.block_k, t.block_d, t.num_warps, 2] for t in tiles]
    # a fresh process: this one may have Triton's interpreter, which compiles nothing
    result = subprocess.run(
        [sys.executable, "-c", COMPILED, json.dumps(sizes)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == 2 * len(tiles)
    for shape, instructions in zip((t for t in tiles for _ in range(2)), found, strict=True):
        made, groups, trips = counts.products(64, 64, shape, 512), 2, 512 // shape.block_k
        # the left operand is in registers in the second product, and only there
        first = [width for width, held in instructions if not held] * trips
        second = [width for width, held in instructions if held]
        assert first and second
        assert groups * sum(2 * 16 * (64 + width) for width in first) == made.first
        assert groups * sum(2 * 16 * width for width in second) == made.second
        assert groups * sum(2 * 64 * 16 * width for width in first + second) == made.done
