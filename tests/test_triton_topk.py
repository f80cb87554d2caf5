"""Triton's nearest negatives against the reference in float64: exact, and ties go one way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import device_for
from triton_cases import (
    check_topk,
    problem,
    staged_in_pieces,
    through_index,
)

from fastmargin.backends.triton import BACKEND as TRITON


@pytest.fixture(autouse=True)
def device():
    return device_for("triton")


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_topk(k):
    check_topk(problem("some_ignored", batch=10, dim=40), k)


@pytest.mark.parametrize("regime", ["ragged", "one_row", "one_class", "two_classes", "zero_rows"])
def test_topk_regimes(regime):
    check_topk(problem(regime, batch=9), 3)


def test_topk_ties_go_to_the_lower_index():
    on = device_for("triton")
    axes = torch.eye(24)  # cosines of exactly 0 and 1, so that equal ones are equal in any order
    weight = axes[torch.arange(70) % 20].clone()
    weight[40:50] = 0
    labels = torch.tensor([31, 0, 1, 2])
    x_hat = torch.stack([axes[11], axes[0], torch.zeros(24), -torch.zeros(24)])
    value, index, _ = TRITON.row_topk(
        x_hat.to(on), weight.to(on), None, labels.to(on), 3, 0, "fp32"
    )
    # classes 11, 31 (the label), 51; 0 (the label), 20, 60; then the lowest of those with 0
    assert index.tolist() == [[11, 51, 0], [20, 60, 1], [0, 2, 3], [0, 1, 3]]
    assert value.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_topk_of_a_shard_and_of_transposed_weights():
    p = problem(batch=6, class_start=500)
    check_topk(p, 2)
    check_topk(replace(p, weight=p.weight.t().contiguous().t()), 2)


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_topk_operand_types(precision):
    p = problem(batch=6)
    if precision == "bf16":
        p = replace(p, weight=p.weight.bfloat16(), x_hat=p.x_hat.bfloat16().float())
    on = device_for("triton")
    value, index, _ = TRITON.row_topk(
        p.x_hat.to(on), p.weight.to(on), None, p.labels.to(on), 4, 0, precision
    )
    cos = p.x_hat @ F.normalize(p.weight.float()).t()
    atol = 4e-3 if precision == "bf16" else 1e-3
    torch.testing.assert_close(value.cpu(), cos.gather(1, index.cpu()), rtol=0, atol=atol)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("k", [1, 5])
def test_topk_of_centres_in_pieces(k, precision, monkeypatch):
    """What one piece has found the next one goes on from; a piece may have fewer than k."""
    staged_in_pieces(monkeypatch, columns=3)
    p = problem("some_ignored", classes=70, dim=40, class_start=1000)
    check_topk(p, k, precision)
    check_topk(through_index(p), k, precision)
