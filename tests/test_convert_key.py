"""Centres under a named key of any ``torch.save`` file."""

from __future__ import annotations

import json

import pytest
import torch
from convert_files import centres
from typer.testing import CliRunner

import fastmargin as fm
from fastmargin import convert
from fastmargin.cli import app
from fastmargin.convert import ConvertError

WEIGHT = centres(9)

# file contents -> the key of the same centres
FILES = {
    "weight": {"weight": WEIGHT, "bias": torch.zeros(9)},
    "model.heads.weight": {"model": {"heads.weight": WEIGHT, "stem.weight": torch.ones(2, 3)}},
    "a.b.c.d": {"a": {"b": 3}, "a.b": {"c": {"d.e": WEIGHT + 1, "d": WEIGHT}}},
}


@pytest.fixture(params=FILES)
def named(request, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(FILES[request.param], path)
    return path, request.param


def test_a_key_is_found_wherever_it_has_dots(named):
    path, key = named
    found = convert.read(path, key=key)
    assert torch.equal(found.weight.tensor(0, 9), WEIGHT) and found.num_classes == 9


def test_a_transposed_matrix_with_sub_centres(tmp_path):
    torch.save({"W": WEIGHT.t().clone()}, tmp_path / "loss.pt")
    found = convert.read(tmp_path / "loss.pt", key="W", transposed=True, sub_centers=3)
    assert torch.equal(found.weight.tensor(0, 9), WEIGHT) and found.num_classes == 3


def test_command_to_a_head(named, tmp_path):
    path, key = named
    arguments = ["convert", str(path), str(tmp_path / "converted"), "--key", key, "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["classes"] == 9
    head = fm.MarginHead(WEIGHT.shape[1], 9, fm.CosFace())
    fm.checkpoint.load(tmp_path / "converted", {"head": head})
    assert torch.equal(head.weight, WEIGHT)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"key": "heads.weight"}, r"no matrix 'heads.weight'; .*model.heads.weight \(9, 6\)"),
        ({"key": "model"}, "no matrix 'model'"),
        ({"key": "model.heads.weight", "num_classes": 8}, "has 9 classes, and num_classes is 8"),
        ({"key": "model.heads.weight", "sub_centers": 2}, "no whole number of classes"),
        ({"key": "model.heads.weight", "format": "pml"}, "key goes without a format"),
        ({"transposed": True}, "transposed goes with a key"),
    ],
)
def test_what_is_refused(tmp_path, options, message):
    path = tmp_path / "model.pth"
    torch.save(FILES["model.heads.weight"], path)
    with pytest.raises(ConvertError, match=message):
        convert.read(path, **options)


def test_a_folder_has_no_key(tmp_path):
    with pytest.raises(ConvertError, match="is no file"):
        convert.read(tmp_path, key="weight")
