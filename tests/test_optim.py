"""Optimisers over rows: torch's own on dense gradients in float64, whatever the mode may be."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmargin as fm
from fastmargin import deferred
from fastmargin.optim import RowAdamW, RowSGD, owed_steps, row_chunks

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


# ---- the trajectory -----------------------------------------------------------------------------


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


def eps_for(rule):
    return {"eps": 1e-8} if rule.startswith("adamw") else {}


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


# ---- state: saved, loaded, copied ---------------------------------------------------------------


@ALL
@pytest.mark.parametrize("unsampled", ["lazy", "dense"])
def test_a_saved_state_loads_into_any_mode(rule, unsampled):
    """Saved while rows are owed; what is saved owes nothing, in the weights either."""
    pair = Pair(rule, "lazy")
    for _ in range(7):
        pair.step(random_grad(2))
    file = io.BytesIO()
    torch.save({"optimizer": pair.ours.state_dict(), "weight": pair.weight.detach()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.testing.assert_close(saved["weight"], pair.dense.detach(), rtol=1e-11, atol=1e-12)
    state = saved["optimizer"]["state"][0]
    assert state["step"] == 7
    assert torch.equal(state["last_step"], torch.full((C,), 7, dtype=torch.int32))
    pair.weight = nn.Parameter(saved["weight"])
    pair.ours = type(pair.ours)([pair.weight], lr=9.0, unsampled=unsampled)
    pair.ours.load_state_dict(saved["optimizer"])
    assert pair.ours.param_groups[0]["unsampled"] == unsampled
    assert pair.ours.param_groups[0]["lr"] == 0.1
    for _ in range(7):
        pair.step(random_grad(2))
    pair.check()


def test_state_splits_by_rows():
    """As a sharded checkpoint does: each part goes on as the rows of the whole."""
    for rule in ("sgd_both", "adamw"):
        pair = Pair(rule)
        for _ in range(5):
            pair.step(random_grad(3))
        saved = pair.ours.state_dict()
        for part in (slice(0, 9), slice(9, C)):
            weight = nn.Parameter(pair.weight.detach()[part].clone())
            optimizer = type(pair.ours)([weight], lr=0.0)
            split = {
                name: value[part].clone() if value.dim() else value
                for name, value in saved["state"][0].items()
            }
            optimizer.load_state_dict({**saved, "state": {0: split}})
            weight.grad = sparse([], torch.zeros(0, D, dtype=torch.float64), len(weight))
            optimizer.step()
            optimizer.settle()
            whole = copy.deepcopy(pair.ours)
            copied = whole.param_groups[0]["params"][0]
            copied.grad = sparse([], torch.zeros(0, D, dtype=torch.float64))
            whole.step()
            whole.settle()
            assert torch.equal(weight, copied[part])


@ALL
def test_takes_the_state_of_torchs_optimiser(rule):
    pair = Pair(rule)
    pair.step(torch.randn(C, D, dtype=torch.float64))
    pair.ours.load_state_dict(copy.deepcopy(pair.theirs.state_dict()))
    for _ in range(5):
        pair.step(random_grad(3))
    pair.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_keeps_the_types_of_the_state(dtype):
    for optimizer_type in (lambda w: RowSGD(w, 0.1, 0.9), RowAdamW):
        weight = nn.Parameter(torch.randn(C, D).to(dtype))
        optimizer = optimizer_type([weight])
        weight.grad = random_grad(5, dtype=torch.float32).to(dtype)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        other = optimizer_type([weight])
        other.load_state_dict(saved)
        for name, value in other.state[weight].items():
            assert value.dtype == torch.float32 and torch.equal(value, saved["state"][0][name])
        assert saved["state"][0]["last_step"].dtype == torch.int32


def test_hooks_of_a_user_see_the_state_as_it_is():
    weight = parameter()
    optimizer = RowAdamW([weight])
    weight.grad = random_grad(3)
    optimizer.step()
    seen = []

    def double(_, state):
        seen.append(state["state"][0]["exp_avg"])
        state["state"][0]["exp_avg"] = 2 * state["state"][0]["exp_avg"]

    handle = optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[weight]["exp_avg"].clone())
    )
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    handle.remove()
    assert torch.equal(2 * seen[0], seen[1])
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_a_state_that_does_not_fit_changes_nothing():
    pair = Pair("adamw")
    pair.step(random_grad(3))
    saved = copy.deepcopy(pair.ours.state_dict())
    pair.step(random_grad(3))
    before, owed = pair.weight.detach().clone(), deferred.debt_of(pair.weight)
    wrong = copy.deepcopy(saved)
    wrong["state"][0]["exp_avg"] = torch.zeros(C + 1, D)
    with pytest.raises(ValueError, match="exp_avg has shape"):
        pair.ours.load_state_dict(wrong)
    wrong = copy.deepcopy(saved)
    wrong["param_groups"][0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad is not supported"):
        pair.ours.load_state_dict(wrong)
    with pytest.raises(ValueError, match="parameter groups"):
        pair.ours.load_state_dict({"state": {}, "param_groups": []})
    assert torch.equal(pair.weight, before) and deferred.debt_of(pair.weight) is owed
    pair.check()


def test_loading_settles_first():
    """The weights stay and have taken their steps; the state is the loaded one."""
    pair = Pair("sgd_both")
    pair.step(random_grad(3))
    saved = copy.deepcopy(pair.ours.state_dict()), copy.deepcopy(pair.theirs.state_dict())
    for _ in range(3):
        pair.step(random_grad(3))
    pair.ours.load_state_dict(saved[0])
    pair.theirs.load_state_dict(saved[1])
    assert deferred.debt_of(pair.weight) is None
    pair.step(random_grad(3))
    pair.check()


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_with_its_parameters_owes_the_same(copies):
    for rule in ("sgd_both", "adamw"):
        pair = Pair(rule)
        for _ in range(5):
            pair.step(random_grad(2))
        weight, optimizer = copies((pair.weight, pair.ours))
        deferred.settle(pair.weight)  # not the copy's
        deferred.settle(weight)
        torch.testing.assert_close(weight, pair.dense, rtol=1e-11, atol=1e-12)
        assert optimizer.param_groups[0]["params"][0] is weight
        pair.weight, pair.ours = weight, optimizer
        for _ in range(5):
            pair.step(random_grad(2))
        pair.check()


def test_a_copied_parameter_owes_nothing():
    pair = Pair("sgd_both")
    pair.step(random_grad(2))
    other = copy.deepcopy(pair.weight)
    before = other.detach().clone()
    deferred.settle(other)
    assert deferred.debt_of(other) is None and torch.equal(other, before)


class Centres(deferred.SettledCopies, nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = parameter()


@pytest.mark.parametrize(
    "copies",
    [
        copy.copy,
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: load(Centres(), module.state_dict()),
    ],
)
def test_a_module_settles_before_it_is_copied(copies):
    module = Centres()
    pair = Pair("sgd_both", like=module.weight)
    for _ in range(5):
        pair.step(random_grad(2))
    other = copies(nn.Sequential(module))[0] if copies is copy.deepcopy else copies(module)
    torch.testing.assert_close(other.weight, pair.dense, rtol=1e-11, atol=1e-12)
    assert deferred.debt_of(module.weight) is None


def load(module, state):
    module.load_state_dict(state)
    return module


def test_a_module_settles_before_it_is_overwritten():
    module = Centres()
    pair = Pair("sgd_both", like=module.weight)
    other = Centres()
    for _ in range(5):
        pair.step(random_grad(2))
    module.load_state_dict(other.state_dict())
    deferred.settle(module.weight)
    assert torch.equal(module.weight, other.weight)
    with torch.no_grad():
        pair.dense.copy_(other.weight)
    pair.step(random_grad(2))
    pair.check()


# ---- debts --------------------------------------------------------------------------------------


def test_debts_keep_nobody_alive_and_outlive_the_optimiser():
    pair = Pair("sgd_both")
    for _ in range(5):
        pair.step(random_grad(2))
    optimizer, weight = weakref.ref(pair.ours), weakref.ref(pair.weight)
    buffer = weakref.ref(pair.ours.state[pair.weight]["momentum_buffer"])
    pair.ours = None
    gc.collect()
    assert optimizer() is None and buffer() is not None
    deferred.settle(pair.weight)
    torch.testing.assert_close(pair.weight, pair.dense, rtol=1e-11, atol=1e-12)
    gc.collect()
    assert buffer() is None
    pair.ours = RowSGD([pair.weight], 0.1, 0.9)
    pair.step(random_grad(2))
    buffer = weakref.ref(pair.ours.state[pair.weight]["momentum_buffer"])
    count = len(deferred._debts)
    pair.ours = pair.weight = None
    gc.collect()
    assert weight() is None and buffer() is None and len(deferred._debts) == count - 1


def test_two_optimisers_take_turns():
    weight = parameter()
    dense = nn.Parameter(weight.detach().clone())
    ours = [RowSGD([weight], 0.1, 0.9, 0.1), RowAdamW([weight], 0.1, eps=TINY)]
    theirs = [torch.optim.SGD([dense], 0.1, 0.9, weight_decay=0.1)]
    theirs.append(torch.optim.AdamW([dense], 0.1, eps=TINY))
    for i in (0, 0, 1, 0, 1, 1, 1, 0, 0):
        weight.grad = random_grad(2)
        dense.grad = weight.grad.to_dense()
        ours[i].step()
        theirs[i].step()
    deferred.settle(weight)
    torch.testing.assert_close(weight, dense, rtol=1e-11, atol=1e-12)


def test_one_debt_at_a_time():
    class Noted:
        def __init__(self):
            self.asked = []

        def settle(self, parameter, rows):
            self.asked.append(rows)

    weight, first, second = parameter(), Noted(), Noted()
    deferred.owe(weight, first)
    deferred.owe(weight, first)
    assert first.asked == [] and deferred.debt_of(weight) is first
    deferred.owe(weight, second)
    assert first.asked == [None] and deferred.debt_of(weight) is second
    rows = torch.tensor([1])
    deferred.settle(weight, rows)
    assert second.asked[0] is rows and deferred.debt_of(weight) is second
    deferred.settle(weight)
    assert second.asked[1:] == [None] and deferred.debt_of(weight) is None


@MODES
def test_a_new_optimiser_settles_for_the_old_one(unsampled):
    pair = Pair("sgd_both")
    pair.step(random_grad(2))
    pair.ours = RowSGD([pair.weight], 0.1, 0.9, 0.1, unsampled=unsampled)
    pair.theirs = torch.optim.SGD([pair.dense], 0.1, 0.9, weight_decay=0.1)
    gc.collect()
    pair.step(random_grad(2))
    pair.check()


def test_settling_leaves_a_pending_backward_alone():
    """Rows used before keep their bits and autograd accepts them; a step does not go unnoticed."""
    pair = Pair("sgd_nesterov", like=parameter(dtype=torch.float32))
    for _ in range(5):
        pair.step(random_grad(3, dtype=torch.float32))
    rows = torch.tensor([2, 7])
    deferred.settle(pair.weight, rows)
    used = pair.weight[rows].detach().clone()
    loss = (pair.weight * pair.weight)[rows].sum()
    deferred.settle(pair.weight, torch.tensor([3, 7, -1]))
    deferred.settle(pair.weight)
    assert torch.equal(pair.weight[rows], used)
    loss.backward()
    torch.testing.assert_close(pair.weight.grad[rows], 2 * used)
    for unsampled in ("lazy", "dense", "frozen"):
        weight = parameter()
        loss = (weight * weight).sum()
        weight.grad = sparse([], torch.zeros(0, D, dtype=torch.float64))
        RowSGD([weight], 0.1, 0.9, 0.1, unsampled=unsampled).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_settling_in_inference_mode():
    pair = Pair("adamw")
    for _ in range(3):
        pair.step(random_grad(2))
    with torch.inference_mode():
        deferred.settle(pair.weight, torch.tensor([1, 2]))
        deferred.settle(pair.weight)
    pair.step(random_grad(2))
    pair.check()


def test_a_compiled_caller_sees_every_debt():
    pair = Pair("sgd_both")

    def use(weight, rows):
        deferred.settle(weight, rows)
        return weight[rows] * 2

    compiled = torch.compile(use, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(6):
            rows = torch.tensor([i, 20])
            torch.testing.assert_close(compiled(pair.weight, rows), 2 * pair.dense[rows])
            pair.step(random_grad(2))


def test_training_with_accumulation():
    """Rows are settled as they are used; several forward passes come before one step."""
    pair = Pair("sgd_nesterov")
    for _ in range(10):
        pair.ours.zero_grad()
        pair.theirs.zero_grad()
        for _ in range(3):
            rows, target = torch.randint(0, C, (4,)), torch.randn(4, D, dtype=torch.float64)
            deferred.settle(pair.weight, rows)
            for weight, is_sparse in ((pair.weight, True), (pair.dense, False)):
                used = nn.functional.embedding(rows, weight, sparse=is_sparse)
                (used.square() * target).sum().backward()
        assert pair.weight.grad.is_sparse
        pair.ours.step()
        pair.theirs.step()
    pair.check()


def test_gradient_scaler():
    pair = Pair("sgd_both", like=parameter(dtype=torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(6):
        grad = random_grad(3, dtype=torch.float32)
        values = grad._values() * (torch.inf if i == 3 else scaler.get_scale())
        pair.weight.grad = sparse(grad._indices()[0], values)
        scaler.scale(torch.ones(()))
        scaler.step(pair.ours)
        scaler.update()
        if i != 3:
            pair.dense.grad = grad.to_dense()
            pair.theirs.step()
    assert scaler.get_scale() == 512 and pair.ours.state[pair.weight]["step"] == 5
    pair.check(rtol=1e-5, atol=1e-6)


# ---- cost and errors ----------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Largest new tensor, and operators that would wait for a GPU."""

    WAITS = (
        *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"),
        *("_unique2", "unique_dim", "unique_consecutive", "coalesce", "_coalesce"),
    )

    def __init__(self, known, count):
        super().__init__()
        self.count = count
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest, self.waits = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                if tensor.untyped_storage().data_ptr() not in self.known:
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        name = function.overloadpacket.__name__
        # the count of steps is a scalar of the host, as in torch's optimisers
        if name in self.WAITS and args[0] is not self.count:
            self.waits.append(name)
        if name in ("index", "index_put_") and any(i.dtype == torch.bool for i in args[1]):
            self.waits.append(name)
        return out


