"""Pages and pictures are what the committed reports say."""

from __future__ import annotations

import json
import re

import pytest
from bench_reports import report

from benchmarks import plots, publish


def test_pages_and_pictures_match_the_committed_reports():
    assert publish.stale() == []
    for page in publish.PAGES:
        assert publish.BLOCK.search(page.read_text()), page.name
    names = re.findall(r"<!-- bench: ([\w-]+) -->", "".join(p.read_text() for p in publish.PAGES))
    assert sorted(names) == sorted(publish.blocks())


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
    assert "time of a step | 8.02 s | 1.60 s | 0.20 |" in text
    assert "peak memory beyond what stays | 1.20 GB | 120 MB | 0.10 |" in text
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
