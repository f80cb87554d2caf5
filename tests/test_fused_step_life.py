"""The step inside the centre pass: copies, scalers, processes, and who must not see factors."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
import weakref

import fused_step_cases
import pytest
import torch
from fused_step_cases import (
    CLASSES,
    RULE,
    batches,
    close,
    make_head,
    same,
    train,
)
from processes import run, run_world
from sharded_cases import DIM, batch_of, compare, head_of, own_rows, steps
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

import fastmargin as fm
from fastmargin import factors
from fastmargin.optim import RowAdamW, RowSGD

# fixtures
small_chunks, stepped = fused_step_cases.small_chunks, fused_step_cases.stepped


# ---- the life of an optimiser -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "module"])
def test_copies_go_on(how):
    head = make_head("arcface", "reference", torch.float64)
    twin = copy.deepcopy(head)
    optimizer = RowSGD(head.parameters(), **RULE, fused=True)
    train(head, optimizer, 2)
    x, labels = next(batches(1, head.weight))
    head(x, labels).backward()  # which a copy does not take along
    if how == "deepcopy":
        head, optimizer = copy.deepcopy((head, optimizer))
    elif how == "pickle":
        head, optimizer = pickle.loads(pickle.dumps((head, optimizer)))
    elif how == "state_dict":
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.zero_grad()
        optimizer = RowSGD(head.parameters(), lr=9.0, fused=True)
        optimizer.load_state_dict(saved)
    else:  # a copied module is nobody's
        other = copy.deepcopy(head)
        other(x, labels).backward()
        assert other.weight.grad is not None and not factors.is_kept(other.weight)
        optimizer.zero_grad()
    assert optimizer.fused and not factors.pending(head.weight)
    found = train(head, optimizer, 3)
    expected = RowSGD(twin.parameters(), **RULE)
    train(twin, expected, 2)
    same(found, train(twin, expected, 3), **close(torch.float64))


def test_a_dropped_optimiser_leaves_gradients_again():
    head = make_head("arcface", "reference", torch.float64)
    x, labels = next(batches(1, head.weight))
    optimizer = RowSGD(head.parameters(), **RULE, fused=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    seen, weight = weakref.ref(optimizer), weakref.ref(head.weight)
    head(x, labels).backward()
    assert head.weight.grad is None and len(factors.pending(head.weight)) == 1
    del optimizer, schedule
    gc.collect()
    assert seen() is None and not factors.is_kept(head.weight)
    head(x, labels).backward()
    assert head.weight.grad is not None
    optimizer, count = RowSGD(head.parameters(), 0.1, fused=True), len(factors._kept)
    factors.release(head.weight, optimizer)
    assert not factors.is_kept(head.weight) and len(factors._kept) == count - 1
    factors.keep(head.weight, optimizer)
    head(x, labels).backward()
    del head, optimizer
    gc.collect()
    assert weight() is None and len(factors._kept) == count - 1


def test_groups_added_later():
    heads = [make_head("arcface", "reference", torch.float64) for _ in range(2)]
    twins = copy.deepcopy(heads)
    for pair, fused in ((heads, True), (twins, False)):
        optimizer = RowSGD(pair[0].parameters(), **RULE, fused=fused)
        optimizer.add_param_group({"params": pair[1].parameters(), "lr": 0.01})
        for x, labels in batches(2, pair[0].weight):
            optimizer.zero_grad()
            (pair[0](x, labels) + pair[1](x, labels)).backward()
            assert (pair[1].weight.grad is None) == fused
            optimizer.step()
    for a, b in zip(heads, twins, strict=True):
        torch.testing.assert_close(a.weight, b.weight, **close(torch.float64))


def test_a_step_takes_the_factors_and_zero_grad_drops_them(stepped):
    head = make_head("arcface", "reference", torch.float64)
    optimizer = RowSGD(head.parameters(), 0.1, fused=True)
    x, labels = next(batches(1, head.weight))
    before = head.weight.detach().clone()
    head(x, labels).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(head.weight, before) and not stepped and not optimizer.state

    def closure():
        optimizer.zero_grad()
        loss = head(x, labels)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    after = head.weight.detach().clone()
    optimizer.step()
    assert torch.equal(head.weight, after) and len(stepped) == 1
    assert optimizer.step(closure) < first


@pytest.mark.parametrize("margin", ["arcface", "no_form"])
def test_gradients_that_are_asked_for(margin):
    """Other than by accumulation into ``grad``, they leave no factors and are what they are."""
    head = make_head(margin, "reference", torch.float64)
    optimizer = RowSGD(head.parameters(), 0.1, fused=True)
    x, labels = next(batches(1, head.weight))
    x.requires_grad_()
    twin = copy.deepcopy(head)
    expected, of_weight = torch.autograd.grad(twin(x, labels), (x, twin.weight))
    assert torch.equal(torch.autograd.grad(head(x, labels), x)[0], expected)
    assert torch.equal(torch.autograd.grad(head(x, labels), head.weight)[0], of_weight)
    head(x, labels).backward(inputs=[x])
    assert torch.equal(x.grad, expected) and head.weight.grad is None
    assert not factors.pending(head.weight)
    head(x, labels).backward(inputs=[head.weight])
    assert head.weight.grad is None and len(factors.take(head.weight)) == 1
    x.grad = None
    head.weight.requires_grad_(False)
    head(x, labels).backward()
    assert torch.equal(x.grad, expected) and not factors.pending(head.weight)
    assert optimizer.fused


@pytest.mark.parametrize("how", ["compile", "checkpoint", "offload"])
def test_gradients_that_are_formed_all_the_same(how, stepped):
    torch._dynamo.reset()
    head = make_head("arcface", "cpu", torch.float64)
    twin = copy.deepcopy(head)
    optimizers = [RowSGD(head.parameters(), **RULE, fused=True), RowSGD(twin.parameters(), **RULE)]
    call = torch.compile(head, fullgraph=True, backend="aot_eager")
    if how == "checkpoint":
        call = functools.partial(checkpoint, head, use_reentrant=False)
    if how == "offload":

        def call(x, labels):
            with torch.autograd.graph.save_on_cpu():
                return head(x, labels)

    for x, labels in batches(2, head.weight):
        for run_, optimizer in zip((call, twin), optimizers, strict=True):
            optimizer.zero_grad()
            run_(x.clone().requires_grad_(), labels).backward()
            optimizer.step()
    torch.testing.assert_close(head.weight, twin.weight, **close(torch.float64))
    assert not stepped


# ---- GradScaler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["beside", "with"])
def test_gradient_scaler(backbone):
    """As without factors, whether found_inf comes from a gradient or from the factors."""
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        head, layer = make_head("arcface", "cpu", torch.float32), nn.Linear(DIM, DIM)
        modules = (head, layer) if backbone == "with" else (head,)
        optimizers = [RowSGD([p for m in modules for p in m.parameters()], **RULE, fused=fused)]
        if backbone == "beside":
            optimizers.append(torch.optim.SGD(layer.parameters(), 0.1))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for step, (x, labels) in enumerate(batches(6, head.weight)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = head(layer(x), labels)
            if step == 3:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            if step == 5 and backbone == "with":  # what only the scaler sees
                layer.bias.grad[2] = torch.nan
            assert (head.weight.grad is None) == fused
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            assert not factors.pending(head.weight)
        assert optimizers[0].state[head.weight]["step"] == (4 if backbone == "with" else 5)
        found.append((scaler.get_scale(), head.weight.detach(), layer.weight.detach()))
    assert found[0][0] == found[1][0] != 1024
    same(found[0][1:], found[1][1:], rtol=1e-4, atol=1e-5)


def test_unscaling_beforehand_is_refused():
    head, layer = make_head("arcface", "cpu", torch.float32), nn.Linear(DIM, DIM)
    optimizer = RowSGD([*head.parameters(), *layer.parameters()], **RULE, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, labels = next(batches(1, head.weight))
    before = head.weight.detach().clone()
    scaler.scale(head(layer(x), labels)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="leave unscale_ out"):
        scaler.step(optimizer)
    assert torch.equal(head.weight, before) and not optimizer.state
    # the next step knows nothing of it
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(head(layer(x), labels)).backward()
    grad = layer.weight.grad / 8
    scaler.step(optimizer)
    torch.testing.assert_close(layer.weight.grad, grad)
    assert not torch.equal(head.weight, before)
    # nothing to refuse where there are no factors
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(layer(x).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert optimizer.state[layer.weight]["step"] == 2


# ---- refusals -----------------------------------------------------------------------------------


def test_weights_written_before_the_step():
    head = make_head("arcface", "reference", torch.float64)
    other = nn.Parameter(torch.ones(3))
    optimizer = RowSGD([other, head.weight], **RULE, fused=True)
    x, labels = next(batches(1, head.weight))
    head(x, labels).backward()
    other.grad = torch.ones(3)
    head.load_state_dict(copy.deepcopy(head.state_dict()))
    before = head.weight.detach().clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"written to between .*call zero_grad\(\) first"):
            optimizer.step()
    assert torch.equal(head.weight, before) and torch.equal(other, torch.ones(3))
    optimizer.zero_grad()
    first, late = (head(x, labels) for _ in range(2))
    first.backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)
    # and a backward pass finds that there was a step
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@pytest.mark.parametrize("other", [RowSGD, RowAdamW])
def test_another_optimiser_of_the_same_centres(other):
    head = make_head("arcface", "reference", torch.float64)
    optimizer = RowSGD(head.parameters(), **RULE, fused=True)
    x, labels = next(batches(1, head.weight))
    head(x, labels).backward()
    second = other(head.parameters(), lr=0.1)
    second.zero_grad()
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="another optimiser, made with fused=True"):
        second.step()
    assert torch.equal(head.weight, before) and not second.state
    optimizer.step()
    assert not torch.equal(head.weight, before)


def test_passes_that_nobody_steps(monkeypatch):
    monkeypatch.setattr(factors, "MANY", 3)
    head = make_head("arcface", "reference", torch.float64)
    optimizer = RowSGD(head.parameters(), 0.1, fused=True)
    x, labels = next(batches(1, head.weight))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            head(x, labels).backward()
    with pytest.warns(UserWarning, match="3 backward passes without a step"):
        head(x, labels).backward()
    assert len(optimizer.param_groups) == 1


def test_the_norm_of_all_gradients():
    head = make_head("arcface", "reference", torch.float64)
    optimizer = RowSGD(head.parameters(), 0.1, fused=True)
    x, labels = next(batches(1, head.weight))
    head(x, labels).backward()
    with pytest.raises(ValueError, match="make it with fused=False"):
        fm.total_norm(head)
    optimizer.zero_grad()
    assert fm.total_norm(nn.Linear(2, 2), head) == 0


# ---- several processes --------------------------------------------------------------------------


def fused_steps(group, margin, options=(), fused=True):
    head = head_of(margin, CLASSES, group, **dict(options))
    if head.row_tolerance:
        head.margin.s = 4.0  # where random rows have any 1 - p_y
    rows = slice(None) if group is None else own_rows(group.size(), group.rank())
    optimiser = functools.partial(RowSGD, momentum=0.9, weight_decay=0.1, fused=fused)
    found = steps(head, rows, optimiser=optimiser)
    assert (head.weight.grad is None) == fused
    return found


@pytest.mark.dist
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("margin", ["arcface", "adaface", "curricularface", "no_form"])
def test_of_shared_out_classes(margin, n):
    whole = fused_steps(None, margin, fused=False)
    compare(run(n, fused_steps, margin), whole, margin, CLASSES, n)


@pytest.mark.dist
def test_of_shared_out_classes_with_rows_left_out():
    options = (("row_tolerance", 0.998),)
    whole = fused_steps(None, "arcface", options, fused=False)
    compare(run(2, fused_steps, "arcface", options), whole, "arcface", CLASSES, 2)


@pytest.mark.dist
@pytest.mark.parametrize("corrected", [False, True])
def test_of_shared_out_samples(corrected):
    options = (("num_sampled", 20), ("sparse_grad", True), ("correct_sampling", corrected))
    found, expected = (run(2, sampled_steps, options, fused) for fused in (True, False))
    for own, other in zip(found, expected, strict=True):
        same(own, other, **close(torch.float64))


def sampled_steps(group, options, fused):
    head = head_of("arcface", CLASSES, group, **dict(options))
    optimizer = RowSGD(head.parameters(), **RULE, fused=fused)
    for step in range(3):
        x, _, labels = batch_of(CLASSES, step)
        rows = own_rows(group.size(), group.rank())
        optimizer.zero_grad()
        head(x[rows], labels[rows]).backward()
        optimizer.step()
    optimizer.settle()
    return head.weight.detach(), optimizer.state[head.weight]["momentum_buffer"]


def refusal(group, meshed):
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2)) if meshed else None
    head = head_of("adaface", CLASSES, mesh)
    optimizer = RowSGD(head.parameters(), 0.1, fused=True)
    x, _, labels = batch_of(CLASSES)
    with torch.no_grad():
        head.eval()(x, labels)
    head.train()
    try:
        head(x, labels)
    except ValueError as error:
        assert optimizer.fused and head.margin.batch_mean == 20
        return str(error)
    return None


@pytest.mark.dist
def test_rows_of_other_processes_are_not_seen():
    assert all("rows of one replica only" in found for found in run(4, refusal, True))
    assert all("leaves DDP no gradient" in found for found in run_world(2, refusal, False))