@pytest.mark.parametrize("unsampled", ["lazy", "dense", "frozen"])
@pytest.mark.parametrize("rule", ["sgd_nesterov", "adamw"])
def test_no_dense_temporary_and_no_waiting(rule, unsampled, monkeypatch):
    rows, dim = 10_000, 16
    monkeypatch.setattr(row_chunks, "CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(owed_steps, "HORIZON", 64)
    ours, _, numbers = RULES[rule]
    weight = parameter(rows, dim, torch.float32)
    optimizer = ours([weight], unsampled=unsampled, **numbers)
    weight.grad = random_grad(100, rows, torch.float32, dim)
    optimizer.step()
    weight.grad = random_grad(1000, rows, torch.float32, dim)
    known = [
        weight,
        weight.grad._values(),
        weight.grad._indices(),
        *optimizer.state[weight].values(),
    ]
    with Watch(known, optimizer.state[weight]["step"]) as watch:
        optimizer.step()
        deferred.settle(weight, torch.randint(-1, rows, (1000,)))
        optimizer.settle()
    assert 0 < watch.largest <= 1 << 14  # the weight has 40 times as much
    assert not watch.waits


def test_lazy_step_reads_and_writes_only_its_rows():
    """A step of 10 rows runs the same operators on the same sizes whatever C is."""
    sizes = []
    for rows in (100, 10_000):
        weight = parameter(rows)
        optimizer = RowSGD([weight], 0.1, 0.9, 0.1)
        for _ in range(2):
            weight.grad = random_grad(10, rows)
            if optimizer.state:
                with Count() as count:
                    optimizer.step()
                sizes.append(count.written)
            else:
                optimizer.step()
    assert sizes[0] == sizes[1]


class Count(TorchDispatchMode):
    """Elements that operators return, in-place ones on rows counted by their index."""

    def __init__(self):
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("index_copy_", "index_fill_"):
            self.written += args[2].numel()
        elif not function.is_view and isinstance(out, torch.Tensor) and not out.is_sparse:
            self.written += out.numel()
        return out


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: RowSGD(p, -0.1), ValueError, "lr must be at least 0, got -0.1"),
        (lambda p: RowSGD(p, float("nan")), ValueError, "lr must be at least 0"),
        (lambda p: RowSGD(p, torch.tensor(0.1)), TypeError, "lr must be a number, got Tensor"),
        (lambda p: RowSGD(p, 0.1, -1.0), ValueError, "momentum must be at least 0"),
        (lambda p: RowSGD(p, 0.1, weight_decay=-1.0), ValueError, "weight_decay must be at least"),
        (lambda p: RowSGD(p, 0.1, nesterov=True), ValueError, "nesterov needs a momentum"),
        (lambda p: RowSGD(p, 0.1, unsampled="no"), ValueError, "unsampled must be one of"),
        (lambda p: RowSGD([{"params": p, "lr": -1}], 0.1), ValueError, "lr must be at least 0"),
        (lambda p: RowSGD([{"params": p, "maximize": True}], 0.1), ValueError, "maximize is not"),
        (lambda p: RowSGD([{"params": p, "dampening": 0.1}], 0.1), ValueError, "dampening is not"),
        (lambda p: RowAdamW(p, -1.0), ValueError, "lr must be at least 0"),
        (lambda p: RowAdamW(p, eps=-1.0), ValueError, "eps must be at least 0"),
        (lambda p: RowAdamW(p, weight_decay=-1.0), ValueError, "weight_decay must be at least"),
        (lambda p: RowAdamW(p, betas=(1.0, 0.9)), ValueError, "betas must be in"),
        (lambda p: RowAdamW(p, betas=(0.9, 0.0)), ValueError, "betas must be in"),
        (lambda p: RowAdamW(p, betas=(0.9, 0.8)), ValueError, "betas: .*use 'dense'"),
        (lambda p: RowAdamW(p, 0.5, weight_decay=2.0), ValueError, "weight_decay: .*use 'dense'"),
        (lambda p: RowAdamW(p, unsampled=None), ValueError, "unsampled must be one of"),
        (lambda p: RowAdamW([{"params": p, "amsgrad": True}]), ValueError, "amsgrad is not"),
    ],
)
def test_errors_of_options(make, error, message):
    with pytest.raises(error, match=message):
        make([parameter()])


