"""The doctor tells right from wrong."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from fastmargin import backends, doctor
from fastmargin.cli import app

KERNEL = {"name": "k", "arch": 90, "registers": 255, "stack": 0, "shared": 65536, "fits": True}


def test_report_as_json():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["healthy"]
    assert report["backends"]["reference"] is None and report["backends"]["cpu"] is None
    assert {"reference", "cpu"} <= report["self_test"].keys()
    for test in report["self_test"].values():
        assert test["passed"] and 0 < test["errors"]["fp32"] < 3e-5
    assert report["environment"]["torch"] == torch.__version__


def test_wrong_results_are_found(monkeypatch):
    right = backends.get("cpu").row_stats_backward
    monkeypatch.setattr(
        type(backends.get("cpu")), "row_stats_backward", lambda self, *a: right(*a) * 1.001
    )
    assert not doctor.self_test("cpu")["passed"] and doctor.self_test("reference")["passed"]
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "WRONG" in result.stdout


@pytest.mark.parametrize("fits", [True, False])
def test_kernels_are_listed(monkeypatch, fits):
    monkeypatch.setattr(doctor, "kernels", lambda: [KERNEL | {"fits": fits}])
    result = CliRunner().invoke(app, ["doctor", "--kernels"])
    assert result.exit_code == (0 if fits else 1)
    assert "255" in result.stdout and "64" in result.stdout


def test_advice_names_the_remedy():
    reasons = {"reference": None, "cpu": "not compiled. Reinstall", "triton": "x", "cuda": "x"}
    assert "Reinstall" in doctor.advice(reasons)[0]
    assert doctor.advice(reasons | {"cpu": None}) == []
