"""State of the optimisers over rows: saved, loaded, copied, and what rows are owed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from optim_cases import ALL, MODES, TINY, C, D, Pair, parameter, random_grad, sparse
from torch import nn

from fastmargin import deferred
from fastmargin.optim import RowAdamW, RowSGD

# ---- saved, loaded, copied ----------------------------------------------------------------------


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
