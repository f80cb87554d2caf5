"""Optimisers over rows: torch's own on dense gradients in float64, whatever the mode may be."""

from __future__ import annotations

import copy

import optim_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import (
    ALL,
    MODES,
    RULES,
    C,
    D,
    Pair,
    duplicate,
    eps_for,
    parameter,
    random_grad,
    sparse,
)
from torch import nn

from fastmargin import deferred
from fastmargin.optim import RowAdamW, RowSGD, owed_steps, row_chunks

# fixtures
small_chunks = optim_cases.small_chunks


@ALL
@MODES
def test_same_trajectory_as_torch(rule, unsampled):
    """Fifty steps, a schedule, accumulated gradients with overlapping rows."""
    pair = Pair(rule, unsampled)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=60, cycle_momentum=False)
        for o in (pair.ours, pair.theirs)
    ]
    for i in range(50):
        pair.step(random_grad(5) if i % 3 else random_grad(4) + random_grad(3))
        for schedule in schedules:
            schedule.step()
        if unsampled == "dense":
            assert deferred.debt_of(pair.weight) is None
            torch.testing.assert_close(pair.weight, pair.dense, rtol=1e-11, atol=1e-12)
    pair.check()


@ALL
@MODES
def test_chunks_cut_through_rows(rule, unsampled, small_chunks):
    """A row with more duplicates than a chunk has places, and one at every border."""
    pair = Pair(rule, unsampled)
    for ids in ([7] * 10, [1, 1, 1, 1, 2, 2, 3], [0, 0, 5, 5, 5, 22, 22], [4, 3, 4, 3, 3, 4, 9, 9]):
        pair.step(sparse(ids, torch.randn(len(ids), D, dtype=torch.float64)))
        pair.step(random_grad(11).coalesce())
    pair.check()


@ALL
def test_sum_of_duplicates_does_not_depend_on_chunks(rule, monkeypatch):
    grad, like, results = random_grad(40, dtype=torch.float32), parameter(dtype=torch.float32), []
    for rows in (1, 3, 7, 1000):
        monkeypatch.setattr(row_chunks, "CHUNK_BYTES", rows * D * 4)
        pair = Pair(rule, like=nn.Parameter(like.detach().clone()))
        pair.step(grad)
        pair.step(grad)
        pair.ours.settle()
        results.append(pair.weight)
    assert all(torch.equal(results[0], other) for other in results[1:])


@ALL
@pytest.mark.parametrize("horizon", [1, 2, 7])
def test_full_table(rule, horizon, monkeypatch):
    monkeypatch.setattr(owed_steps, "HORIZON", horizon)
    pair = Pair(rule)
    for _ in range(25):
        pair.step(random_grad(2))
    pair.check()


@ALL
def test_long_wait_in_float32(rule):
    """Against float64: what is owed is summed in float64, so waiting does not add errors."""
    pair = Pair(rule, like=parameter(dtype=torch.float32))
    exact = Pair(rule, like=nn.Parameter(pair.weight.detach().double()))
    for _ in range(400):
        grad = random_grad(1, dtype=torch.float32)
        pair.step(grad)
        exact.step(grad.double())
    pair.ours.settle()
    ours = (pair.weight - exact.dense).abs().max()
    theirs = (pair.dense - exact.dense).abs().max()
    assert ours <= 3 * theirs + 1e-6


@ALL
def test_some_rows_are_settled_and_the_rest_waits(rule, small_chunks):
    pair = Pair(rule)
    for _ in range(6):
        pair.step(random_grad(3))
    before = pair.weight.detach().clone()
    rows = torch.tensor([3, -1, 11, 3, 19, -1, 4, 4, 4])
    pair.check(rows)
    touched = torch.zeros(C, dtype=torch.bool)
    touched[rows.clamp_min(0)] = True
    assert torch.equal(pair.weight[~touched], before[~touched])
    for _ in range(6):
        pair.step(random_grad(3))
        pair.check(torch.randint(-1, C, (4,)))
    pair.check()


@ALL
@MODES
def test_numbers_change_between_steps(rule, unsampled):
    pair = Pair(rule, unsampled)
    changes = [{"lr": 0.0}, {"lr": 0.2}, {"weight_decay": 0.5}]
    if rule.startswith("adamw"):
        changes += [{"betas": (0.5, 0.99)}, {"eps": 1e-29}]
    else:
        changes += [{"momentum": 0.5}, {"momentum": 0.0, "nesterov": False}]
        changes += [{"momentum": 0.8}, {"nesterov": True}]
    for change in changes:
        for optimizer in (pair.ours, pair.theirs):
            optimizer.param_groups[0].update(change)
        for _ in range(3):
            pair.step(random_grad(3))
    # debts stay when the last step itself moves no other row
    for optimizer in (pair.ours, pair.theirs):
        optimizer.param_groups[0].update(lr=0.0)
        if not rule.startswith("adamw"):
            optimizer.param_groups[0].update(momentum=0.0, nesterov=False)
    pair.step(random_grad(3))
    pair.check()


