"""The user's table of tiles: written whole, read once, refused with a reason, then chosen from."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, fields, replace

import pytest

pytest.importorskip("triton")

from tune_cases import (
    ENTRY,
    GOOD,
    HERE,
    OTHER,
    pick,
)

from fastmargin.backends.triton import BACKEND, tuned
from fastmargin.backends.triton.configs import TileConfig
from fastmargin.tune import candidates


@pytest.fixture(autouse=True)
def fresh_table():
    tuned.forget()
    yield
    tuned.forget()


# ---- the table ----


def test_numbers_of_a_tile_have_one_list():
    assert [field.name for field in fields(TileConfig)] == list(tuned.FIELDS)
    assert tuned.PRECISIONS == BACKEND.precisions


def test_a_table_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "new" / "tuned.json"
    assert tuned.read(file) == tuned.Table()
    second = replace(ENTRY, kernel="centre_pass")
    tuned.write(file, [ENTRY, second])
    assert tuned.read(file) == tuned.Table((ENTRY, second))
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it


def test_an_entry_replaces_that_of_its_key_only(tmp_path):
    file = tmp_path / "tuned.json"
    others = [replace(ENTRY, dim=256), replace(ENTRY, triton="3.6"), replace(ENTRY, device="x")]
    tuned.write(file, [ENTRY, *others])
    better = replace(ENTRY, tile=asdict(OTHER))
    tuned.merge(file, better, better.key)
    assert tuned.read(file).entries == (*others, better)
    tuned.merge(file, None, ENTRY.key)
    assert tuned.read(file).entries == tuple(others)
    stamp = file.stat().st_mtime_ns
    tuned.merge(file, None, ENTRY.key)
    assert file.stat().st_mtime_ns == stamp


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    file = tmp_path / "tuned.json"
    tuned.write(file, [ENTRY])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tuned.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tuned.write(file, [])
    assert tuned.read(file).entries == (ENTRY,)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kernel": "stats"}, "unknown kernel 'stats'"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"dim": "512"}, "dim must be of type int"),
        ({"arch": True}, "arch must be of type int"),
        ({"tile": {"block_b": 64}}, "a tile has the numbers"),
        ({"block_b": 48}, "block_b must be a power of two, got 48"),
        ({"kernel": "centre_pass", "block_b": 256}, "block_b of centre_pass must be at most 128"),
        ({"block_k": 8}, "block_k must be from 16 to 1024, got 8"),
        ({"block_d": 2048}, "block_d must be from 16 to 1024"),
        ({"block_c": 64.0}, "block_c must be a whole number"),
        ({"num_warps": 6}, "num_warps must be a power of two"),
        ({"num_stages": 0}, "num_stages must be from 1 to 8"),
    ],
)
def test_bad_entries_are_refused_with_the_reason(tmp_path, change, reason):
    raw = asdict(ENTRY)
    for name, value in change.items():
        (raw["tile"] if name in tuned.FIELDS else raw)[name] = value
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"format": 1, "entries": [raw, asdict(ENTRY)]}))
    table = tuned.read(file)
    assert table.entries == (ENTRY,)
    assert len(table.refused) == 1 and table.refused[0].startswith("entry 0: ")
    assert reason in table.refused[0]


@pytest.mark.parametrize(
    "change",
    [
        {"device": "other"},
        {"arch": 100},
        {"triton": "3.6"},
        {"fastmargin": "0.9"},
        {"arch": 80, "device": "a"},  # another GPU there has the same compute capability
    ],
)
def test_entries_of_another_place_do_not_count(change):
    tiles = tuned.applicable(tuned.Table((ENTRY, replace(ENTRY, **change))), HERE)
    assert tiles == {("topk", 512, "fp16", 90): asdict(GOOD)}
    assert tuned.applicable(tuned.Table((replace(ENTRY, **change),)), HERE) == {}


def test_where_the_table_is(monkeypatch, tmp_path):
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "t.json"))
    assert tuned.user_file() == tmp_path / "t.json"
    monkeypatch.setenv(tuned.VARIABLE, "")
    assert tuned.user_file() is None
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.user_file() == tmp_path / "fastmargin" / "tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.user_file() == tmp_path / ".cache" / "fastmargin" / "tuned.json"

    def no_home(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuned.Path, "expanduser", no_home)
    assert tuned.user_file() is None and tuned.why_none() == "there is no home folder"
    assert pick("topk") == candidates.shipped("topk", 40, "fp32", 0)


# ---- the choice ----


def test_a_choice_takes_the_tile_of_exactly_this_problem():
    tile = TileConfig(64, 128, 256, 512, 4, 3)
    base = pick("topk", 512, "fp16", 90)
    with tuned.using({("topk", 512, "fp16", 90): asdict(tile)}):
        assert pick("topk", 512, "fp16", 90) == tile
        assert pick("topk", 512, "bf16", 90) == base
        assert pick("topk", 500, "fp16", 90) == pick("topk", 512, "bf16", 90)
        other = pick("stats_sum", 512, "fp16", 90)
        assert other == candidates.shipped("stats_sum", 512, "fp16", 90) != tile
        assert pick("topk", 512, "fp16", 100) != tile
    assert pick("topk", 512, "fp16", 90) == base
    with tuned.using({("topk", 512, "fp16", 90): asdict(tile)}):
        assert candidates.shipped("topk", 512, "fp16", 90) == base
    with tuned.using({("topk", 64, "fp16", 90): asdict(tile)}):
        assert pick("topk", 64, "fp16", 90) == replace(tile, block_k=64, block_d=64)


def test_the_table_is_read_once_and_first_at_a_choice(monkeypatch, tmp_path):
    file = tmp_path / "tuned.json"
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    monkeypatch.setattr(tuned, "here", lambda: HERE)
    reads, read = [], tuned.read
    monkeypatch.setattr(tuned, "read", lambda file: reads.append(file) or read(file))
    tuned.write(file, [ENTRY])
    assert reads == []
    for _ in range(2):
        assert pick("topk", 512, "fp16", 90) == GOOD
    tuned.write(file, [])
    assert pick("topk", 512, "fp16", 90) == GOOD and reads == [file]
    with tuned.using({}):
        assert pick("topk", 512, "fp16", 90) != GOOD
    tuned.forget()
    assert pick("topk", 512, "fp16", 90) != GOOD


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "does not exist"),
        ("{", "cannot read the table"),
        ("[]", "has no list 'entries'"),
        ('{"format": 2, "entries": []}', "has format 2"),
        ('{"format": 1, "entries": [{"kernel": "topk"}]}', "entry 0: dim must be"),
    ],
)
def test_a_bad_file_is_one_warning_and_no_table(monkeypatch, tmp_path, text, reason):
    file = tmp_path / "tuned.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    with pytest.warns(UserWarning) as seen:
        first = pick("topk")
    assert len(seen) == 1 and reason in str(seen[0].message) and str(file) in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick("topk") == first == candidates.shipped("topk", 40, "fp32", 0)


def test_no_table_of_the_user_is_nothing_to_warn_of(monkeypatch, tmp_path):
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick("topk") == candidates.shipped("topk", 40, "fp32", 0)
