"""The command ``fastmargin tune``: what was chosen is written, and is then used."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from tune_cases import (
    ENTRY,
    GOOD,
    HERE,
    OTHER,
    SHAPE,
    Bars,
    TileClock,
    interpreted_machine,
    pick,
)

from fastmargin import doctor
from fastmargin.backends.triton import tuned
from fastmargin.backends.triton.configs import TileConfig
from fastmargin.cli import app
from fastmargin.tune import candidates, command, problem
from fastmargin.tune import search as search_module
from fastmargin.tune.problem import PLAIN, Shape
from fastmargin.tune.trial import Machine, Trial, TuneError


@pytest.fixture(autouse=True)
def fresh_table():
    tuned.forget()
    yield
    tuned.forget()


@pytest.fixture
def interpreter():
    return interpreted_machine()


# ---- the command ----


@pytest.fixture
def settings(tmp_path):
    return command.Settings(
        (40,), 18, 40, "fp32", ("stats_sum",), 3600, output=tmp_path / "tuned.json"
    )


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(candidates, "grid", lambda *_: [GOOD, OTHER])


def on_clock(times):
    return Machine(torch.device("cpu"), tuned.INTERPRETER, 0, TileClock(times))


def test_from_candidates_to_a_choice(interpreter, settings, few, monkeypatch):
    """Measured, written, and taken by the next pass that runs."""
    figures = command.run(settings, on_clock({GOOD: 0.5}), Bars())
    (row,) = figures["results"]
    assert row["faster"] and row["chosen"] == asdict(GOOD) and row["ratio"] == 0.5
    (entry,) = tuned.read(settings.output).entries
    assert entry.tile == asdict(GOOD)
    assert entry.key[:5] == ("stats_sum", 40, "fp32", tuned.INTERPRETER, 0)
    made = entry.made
    assert (made["batch"], made["classes"]) == (18, 40) and made["torch"] == torch.__version__
    assert made["shipped_ms"] == 1000 and made["chosen_ms"] == 500
    assert made["shipped_tile"] == asdict(candidates.shipped("stats_sum", 40, "fp32", 0))
    monkeypatch.setenv(tuned.VARIABLE, str(settings.output))
    assert pick("stats_sum") == GOOD

    taken, arguments = [], TileConfig.arguments
    monkeypatch.setattr(TileConfig, "arguments", lambda tile: taken.append(tile) or arguments(tile))
    problem.run(problem.make_problem("stats_sum", SHAPE, "fp32", PLAIN, torch.device("cpu")))
    assert taken == [GOOD]


def test_measured_in_the_interpreter(interpreter, settings, few, monkeypatch):
    """With the real clock; which tile wins is not said beforehand."""
    monkeypatch.setattr(search_module, "MOST_TURNS", 2)
    figures = command.run(settings, interpreter, Bars())
    (row,) = figures["results"]
    assert row["looked_at"] == 2 and row["refused"] == [] and row["shipped_ms"]["median"] > 0
    assert len(tuned.read(settings.output).entries) == row["faster"]


def test_the_table_of_before_is_tried_first_and_corrected(interpreter, settings, monkeypatch):
    monkeypatch.setattr(candidates, "grid", lambda *_: [OTHER])
    at = tuned.here()
    here = (tuned.INTERPRETER, 0, at.triton, at.fastmargin)
    mine = tuned.Entry("stats_sum", 40, "fp32", *here, asdict(GOOD))
    tuned.write(settings.output, [ENTRY, mine])
    clock = on_clock({GOOD: 0.5, OTHER: 0.6})
    command.run(settings, clock, Bars())
    assert next(t for t in clock.clock.asked if t in (GOOD, OTHER)) == GOOD
    assert [e.tile for e in tuned.read(settings.output).entries] == [ENTRY.tile, asdict(GOOD)]
    command.run(settings, on_clock({}), Bars())  # now it is no faster than as shipped
    assert tuned.read(settings.output).entries == (ENTRY,)


def test_an_interrupt_keeps_what_is_done(interpreter, settings, few):
    class Interrupted(TileClock):
        def seconds(self, work):
            if tuned.lookup(*self.problem) is None:  # another kernel
                raise KeyboardInterrupt
            return super().seconds(work)

    machine = replace(interpreter, clock=Interrupted({GOOD: 0.5}))
    figures = command.run(replace(settings, kernels=("stats_sum", "topk")), machine, Bars())
    assert figures["interrupted"] and [r["kernel"] for r in figures["results"]] == ["stats_sum"]
    assert len(tuned.read(settings.output).entries) == 1


def test_an_error_later_on_keeps_what_is_done(interpreter, settings, few, monkeypatch):
    made = command.Trial

    def fail(kernel, *rest):
        if kernel == "topk":
            raise TuneError("out of luck")
        return made(kernel, *rest)

    monkeypatch.setattr(command, "Trial", fail)
    both = replace(settings, kernels=("stats_sum", "topk"))
    figures = command.run(both, on_clock({GOOD: 0.5}), Bars())
    assert figures["error"] == "out of luck" and len(figures["results"]) == 1
    assert len(tuned.read(settings.output).entries) == 1
    with pytest.raises(TuneError, match="out of luck"):
        command.run(replace(settings, kernels=("topk",)), on_clock({}), Bars())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dims": (2000,)}, "--dim must be from 1 to 1024, got 2000"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"classes": 1}, "--classes must be at least 2"),
        ({"precision": "fp8"}, "--precision must be one of"),
        ({"kernels": ("stats",)}, "--kernel must be one of"),
        ({"seconds": 0.0}, "--seconds must be more than 0"),
    ],
)
def test_bad_settings_are_refused_first(interpreter, settings, monkeypatch, change, reason):
    monkeypatch.setattr(command, "Trial", None)
    with pytest.raises(TuneError, match=reason):
        command.run(replace(settings, **change), interpreter, Bars())


def test_a_file_that_cannot_be_written_is_refused_first(
    interpreter, settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "Trial", None)
    with pytest.raises(OSError, match="folder"):
        command.run(replace(settings, output=tmp_path), interpreter, Bars())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="no folder"):
        command.run(replace(settings, output=tmp_path / "file" / "t.json"), interpreter, Bars())
    settings.output.write_text("{")
    with pytest.raises(tuned.TableError, match="cannot read"):
        command.run(settings, interpreter, Bars())
    assert settings.output.read_text() == "{"
    with pytest.raises(TuneError, match="is empty"):  # FASTMARGIN_TUNED, in the tests
        command.run(replace(settings, output=None), interpreter, Bars())


def invoke(*arguments, code=0, **environ):
    environ = {"COLUMNS": "200", "NO_COLOR": "1"} | environ
    outcome = CliRunner().invoke(app, ["tune", *map(str, arguments)], env=environ)
    assert outcome.exit_code == code, outcome.output
    return outcome


def test_command(interpreter, few, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "machine", lambda: on_clock({GOOD: 0.5}))
    file = tmp_path / "mine.json"
    options = ("--dim", 40, "--batch", 18, "--classes", 40, "--precision", "fp32")
    options = (*options, "--kernel", "stats_sum", "--seconds", 3600, "--output", file)
    text = invoke(*options, "--dry-run").stdout
    assert "Nothing was measured" in text and str(file) in text and not file.exists()
    assert "16 32 32 32, 4 warps, 1 stage" in text
    figures = json.loads(invoke(*options, "--dry-run", "--json").stdout)
    assert figures["results"][0]["candidates"] == [asdict(GOOD), asdict(OTHER)]
    text = invoke(*options).stdout
    assert "32 16 64 64, 4 warps, 1 stage " in text and "0.500" in text
    assert "1 of 1 faster than as shipped" in text and str(file) in text
    figures = json.loads(invoke(*options, "--json").stdout)
    assert figures["results"][0]["chosen"] == asdict(GOOD)
    assert len(tuned.read(file).entries) == 1
    assert "Would delete" in invoke("--reset", "--dry-run", "--output", file).stdout
    assert file.exists()
    assert f"Deleted {file}" in invoke("--reset", "--output", file).stdout
    assert not file.exists()
    assert f"No {file}" in invoke("--reset", "--output", file).stdout
    ended = {"results": [], "interrupted": True}
    monkeypatch.setattr(command, "run", lambda *_: ended)
    invoke(*options, "--json", code=130)
    monkeypatch.setattr(command, "run", lambda *_: ended | {"interrupted": False, "error": "x"})
    invoke(*options, "--json", code=1)


def test_command_without_a_gpu(interpreter, monkeypatch, tmp_path):
    assert "TRITON_INTERPRET is set" in invoke(code=1).stderr
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "measured on a CUDA GPU, and there is none here" in invoke(code=1).stderr
    outcome = invoke("--reset", code=1)
    assert "FASTMARGIN_TUNED is empty" in outcome.stderr
    mine = tmp_path / "t.json"
    mine.touch()
    invoke("--reset", FASTMARGIN_TUNED=str(mine))
    assert not mine.exists()


def test_the_doctor_tells_of_the_table(monkeypatch, tmp_path):
    def lines():
        return doctor.tile_shapes(tuned.describe())

    assert lines() == ["Tile shapes of the Triton kernels: as shipped; FASTMARGIN_TUNED is empty"]
    file = tmp_path / "tuned.json"
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    assert "as shipped" in lines()[0] and "does not exist" in lines()[1]
    monkeypatch.setattr(tuned, "here", lambda: HERE)
    passed = {"errors": {"fp32": 0.0}, "passed": True}
    monkeypatch.setattr(doctor, "self_test", lambda _: passed)
    tuned.write(file, [ENTRY, replace(ENTRY, kernel="centre_pass"), replace(ENTRY, arch=100)])
    first, second = lines()
    assert f"{file}, 2 of 3 entries in use here" in first
    assert second == "left out: there is no gpu here"
    file.write_text("{")
    assert "cannot read the table" in lines()[1]
    report = doctor.examine()
    assert report["tuned"] == tuned.describe()
    outcome = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert f"Tile shapes of the Triton kernels: {file}, 0 of 0 entries" in outcome.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    settings = command.Settings(
        (128,), 256, 20_000, "fp16", ("stats_sum", "centre_pass"), 15, output=tmp_path / "t.json"
    )
    figures = command.run(settings, command.machine(), Bars())
    for row in figures["results"]:
        assert row["looked_at"] > 0 and row["shipped_ms"]["median"] > 0
    applied = tuned.applicable(tuned.read(settings.output), tuned.here())
    assert len(applied) == sum(row["faster"] for row in figures["results"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_spill_on_a_gpu_is_refused():
    found = Trial("centre_pass", Shape(128, 512, 512), "fp16", command.machine())
    reason = found.wrong(TileConfig(64, 128, 64, 512, 4, 1))
    assert reason and ("spills" in reason or "OutOfResources" in reason)
