"""Pictures can be read on light and dark pages, and show who does not fit."""

from __future__ import annotations

import re

import pytest
from bench_reports import glyph_figures, report
from PIL import Image

from benchmarks import plots
from benchmarks.glyphs.plots import PICTURES as OF_GLYPHS

LIGHT, DARK = "#ffffff", "#0d1117"


def luminance(colour: str) -> float:
    """Of WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    found = [
        *plots.draw(report(), folder),
        *plots.draw(glyph_figures(), folder, pictures=OF_GLYPHS),
    ]
    return {path.name: path for path in found}


def test_all_are_drawn_and_alike_each_time(drawn, tmp_path):
    assert len(drawn) == 2 * (len(plots.PICTURES) + len(OF_GLYPHS))
    for figures, pictures in ((report(), None), (glyph_figures(), OF_GLYPHS)):
        for again in plots.draw(figures, tmp_path, ("svg",), pictures):
            assert again.read_text() == drawn[again.name].read_text()
            assert plots.digest(figures) in again.read_text()


def test_every_colour_can_be_seen_on_both_pages(drawn):
    assert contrast("#000000", LIGHT) == pytest.approx(21)
    for colour in (plots.INK, *plots.COLOURS):
        assert contrast(colour, LIGHT) >= 3 and contrast(colour, DARK) >= 3, colour
    for name, path in drawn.items():
        if name.endswith(".svg"):
            used = set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{6})", path.read_text()))
            assert used <= {plots.INK, *plots.COLOURS}, name
            assert plots.INK in used


def test_backgrounds_are_transparent(drawn):
    for name, path in drawn.items():
        if name.endswith(".png"):
            alpha = Image.open(path).convert("RGBA").getchannel("A")
            assert alpha.getextrema() == (0, 255), name
            assert alpha.histogram()[0] > 0.7 * alpha.width * alpha.height, name


def test_who_does_not_fit_has_a_mark(drawn):
    assert drawn["identities.svg"].read_text().count("out of memory") == 2
    without = report(out_of_memory="")
    axes = plots.identities(without).axes
    assert not any(text.get_text() == "out of memory" for ax in axes for text in ax.texts)


def test_lines_are_the_figures():
    left, right = plots.identities(report()).axes
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines["fastmargin cpu fp32"].get_xdata()) == [1000, 10_000, 200_000]
    assert len(lines["insightface-like, compiled"].get_xdata()) == 2
    peaks = {line.get_label(): list(line.get_ydata()) for line in right.lines}
    assert peaks["insightface-like"] == [6e6, 6e7, 1.2e9]
    (axes,) = plots.rates(report()).axes
    found = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert found["fastmargin cpu fp32"] == [0.1, 0.3, 1.0]
    empty = report() | {"rows": [], "accuracy": []}
    assert [make(empty) for make in plots.PICTURES.values()] == [None] * len(plots.PICTURES)
