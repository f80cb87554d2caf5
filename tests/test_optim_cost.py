"""What a step of the optimisers over rows takes, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from optim_cases import RULES, C, D, Pair, parameter, random_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmargin as fm
from fastmargin import deferred, rounding
from fastmargin.optim import RowAdamW, RowSGD, owed_steps, row_chunks


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


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("unsampled", ["lazy", "dense", "frozen"])
@pytest.mark.parametrize("rule", ["sgd_nesterov", "adamw"])
def test_no_dense_temporary_and_no_waiting(rule, unsampled, low, monkeypatch):
    rows, dim = 10_000, 16
    monkeypatch.setattr(row_chunks, "CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(rounding, "AT_ONCE", 1 << 10)
    dtype = torch.bfloat16 if low else torch.float32
    monkeypatch.setattr(owed_steps, "HORIZON", 64)
    ours, _, numbers = RULES[rule]
    weight = parameter(rows, dim, dtype)
    optimizer = ours([weight], unsampled=unsampled, stochastic_rounding=low, **numbers)
    weight.grad = random_grad(100, rows, dtype, dim)
    optimizer.step()
    weight.grad = random_grad(1000, rows, dtype, dim)
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
