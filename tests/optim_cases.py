"""What the tests of the optimisers over rows share."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fastmargin import deferred
from fastmargin.optim import RowAdamW, RowSGD, row_chunks

C, D = 23, 4
TINY = 1e-30  # an eps that even float64 does not see

RULES = {
    "sgd": (RowSGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd_decay": (RowSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd_momentum": (RowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd_both": (RowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "sgd_nesterov": (
        RowSGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    ),
    "adamw": (RowAdamW, torch.optim.AdamW, {"lr": 0.1, "eps": TINY}),
    "adamw_no_decay": (RowAdamW, torch.optim.AdamW, {"lr": 0.1, "eps": TINY, "weight_decay": 0.0}),
    "adamw_fast": (
        RowAdamW,
        torch.optim.AdamW,
        {"lr": 0.1, "eps": TINY, "weight_decay": 0.3, "betas": (0.8, 0.95)},
    ),
}
ALL = pytest.mark.parametrize("rule", RULES)
MODES = pytest.mark.parametrize("unsampled", ["lazy", "dense"])


def sparse(ids, values, rows=C):
    ids = torch.as_tensor(ids, dtype=torch.int64)[None]
    return torch.sparse_coo_tensor(ids, values, (rows, *values.shape[1:]), check_invariants=True)


def random_grad(count, rows=C, dtype=torch.float64, dim=D, scale=1.0):
    """Uncoalesced, with duplicates."""
    values = torch.randn(count, dim, dtype=dtype) * scale
    return sparse(torch.randint(0, rows, (count,)), values, rows)


def parameter(rows=C, dim=D, dtype=torch.float64):
    return nn.Parameter(torch.randn(rows, dim, dtype=dtype))


class Pair:
    """The optimiser under test and torch's, on equal parameters with equal gradients."""

    def __init__(self, rule, unsampled="lazy", like=None, **options):
        ours, theirs, numbers = RULES[rule]
        self.weight = parameter() if like is None else like
        self.dense = nn.Parameter(self.weight.detach().clone())
        self.ours = ours([self.weight], unsampled=unsampled, **{**numbers, **options})
        self.theirs = theirs([self.dense], **{**numbers, **options})

    def step(self, grad):
        self.weight.grad = grad
        self.dense.grad = grad.to_dense() if grad.is_sparse else grad.clone()
        self.ours.step()
        self.theirs.step()

    def check(self, rows=None, **tolerance):
        tolerance = tolerance or {"rtol": 1e-11, "atol": 1e-12}
        deferred.settle(self.weight, rows)
        rows = ... if rows is None else rows[rows >= 0]
        torch.testing.assert_close(self.weight[rows], self.dense[rows], **tolerance)
        state, other = self.ours.state[self.weight], self.theirs.state[self.dense]
        for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            if other.get(name) is not None:
                torch.testing.assert_close(state[name][rows], other[name][rows], **tolerance)


@pytest.fixture
def small_chunks(monkeypatch):
    """Three rows of float64 in a chunk."""
    monkeypatch.setattr(row_chunks, "CHUNK_BYTES", 3 * D * 8)


def eps_for(rule):
    return {"eps": 1e-8} if rule.startswith("adamw") else {}


def duplicate(pair, how):
    """Goes on with a copy of the optimiser under test."""
    if how == "state_dict":
        saved = copy.deepcopy(pair.ours.state_dict())
        weight = nn.Parameter(pair.weight.detach().clone())
        pair.ours = type(pair.ours)([weight], lr=0.0)
        pair.ours.load_state_dict(saved)
        pair.weight = weight
        return
    both = pair.weight, pair.ours
    copied = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert copied[0] is not pair.weight
    pair.weight, pair.ours = copied