@ALL
@MODES
def test_dense_gradients_take_all_rows(rule, unsampled, small_chunks):
    pair = Pair(rule, unsampled)
    for i in range(12):
        pair.step(random_grad(3) if i % 4 else torch.randn(C, D, dtype=torch.float64))
    pair.step(torch.randn(C, D, dtype=torch.float64))
    assert deferred.debt_of(pair.weight) is None
    pair.check()


@ALL
def test_empty_and_missing_gradients(rule):
    """None skips the step; an empty gradient is a gradient of zero."""
    pair = Pair(rule)
    for i in range(9):
        if i % 3 == 2:
            pair.weight.grad = pair.dense.grad = None
            pair.ours.step()
            pair.theirs.step()
        else:
            pair.step(random_grad(3 * (i % 3)))
    assert pair.ours.state[pair.weight]["step"] == 6
    pair.check()


@MODES
@pytest.mark.parametrize("shape", [(), (5,), (5, 2, 3)])
def test_any_shape(unsampled, shape):
    for rule in ("sgd_both", "adamw"):
        pair = Pair(rule, unsampled, like=nn.Parameter(torch.randn(shape, dtype=torch.float64)))
        for _ in range(4):
            pair.step(torch.randn(shape, dtype=torch.float64))
            if shape:
                pair.step(sparse([1, 3, 1], torch.randn(3, *shape[1:], dtype=torch.float64), 5))
        pair.check()


@ALL
def test_a_column_major_weight(rule):
    pair = Pair(rule, like=nn.Parameter(torch.randn(D, C, dtype=torch.float64).t()))
    for _ in range(8):
        pair.step(random_grad(3))
        pair.check(torch.randint(0, C, (2,)))
    pair.check()


def test_no_rows():
    for unsampled in ("lazy", "dense", "frozen"):
        for rule in ("sgd_both", "adamw"):
            pair = Pair(rule, unsampled, like=parameter(rows=0))
            for _ in range(2):
                pair.step(sparse([], torch.zeros(0, D, dtype=torch.float64), 0))
            deferred.settle(pair.weight, torch.tensor([-1]))
            pair.check()


