"""Heads, batches and optimisers for the tests of the step inside the centre pass."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import BACKENDS, device_for
from sharded_cases import DIM, MARGINS, batch_of

import fastmargin as fm
from fastmargin import ops
from fastmargin.optim import RowSGD

RULES = {
    "plain": {"lr": 0.3},
    "decay": {"lr": 0.3, "weight_decay": 0.1},
    "momentum": {"lr": 0.3, "momentum": 0.9},
    "nesterov": {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
}
RULE = RULES["nesterov"]
CLASSES = 70


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last one short: 16 rows of float64."""
    for backend in BACKENDS:
        monkeypatch.setattr(type(fm.backends.get(backend)), "step_bytes", 16 * DIM * 8)


@pytest.fixture
def stepped(monkeypatch):
    """The factors of every centre pass that was a step."""
    found, step = [], ops.centre_step

    def noting(weight, momentum, update, one):
        found.append(one)
        step(weight, momentum, update, one)

    monkeypatch.setattr(ops, "centre_step", noting)
    return found


def close(dtype):
    return (
        {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    )


def make_head(margin, backend, dtype, **options):
    device = device_for(backend)
    precision = "auto" if dtype == torch.float64 else "fp32"
    options = {"backend": backend, "precision": precision} | options
    head = fm.MarginHead(DIM, CLASSES, MARGINS[margin](), **options).to(device, dtype)
    with torch.no_grad():
        head.weight.copy_(batch_of(CLASSES)[1])
    return head


def batches(count, like):
    for step in range(count):
        x, _, labels = batch_of(CLASSES, step)
        yield x.to(like), labels.to(like.device)


def train(head, optimizer, count=3, passes=1):
    """Steps with a schedule; losses, weights, momentum and the margin's state after them."""
    losses = []
    for step, (x, labels) in enumerate(batches(count * passes, head.weight)):
        if step % passes == 0:
            optimizer.zero_grad()
        loss = head(x, labels)
        loss.backward()
        losses.append(loss.detach())
        if getattr(optimizer, "fused", False) and not isinstance(head.margin, fm.NPT):
            assert head.weight.grad is None
        if step % passes == passes - 1:
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.7
    if hasattr(optimizer, "settle"):
        optimizer.settle()
    state = dict(optimizer.state[head.weight])
    buffer = state.get("momentum_buffer")
    return [
        *losses,
        head.weight.detach(),
        torch.zeros(()) if buffer is None else buffer,
        *head.margin.state_dict().values(),
    ]


def same(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def both(head, rule=RULE, count=3, passes=1, **options):
    """What the same head finds with and without the gradient."""
    twin = copy.deepcopy(head)
    found = train(head, RowSGD(head.parameters(), **rule, **options, fused=True), count, passes)
    expected = train(twin, RowSGD(twin.parameters(), **rule, **options), count, passes)
    return found, expected