def test_dense_takes_what_lazy_refuses():
    pair = Pair("adamw", "dense", betas=(0.9, 0.5), weight_decay=2.0, lr=0.6)
    for _ in range(5):
        pair.step(random_grad(4))
    pair.check()


def test_errors_at_the_step_come_before_any_change():
    weights = [parameter(), parameter()]
    optimizer = RowSGD(weights, 0.1, 0.9)
    before = [weight.detach().clone() for weight in weights]
    weights[0].grad = random_grad(3)
    weights[1].grad = torch.randn(C, D, dtype=torch.float64).to_sparse()
    with pytest.raises(ValueError, match="one sparse dimension, its rows, got 2"):
        optimizer.step()
    weights[1].grad = random_grad(3)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be at least 0"):
        optimizer.step()
    assert all(map(torch.equal, weights, before)) and not optimizer.state


def test_errors_of_settle():
    pair = Pair("sgd_both")
    pair.step(random_grad(3))
    for rows in (torch.tensor([1], dtype=torch.int32), torch.tensor([[1]]), torch.ones(C).bool()):
        with pytest.raises(ValueError, match="rows must be a vector of int64"):
            deferred.settle(pair.weight, rows)
    pair.check()


def test_names():
    assert fm.optim.RowSGD is RowSGD and fm.optim.RowAdamW is RowAdamW