def test_groups():
    weights = [parameter(), parameter()]
    dense = [nn.Parameter(w.detach().clone()) for w in weights]
    options = [{"lr": 0.1, "weight_decay": 0.2}, {"momentum": 0.9, "nesterov": True}]

    def groups(params):
        return [{"params": [p], **o} for p, o in zip(params, options, strict=True)]

    ours = RowSGD(groups(weights), lr=0.05)
    ours.param_groups[1]["unsampled"] = "dense"
    theirs = torch.optim.SGD(groups(dense), lr=0.05)
    for _ in range(10):
        for mine, other in zip(weights, dense, strict=True):
            mine.grad = random_grad(4)
            other.grad = mine.grad.to_dense()
        ours.step()
        theirs.step()
    assert deferred.debt_of(weights[0]) is not None and deferred.debt_of(weights[1]) is None
    ours.settle()
    for mine, other in zip(weights, dense, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


@ALL
def test_frozen(rule):
    """Rows without a gradient keep their bits, state too; the others step as torch does."""
    pair = Pair(rule, "frozen")
    grad = random_grad(6)
    pair.step(grad)
    pair.check(torch.unique(grad._indices()))
    assert "last_step" not in pair.ours.state[pair.weight]
    for ids in ([1, 2], [2, 3]):
        values = [pair.weight.detach(), *pair.ours.state[pair.weight].values()]
        values = [value.clone() for value in values if value.shape == pair.weight.shape]
        pair.step(sparse(ids, torch.randn(2, D, dtype=torch.float64)))
        after = [pair.weight.detach(), *pair.ours.state[pair.weight].values()]
        after = [value for value in after if value.shape == pair.weight.shape]
        for old, new in zip(values, after, strict=True):
            changed = (old != new).any(1).nonzero()[:, 0].tolist()
            assert changed == ids


@ALL
@pytest.mark.parametrize("to", ["dense", "frozen"])
def test_mode_changes_in_a_group(rule, to):
    pair = Pair(rule)
    for mode in ("lazy", to, "lazy", to):
        pair.ours.param_groups[0]["unsampled"] = mode
        for _ in range(4):
            # all rows when frozen, so that torch's optimiser does the same
            every = sparse(range(C), torch.randn(C, D, dtype=torch.float64))
            pair.step(every if mode == "frozen" else random_grad(4))
            assert ("last_step" in pair.ours.state[pair.weight]) == (mode != "frozen")
    pair.check()


def test_closure():
    weight = parameter()
    optimizer = RowSGD([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.embedding(torch.tensor([1, 2]), weight, sparse=True).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.requires_grad and optimizer.step(closure) < first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ALL
def test_16_bit_weights_have_float32_state(rule, dtype):
    pair = Pair(rule, like=nn.Parameter(torch.randn(C, D).to(dtype)), **eps_for(rule))
    exact = Pair(rule, like=nn.Parameter(pair.weight.detach().double()), **eps_for(rule))
    grads = [random_grad(4, dtype=torch.float32).to(dtype) for _ in range(6)]
    for grad in grads:
        pair.weight.grad = grad
        pair.ours.step()
        exact.step(sparse(grad._indices()[0], grad._values().double()))
    pair.ours.settle()
    assert pair.weight.dtype == dtype
    for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
        if name in pair.ours.state[pair.weight]:
            assert pair.ours.state[pair.weight][name].dtype == torch.float32
    # rounding of the weight in every step a row takes
    step = 2 * torch.finfo(dtype).eps * exact.dense.abs().max().item()
    torch.testing.assert_close(pair.weight.double(), exact.dense, rtol=0, atol=6 * step)


# ---- eps of AdamW -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "first", "bound", "decay"),
    [
        *((1e-5, 1, 3e-6, 0), (1e-7, 1, 2e-2, 0), (1e-12, 1, 3e-1, 0)),
        *((1e-5, 100, 3e-9, 0), (1e-7, 100, 3e-5, 0), (1e-8, 100, 3e-3, 0), (1e-12, 100, 3e-3, 0)),
        *((1e-5, 1000, 1e-10, 0), (1e-7, 1000, 1e-6, 0), (1e-12, 1000, 1e-4, 0)),
        # a decay of 0.05 a step weighs the missed steps otherwise
        *((1e-5, 1, 1e-5, 0.5), (1e-5, 100, 2e-8, 0.5), (1e-7, 1000, 3e-6, 0.5)),
    ],
)
def test_what_eps_costs(size, first, bound, decay):
    """The table in RowAdamW's docstring: never too large, too small by no more than it says."""
    moves = {}
    for unsampled in ("lazy", "dense"):
        weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
        optimizer = RowAdamW([weight], lr=0.1, weight_decay=decay, unsampled=unsampled)
        for _ in range(first):
            weight.grad = torch.full((1, 1), size, dtype=torch.float64)
            optimizer.step()
        start = weight.item()
        weight.grad = sparse([], torch.zeros(0, 1, dtype=torch.float64), 1)
        for missed in range(1, 201):
            optimizer.step()
            if missed in (1, 10, 200):
                twin, _ = copy.deepcopy((weight, optimizer))
                deferred.settle(twin)
                moves[unsampled, missed] = start * (1 - 0.1 * decay) ** missed - twin.item()
    for missed in (1, 10, 200):
        lost = 1 - moves["lazy", missed] / moves["dense", missed]
        assert -1e-12 < lost < (1e-12 if missed == 1 else bound)
    assert lost > bound / 10  # so the table does not exaggerate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_default_eps_and_realistic_gradients(dtype):
    """Gradients of 1e-4 on average, as centres of length 1 have them, and the usual schedule."""
    weight = nn.Parameter(torch.randn(C, D, dtype=dtype) * 0.05)
    dense = nn.Parameter(weight.detach().double())
    ours, theirs = RowAdamW([weight]), torch.optim.AdamW([dense])
    for _ in range(300):
        weight.grad = random_grad(3, dtype=dtype, scale=1e-4)
        dense.grad = weight.grad.double().to_dense()
        ours.step()
        theirs.step()
    ours.settle()
    torch.testing.assert_close(weight.double(), dense, rtol=1e-4, atol=1e-6)


# ---- any history --------------------------------------------------------------------------------

rows_of = st.lists(st.integers(0, 5), max_size=6)
actions = st.one_of(
    st.tuples(st.just("step"), rows_of),
    st.tuples(st.just("step"), rows_of),
    st.tuples(st.just("settle"), st.none() | st.lists(st.integers(-1, 5), max_size=4)),
    st.tuples(st.just("lr"), st.floats(0, 0.5)),
    st.tuples(st.just("weight_decay"), st.floats(0, 0.5)),
    st.tuples(st.just("momentum"), st.floats(0.01, 0.95)),
    st.tuples(st.just("copy"), st.sampled_from(["deepcopy", "pickle", "state_dict"])),
    st.tuples(st.just("dense"), st.none()),
)


@pytest.mark.parametrize("lr", [5e-324, 1e-320, 1e-315, 1e-308])
def test_a_learning_rate_that_float64_hardly_holds(lr):
    """Rows that never had a gradient stay where they are, and do not become 0 / 0."""
    weight = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = RowAdamW([weight], lr=lr)
    for _ in range(3):
        rows, values = torch.tensor([[0]]), torch.ones(1, 2)
        weight.grad = torch.sparse_coo_tensor(rows, values, (4, 2), check_invariants=False)
        optimizer.step()
    optimizer.settle()
    assert torch.equal(weight.detach(), torch.ones(4, 2))


@settings(max_examples=120, deadline=None)
@given(
    rule=st.sampled_from(list(RULES)),
    history=st.lists(actions, min_size=3, max_size=20),
    horizon=st.integers(1, 6),
    rows=st.integers(1, 9),
)
def test_lazy_is_dense(rule, history, horizon, rows):
    saved = owed_steps.HORIZON, row_chunks.CHUNK_BYTES
    owed_steps.HORIZON, row_chunks.CHUNK_BYTES = horizon, rows * 2 * 8
    try:
        pair = Pair(rule, like=parameter(6, 2))
        for action, value in history:
            if action == "step":
                pair.step(sparse(value, torch.randn(len(value), 2, dtype=torch.float64), 6))
            elif action == "dense":
                pair.step(torch.randn(6, 2, dtype=torch.float64))
            elif action == "settle":
                deferred.settle(pair.weight, None if value is None else torch.tensor(value).long())
            elif action == "copy":
                duplicate(pair, value)
            elif action in pair.ours.param_groups[0]:
                if action == "momentum" and not pair.ours.defaults["momentum"]:
                    continue
                for optimizer in (pair.ours, pair.theirs):
                    optimizer.param_groups[0][action] = value
        pair.check(rtol=1e-9, atol=1e-11)
    finally:
        owed_steps.HORIZON, row_chunks.CHUNK_BYTES = saved


def capture(monkeypatch):
    """Sets whether a CUDA graph seems to be captured; not yet."""
    now = [False]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now[0])
    return lambda capturing: now.__setitem__(0, capturing)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (RowSGD, {}, "repeat this very step of RowSGD"),
        (RowSGD, {"unsampled": "dense"}, "unsampled='frozen'"),
        (RowSGD, {"unsampled": "frozen", "stochastic_rounding": True}, "stochastic_rounding"),
        (RowAdamW, {"unsampled": "frozen"}, "repeat this very step of RowAdamW"),
        (RowSGD, {"unsampled": "frozen", "momentum": 0.9}, "one step before"),
        (RowSGD, {"unsampled": "frozen"}, None),
    ],
)
def test_what_a_graph_would_repeat_is_refused(kind, options, says, monkeypatch):
    """Its replays have the numbers of the step that was captured."""
    captures = capture(monkeypatch)
    weight = parameter(dtype=torch.bfloat16)
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer = kind([weight], lr=0.1, **options)
    captures(True)
    if says is None:
        optimizer.step()
        assert not weight.equal(before)
        return
    with pytest.raises(RuntimeError, match=says):
        optimizer.step()
    assert not optimizer.state and weight.equal(before)
    weight.grad = None
    optimizer.step()  # of nothing
    captures(False)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not weight.equal(before)
    if says == "one step before":
        captures(True)
        optimizer.step()


def test_rows_that_are_owed_steps_are_not_read_in_a_graph(monkeypatch):
    captures = capture(monkeypatch)
    pair = Pair("sgd_both")
    pair.step(random_grad(5))
    captures(True)
    with pytest.raises(RuntimeError, match=r"lazy optimiser.*unsampled='dense'"):
        deferred.settle(pair.weight, torch.tensor([0, 3]))
    captures(False)
    pair.check()


def test_without_a_context_nobody_asks_for_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", None)
    pair = Pair("sgd_both")
    pair.step(random_grad(5))
    pair.check()
