"""A whole run in small: rows, files, and what becomes of those that fail."""

from __future__ import annotations

import functools
import io
import json
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks import bench, compare, contenders, memory, report, run
from benchmarks.cases import Case

CPU = torch.device("cpu")
ARC = Case("arc", 16, 300, 32)
QUIET = bench.Settings(repeats=3, memory=False, accuracy=False, small_ceilings=True)
OURS = contenders.by_name("fastmargin cpu fp32", CPU)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The command, once: its folder and its report."""
    folder = tmp_path_factory.mktemp("bench")
    names = ["fastmargin cpu", "insightface-like", "liger"]
    values = ["--batch", "16", "--classes", "300", "600", "--dim", "32", "--state", "sgd"]
    status = run.main(
        [*values, "--only", *names, "--repeats", "3", "--device", "cpu", "--output", str(folder)]
    )
    assert status == 0
    return folder, json.loads((folder / "bench.json").read_text())


def test_rows_hold_everything(finished):
    _, found = finished
    assert len(found["rows"]) == 6
    for row in found["rows"]:
        if row["contender"].startswith("liger"):
            assert row["status"] == "not run" and row["reason"] == "needs a GPU"
            continue
        assert row["status"] == "measured" and row["gate"]["allowed"] == 3e-4
        assert set(row["gate"]["errors"]) == {"start", "confident"}
        seconds = row["seconds"]
        assert {len(laps) for laps in seconds.values()} == {3}
        parts = zip(*(seconds[p] for p in ("forward", "backward", "update")), strict=True)
        assert [sum(laps) for laps in parts] == pytest.approx(seconds["step"])
        low, median, high = (row["summary"]["step"][k] for k in ("low", "median", "high"))
        assert 0 < low <= median <= high
        # ours leaves the gradient to the optimiser
        assert row["gradient_bytes"] == (0 if row["ours"] else row["case"]["classes"] * 32 * 4)
        assert row["flops_per_s"] * median == pytest.approx(6 * 16 * row["case"]["classes"] * 32)
        assert 0 < row["share_of_floor"] and 0 <= row["disturbed_share"] <= 1
        if row["contender"] == "insightface-like":
            assert row["ratio"]["median"] == 1
    assert found["canary"]["seconds"] and found["ceilings"]["flops"] > 0
    gaps = {one["contender"]: [p["gap"] for p in one["points"]] for one in found["accuracy"]}
    assert gaps["fastmargin cpu fp32"][0] == -20 and len(gaps) == 2


def test_provenance_is_complete(finished):
    _, found = finished
    origin = found["provenance"]
    for name in ("device", "machine", "versions", "commit", "date", "command", "build"):
        assert origin[name], name
    assert origin["versions"]["torch"] and origin["machine"]["cores"] >= 1
    assert isinstance(origin["uncommitted_changes"], bool)


def test_pictures_and_table(finished):
    folder, found = finished
    names = {path.name for path in folder.iterdir()}
    for picture in ("identities", "roofline", "error"):
        assert {f"{picture}.png", f"{picture}.svg"} <= names
    console = Console(width=200, record=True, file=io.StringIO())
    report.print_report(console, found)
    text = console.export_text()
    assert "insightface-like" in text and "600 classes" in text
    assert text.count("not run: liger-kernel (softmax): needs a GPU") == 1


def test_numbers_in_words():
    assert [report.seconds(t) for t in (1.5, 0.4, 0.0123, 2e-6)] == [
        *("1.50 s", "400 ms", "12.3 ms", "2.00 us")
    ]
    summary = {"median": 0.778, "low": 0.673, "high": 1.85}
    assert report.spread(summary) == "778 ms (673 to 1850)"
    assert report.several([0.357, 0.724]) == "357 + 724 ms"
    assert [report.size(n) for n in (12, 1500, 2e6, 3.25e9)] == [
        *("12 B", "1.50 kB", "2.00 MB", "3.25 GB")
    ]


def test_a_report_agrees_with_itself_and_not_with_one_twice_as_slow(finished, tmp_path, capsys):
    folder, found = finished
    assert {one.verdict for one in compare.differences(found, found)} == {"same"}
    slow = json.loads(json.dumps(found))
    for row in slow["rows"]:
        if row["status"] == "measured" and row["ours"]:
            low, high = min(row["seconds"]["step"]), max(row["seconds"]["step"])
            row["seconds"]["step"] = [2 * high * high / low] * 3
            row["peak_bytes"] *= 3
    changed = compare.differences(found, slow)
    assert len(changed) == 4
    ours = [one for one in changed if one.contender.startswith("fastmargin")]
    assert ours and {one.verdict for one in ours} == {"slower"}
    assert {round(one.memory) for one in ours} == {3}
    assert {one.verdict for one in changed if one not in ours} == {"same"}
    back = compare.differences(slow, found)
    assert {one.verdict for one in back if one.contender.startswith("fastmargin")} == {"faster"}
    slow["provenance"]["device"] = "another"
    (tmp_path / "slow.json").write_text(json.dumps(slow))
    both = [str(folder / "bench.json"), str(tmp_path / "slow.json")]
    assert run.main(["--compare", *both]) == 0
    told = capsys.readouterr().out
    assert "slower" in told and "another" in told


def test_what_all_peers_do_is_the_machine():
    def report(**steps):
        rows = [
            {"case": {"name": "a"}, "contender": name, "ours": name == "own", "status": "measured"}
            | {"seconds": {"step": [value] * 3}}
            for name, value in steps.items()
        ]
        return {"rows": rows}

    first = report(own=1.0, one=1.0, two=1.0, three=1.0)
    slower_machine = report(own=2.0, one=2.0, two=2.0, three=2.0)
    found = compare.differences(first, slower_machine)
    assert [one.machine for one in found] == [2.0] * 4
    assert {one.verdict for one in found} == {"same"}
    own, one, *_ = compare.differences(first, report(own=3.0, one=3.0, two=2.0, three=2.0))
    assert (own.machine, own.step.median, own.verdict) == (2.0, 1.5, "slower")
    assert (one.step.median, one.verdict) == (1.5, "slower")  # a peer is not its own yardstick
    (alone,) = compare.differences(report(own=1.0), report(own=1.2))
    assert (alone.machine, alone.verdict) == (1.0, "slower")


def test_without_matplotlib_there_are_no_pictures_and_the_remedy(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks.plots", None)
    monkeypatch.delattr("benchmarks.plots", raising=False)
    run.draw({}, tmp_path, Console(width=200))
    assert "pip install 'fastmargin[bench]'" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def rows_with(monkeypatch, taker, settings=QUIET):
    monkeypatch.setattr(contenders, "everybody", lambda device: (OURS, taker))
    return bench.run([ARC], CPU, settings)["rows"]


def failing(error, after):
    """Ours that raises in its ``after``-th step: the gate takes two."""
    calls = []

    def make(case, weight):
        head = OURS.make(case, weight)
        right = head.loss

        def loss(x, labels):
            calls.append(1)
            if len(calls) > after:
                raise error
            return right(x, labels)

        return replace(head, loss=loss)

    return replace(OURS, name="failing", make=make)


@pytest.mark.parametrize("after", [0, 2, 5])
def test_an_error_is_a_row_that_says_so(monkeypatch, after):
    right, wrong = rows_with(monkeypatch, failing(ValueError("no such kernel"), after))
    assert right["status"] == "measured"
    assert wrong["status"] == "failed" and "no such kernel" in wrong["reason"]
    assert "seconds" not in wrong
    _, full = rows_with(monkeypatch, failing(torch.OutOfMemoryError("out of memory"), after))
    assert full["status"] == "out of memory" and "seconds" not in full


def test_compiled_peers_are_compiled_in_every_round(monkeypatch):
    """The compiler forgets the heads before: after eight versions of one it would give up."""
    compiled, compile_ = [], torch.compile

    def counting(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=counting))
    taker = contenders.by_name("insightface-like, compiled", CPU)
    monkeypatch.setattr(contenders, "everybody", lambda device: (taker,))
    (row,) = bench.run([ARC], CPU, replace(QUIET, rounds=10, repeats=10))["rows"]
    assert row["status"] == "measured" and len(row["seconds"]["step"]) == 10
    assert len(compiled) >= 11  # the gate's, and one in every round


def test_out_of_memory_in_the_fresh_process_spares_this_one(monkeypatch):
    def killed(case, name, threads):
        if name == "failing":
            raise memory.OutOfMemory("killed")
        return memory.Peak(1000, 10)

    monkeypatch.setattr(memory, "in_fresh_process", killed)
    taker = failing(AssertionError("it was run here all the same"), 2)
    right, full = rows_with(monkeypatch, taker, replace(QUIET, memory=True))
    assert right["status"] == "measured" and right["peak_bytes"] == 1000
    assert full["status"] == "out of memory" and "killed" in full["reason"]


def test_as_many_pieces_as_were_announced(monkeypatch):
    monkeypatch.setattr(contenders, "everybody", lambda device: (OURS,))
    monkeypatch.setattr(memory, "in_fresh_process", lambda *a: memory.Peak(1, 1))
    for settings in (QUIET, replace(QUIET, memory=True)):
        told = []
        bench.run([ARC, replace(ARC, name="b")], CPU, settings, told.append)
        assert len(told) == bench.pieces([ARC, ARC], CPU, settings)


def test_traces(tmp_path):
    only = ["--only", "fastmargin cpu fp32", "--profile", str(tmp_path), "--device", "cpu"]
    assert run.main(["--case", "smoke-pfc", *only]) == 0
    (file,) = tmp_path.iterdir()
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert {"forward", "backward", "update"} <= names


@pytest.mark.dist
@pytest.mark.slow
def test_a_case_of_two_processes():
    case = replace(ARC, margin="cosface", state="sgd", world=2)
    only = ("fastmargin cpu fp32", "insightface-like")
    (row,) = bench.run([case], CPU, replace(QUIET, only=only))["rows"]
    assert row["status"] == "measured", row["reason"]
    assert row["gate"]["errors"]["start"]["d_weight"] < 1e-5
    assert set(row["seconds"]) == {"forward", "backward", "update", "step"}
