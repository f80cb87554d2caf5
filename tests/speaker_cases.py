"""What the tests of the speaker heads share."""

from __future__ import annotations

import pytest
import torch

from fastmargin.compat import chunked
from fastmargin.compat import logits as logits_module
from fastmargin.compat.chunked import ChunkedScores
from fastmargin.compat.scores import CentreScores
from fastmargin.testing import relative_error

B, C, D, S = 12, 31, 10, 20.0


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 9)


@pytest.fixture
def never_dense(monkeypatch):
    """Fails where all logits are computed with a gradient, as training would."""

    def guard(kind):
        compute = kind.dense

        def dense(self):
            wanted = torch.is_grad_enabled() and any(each.requires_grad for each in self.inputs)
            assert not wanted, "all logits were computed"
            return compute(self)

        monkeypatch.setattr(kind, "dense", dense)

    guard(CentreScores)
    guard(ChunkedScores)


@pytest.fixture
def told_anew(monkeypatch):
    monkeypatch.setattr(logits_module, "_warned", False)


def batch(weight, dtype=torch.float64, seed=0):
    """Embeddings and labels; one label in the last chunk, one row nearly opposite to its centre."""
    g = torch.Generator().manual_seed(seed)
    x = (2 * torch.randn(B, D, generator=g)).to(dtype)
    labels = torch.randint(0, C, (B,), generator=g)
    labels[0] = C - 1
    first = labels[1] * (len(weight) // C)
    x[1] = -3 * weight.detach()[first].to(dtype) + 0.01 * x[1]
    return x.requires_grad_(), labels


def with_gradients(function, *leaves):
    leaves = [each.detach().requires_grad_() for each in leaves]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def close(found, expected, bound=1e-9):
    for mine, truth in zip(found, expected, strict=True):
        assert relative_error(mine, truth) < bound
