"""The table of cases, and how the command line chooses among them."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import cases, run
from benchmarks.cases import Case
from fastmargin import cli

CPU = torch.device("cpu")


def chosen(*arguments, device=CPU):
    return run.chosen_cases(run.parser().parse_args(arguments), device)


def test_names_are_different_and_every_suite_has_cases():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert {"cpu", "cpu-large", "gpu", "smoke"} == set(cases.SUITES)
    assert all(cases.of_suites([suite]) for suite in cases.SUITES)


def test_a_suite_a_name_or_values():
    assert chosen() == cases.of_suites(["cpu"])
    assert chosen(device=torch.device("cuda")) == cases.of_suites(["gpu"])
    assert [case.name for case in chosen("--case", "arc-20k", "ada-20k")] == ["arc-20k", "ada-20k"]
    both = chosen("--suite", "cpu", "--suite", "smoke")
    assert {suite for case in both for suite in case.suites} == {"cpu", "smoke"}
    own = chosen("--classes", "10", "20", "--rate", "0.5", "--state", "sgd", "--world", "2")
    assert [case.classes for case in own] == [10, 20] and len({case.name for case in own}) == 2
    assert {(case.rate, case.state, case.world) for case in own} == {(0.5, "sgd", 2)}
    assert own[0].batch == cases.of_suites(["cpu"])[0].batch


@pytest.mark.parametrize(
    "values",
    [
        {"margin": "sphere"},
        {"dtype": "int8"},
        {"state": "adam"},
        {"rate": 0.0},
        {"rate": 1.5},
        {"classes": 0},
        {"world": 0},
    ],
)
def test_a_case_that_cannot_be(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Case(**({"name": "x", "batch": 1, "classes": 2, "dim": 3} | values))


def test_gate_keeps_the_regime_and_not_the_size():
    big = Case("x", 4096, 10**7, 512, "cosface", "bfloat16", 0.1, "sgd", 8)
    small = cases.gate_case(big)
    assert (small.batch, small.classes, small.world) == (128, 4097, 1)
    assert (small.dim, small.margin, small.dtype, small.rate) == (512, "cosface", "bfloat16", 0.1)
    assert big.sampled == 10**6 and small.sampled == 409
    assert cases.from_dict(json.loads(json.dumps(vars(big)))) == big


def test_errors_of_the_command_line_name_the_remedy(capsys, tmp_path):
    assert run.main(["--case", "nothing"]) == 2
    assert "arc-20k" in capsys.readouterr().err
    assert run.main(["--case", "arc-20k", "--classes", "5"]) == 2
    assert "leave out" in capsys.readouterr().err
    assert run.main(["--rate", "2"]) == 2
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert run.main(["--compare", str(other), str(other)]) == 2
    assert "not a report" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run.main(["--device", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_the_command_lists_and_an_installed_copy_says_what_it_needs(monkeypatch, tmp_path):
    listed = CliRunner().invoke(cli.app, ["bench", "--list", "--device", "cpu"])
    assert listed.exit_code == 0
    for words in ("arc-20k", "fastmargin cpu fp32", "liger-kernel", "our own implementation"):
        assert words in listed.stdout
    assert CliRunner().invoke(cli.app, ["bench", "--help"]).exit_code == 0
    away = tmp_path / "site" / "fastmargin" / "cli" / "bench.py"
    monkeypatch.setattr(cli.bench, "__file__", str(away))
    away = CliRunner().invoke(cli.app, ["bench"])
    assert away.exit_code == 2 and "source checkout" in away.stderr
