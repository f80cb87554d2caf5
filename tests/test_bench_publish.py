"""Pages and pictures are what the committed reports say."""

from __future__ import annotations

import json
import re

import pytest
from bench_reports import glyph_figures, record_figures, report

from benchmarks import RESULTS, plots, publish


def test_pages_and_pictures_match_the_committed_reports():
    assert publish.stale() == []
    for page in publish.PAGES:
        assert publish.BLOCK.search(page.read_text()), page.name
    names = re.findall(r"<!-- bench: ([\w-]+) -->", "".join(p.read_text() for p in publish.PAGES))
    assert sorted(names) == sorted(publish.blocks())


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_a_committed_result_says_where_it_is_from(file):
    text = file.read_text()
    found = json.loads(text)
    origin = found.get("provenance", found)
    assert {"device", "versions", "commit", "uncommitted_changes", "date"} <= set(origin)
    assert origin["command"].startswith(("fastmargin ", "python -m "))
    assert not re.search(r"(?<![\w.])/(?:tmp|home|root|work|usr|opt|var|mnt)\b", text), "a folder"
    assert f"`{file.name}`" in (RESULTS / "README.md").read_text()


def test_results_named_in_their_readme_are_there():
    named = re.findall(r"`([\w-]+\.json)`", (RESULTS / "README.md").read_text())
    assert sorted(named) == sorted(file.name for file in RESULTS.glob("*.json"))


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A checkout with one made-up report and empty pages."""
    results, docs = tmp_path / "benchmarks" / "results", tmp_path / "docs"
    results.mkdir(parents=True)
    docs.mkdir()
    (results / "cpu.json").write_text(json.dumps(report()))
    pages = (tmp_path / "README.md", docs / "benchmarks.md")
    pages[0].write_text("# Before\n\n<!-- bench: headlines -->\nold\n<!-- end -->\n\nafter\n")
    pages[1].write_text(
        "<!-- bench: results -->\n<!-- end -->\n\n<!-- bench: not-measured -->\n<!-- end -->\n"
    )
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "RESULTS", results)
    monkeypatch.setattr(publish, "PAGES", pages)
    monkeypatch.setattr(publish, "PICTURES", docs / "benchmarks")
    assert publish.main(["--check"]) == 1
    assert publish.main([]) == 0
    return results / "cpu.json", pages


def test_what_is_written(published):
    _, (readme, page) = published
    text = readme.read_text()
    assert text.startswith("# Before\n\n<!--") and text.endswith("after\n") and "old" not in text
    # 200,000 classes: 6 B K D operations at 1e11/s are 0.393 s, times 20 and 4, 1 % from the turns
    assert "time of a step | 8.02 s |  | 1.60 s | 0.20 |" in text
    assert "extra peak memory of a step | 1.20 GB |  | 120 MB | 0.10 |" in text
    text = page.read_text()
    for picture in plots.PICTURES:
        assert f"(benchmarks/cpu/{picture}.svg)" in text
    assert "| out of memory: OutOfMemory: it / was killed |" in text
    assert text.count("- liger-kernel (softmax): needs a GPU") == 1
    assert "| fastmargin cpu fp32 | 1.60 s (1.58 to 1.63) \\* | 802 + 802 ms | 0.20 |" in text
    left = text[text.index("bench: not-measured") :]
    assert "arc-20k" in left and "gpu-10m" in left and "arc-200k" not in left
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {8}


def test_the_compiled_baseline_is_shown_where_it_was_measured():
    text = publish.headlines({"cpu": report(out_of_memory="")})
    assert "time of a step | 8.02 s | 8.02 s | 1.60 s | 0.20 |" in text
    assert "extra peak memory of a step | 1.20 GB | 1.20 GB | 120 MB | 0.10 |" in text


def test_a_changed_number_is_seen(published, capsys):
    file, (readme, page) = published
    assert publish.main(["--check"]) == 0
    page.write_text(page.read_text().replace("1.60 s", "1.50 s", 1))
    assert publish.stale() == ["docs/benchmarks.md"]
    publish.main([])
    changed = json.loads(file.read_text())
    changed["rows"][0]["peak_bytes"] += 10**7
    file.write_text(json.dumps(changed))
    assert publish.stale() == ["docs/benchmarks.md", "docs/benchmarks/cpu"]
    assert publish.main(["--check"]) == 1 and "run make docs" in capsys.readouterr().err
    readme.write_text("<!-- bench: unheard-of -->\n<!-- end -->\n")
    with pytest.raises(KeyError, match="unheard-of"):
        publish.stale()


@pytest.fixture
def published_figures(monkeypatch, tmp_path):
    """A checkout with made-up figures of glyphs and records, and their pages."""
    results, docs = tmp_path / "benchmarks" / "results", tmp_path / "docs"
    results.mkdir(parents=True)
    docs.mkdir()
    figures = {
        "glyphs_cpu": glyph_figures(),
        "glyphs_one_bit_cpu": glyph_figures(one_bit=True),
        "record_reading": record_figures(),
    }
    for name, found in figures.items():
        (results / f"{name}.json").write_text(json.dumps(found))
    page = docs / "glyphs.md"
    names = ("glyphs", "glyphs-summary", "glyphs-rounding", "record-reading")
    page.write_text("".join(f"<!-- bench: {name} -->\n<!-- end -->\n" for name in names))
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "RESULTS", results)
    monkeypatch.setattr(publish, "PAGES", (page,))
    monkeypatch.setattr(publish, "PICTURES", docs / "benchmarks")
    assert publish.stale() == ["docs/glyphs.md", "docs/benchmarks/glyphs_cpu"]
    assert publish.main([]) == 0
    assert publish.stale() == []
    return results, page


def test_figures_of_glyphs(published_figures):
    text = published_figures[1].read_text()
    assert "7,000 glyphs of 2 fonts to train on, 1,900 of C to identify; 3 epochs, seed 0." in text
    for picture in ("accuracy", "curves"):
        assert f"![{picture}](benchmarks/glyphs_cpu/{picture}.svg)" in text
    for line in (
        "| ArcFace | 30 % sampled | 0.400 / 0.420 | 0.500 / 0.520 | 0.250 / 0.260 |",
        "| raw pixels |  |  | 0.080 | 0.050 |",
        "| NPT | all classes | 3.0% | 2.0% | 4.00 / 6.00 ms | 1.50 | 5.0 / 0.5 MB | 0.10 |",
        # ArcFace is the lower and NPT the higher of the two at both rates
        # +1, +2, +3, +4: deviation 1.29
        "Rank-1 by means, fastmargin less plain PyTorch: +1.0 to +4.0 points, +2.5 on average over "
        "the 4 pairs, with a standard error of 0.6.",
        "The losses of the first step differ by 3e-07 of their size at most. Difference over one "
        "bit is 1.2 in the median of the 4 pairs, 0.5 to 2.0.",
        "| all classes | 1.0 to 3.0 % | 2.0 to 2.0 % | +1.0 to +3.0 points | 0.50 to 1.50 | "
        "0.10 to 0.10 |",
        "| 30 % sampled | +2.0 to +4.0 | +3.0 | -2.0 to -2.0 | -2.0 |",
        "| together | +1.0 to +4.0 | +2.5 | -2.0 to -2.0 | -2.0 |",
    ):
        assert line in text.splitlines(), line


def test_figures_of_records(published_figures):
    lines = published_figures[1].read_text().splitlines()
    assert "| batches at random | 123,000/s | 247,000/s | 0.50 |" in lines
    assert "| blocks of 64, window of 16,384 | 50,000/s | 100,000/s | 0.55 |" in lines
    assert len([line for line in lines if "| 123,000/s |" in line]) == 4


@pytest.mark.parametrize("name", ["glyphs_cpu", "glyphs_one_bit_cpu", "record_reading"])
def test_a_changed_figure_is_seen(published_figures, name):
    file = published_figures[0] / f"{name}.json"
    found = json.loads(file.read_text())
    if name == "record_reading":
        found["from_disk"]["time_ratio_median"] = 0.6
    else:
        found["runs"][1]["fastmargin"]["rank_1_means"] = 0.3
    file.write_text(json.dumps(found))
    pictures = ["docs/benchmarks/glyphs_cpu"] if name == "glyphs_cpu" else []
    assert publish.stale() == ["docs/glyphs.md", *pictures]
    file.unlink()
    assert "Not measured yet" in "".join(text for _, text in publish.documents())
