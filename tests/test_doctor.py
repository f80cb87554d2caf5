"""The doctor tells right from wrong."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from fastmargin import backends, doctor
from fastmargin.cli import app

KERNEL = {
    **{"name": "k", "arch": 90, "registers": 255, "stack": 0, "shared": 65536, "fits": True},
    **{"products": "wgmma.mma_async", "serial": False},
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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


def test_advice_names_the_remedy(monkeypatch, threads):
    reasons = {"reference": None, "cpu": "not compiled. Reinstall", "triton": "x", "cuda": "x"}
    assert "Reinstall" in doctor.advice(reasons)[0]
    torch.set_num_threads(doctor._cores())
    assert doctor.advice(reasons | {"cpu": None}) == []
    torch.set_num_threads(1)
    monkeypatch.setattr(doctor, "_cores", lambda: 3)
    assert "torch uses 1 of 3 cores" in doctor.advice(reasons | {"cpu": None})[0]


USAGE = """
Fatbin elf code:
================
arch = sm_80
host = linux
Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN10fastmargin4cuda16unit_rows_kernelINS_4HalfELi8EEEvNS0_14UnitRowsLaunchIT_EE:
  REG:40 STACK:0 SHARED:256 LOCAL:0 CONSTANT[0]:424 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90a
 Function _ZN10fastmargin4cuda18margin_rows_kernelIfEEvNS_14MarginRowsArgsIT_EE:
  REG:32 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:720 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_resource_usage_is_read():
    first, second = doctor.read_resource_usage(USAGE)
    assert first == {
        **{"name": "unit_rows_kernel fp16 x8", "arch": "80", "registers": 40},
        **{"stack": 0, "spilled": 0, "shared": 256, "fits": True},
    }
    assert second["name"] == "margin_rows_kernel fp32" and second["arch"] == "90a"
    assert (second["stack"], second["spilled"], second["fits"]) == (16, 8, False)


def test_cuda_kernels_are_listed_and_a_spill_is_not_healthy(monkeypatch):
    monkeypatch.setattr(doctor, "cuda_kernels", lambda: doctor.read_resource_usage(USAGE))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "unit_rows_kernel" in result.stdout
    monkeypatch.setattr(doctor, "cuda_kernels", lambda: "nothing is compiled")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and "nothing is compiled" in result.stdout


def test_compiled_kernels_do_not_spill():
    found = doctor.cuda_kernels()
    if isinstance(found, str):
        pytest.skip(found)
    assert {"margin_rows_kernel fp32"} <= {kernel["name"] for kernel in found}
    assert all(kernel["fits"] and 0 < kernel["registers"] <= 255 for kernel in found)
