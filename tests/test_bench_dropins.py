"""The benchmark of the drop-in heads: nothing wrong is timed, and its table says what it found."""

from __future__ import annotations

import json

import pytest

from benchmarks import dropins, publish
from benchmarks.cases import Case


@pytest.mark.parametrize("name", dropins.DROPINS)
def test_both_agree(name):
    case = Case("small", 12, 300, 16)
    assert dropins.difference(*dropins.near_their_centres(name, case)) < 1e-4


def test_a_wrong_head_gets_no_number(monkeypatch):
    right = dropins.DROPINS["adaface AdaFace"]

    def wrong(case, faithful):
        head = right(case, faithful)
        loss = head.loss
        head.loss = loss if faithful else lambda x, labels: 1.01 * loss(x, labels)
        return head

    monkeypatch.setitem(dropins.DROPINS, "adaface AdaFace", wrong)
    row = dropins.measure("adaface AdaFace", Case("small", 12, 300, 16), repeats=1)
    assert row["status"] == "wrong" and "seconds" not in row


def test_a_row_of_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(dropins, "peak", lambda name, key, case: {"default": 1, "faithful": 9}[key])
    case = Case("small", 12, 300, 16)
    row = dropins.measure("adaface AdaFace", case, repeats=1)
    assert row["seconds"]["default"]["median"] > 0 and row["ratio"]["median"] > 0
    origin = {"device": "this one", "date": "2026-01-01T00:00", "command": "run"}
    report = {**origin, "case": vars(case), "rows": [row, {"dropin": "other", "status": "wrong"}]}
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    (tmp_path / "dropins_cpu.json").write_text(json.dumps(report))
    table = publish.dropins()
    assert "| adaface AdaFace |" in table and "| other | wrong |" in table
    assert "300 classes" in table and "this one" in table
