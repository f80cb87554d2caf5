"""The step of RowSGD inside the centre pass is its step along the gradient."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from conftest import device_for
from processes import run, run_world
from sharded_cases import DIM, MARGINS, batch_of, compare, head_of, own_rows, steps
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastmargin as fm
from fastmargin import deferred, factors, ops
from fastmargin.backends.composed import ComposedLoss
from fastmargin.optim import RowAdamW, RowSGD

BACKENDS = [
    pytest.param("reference", torch.float64, id="reference-fp64"),
    pytest.param("cpu", torch.float64, id="cpu-fp64"),
    pytest.param("cpu", torch.float32, id="cpu-fp32"),
    pytest.param("triton", torch.float32, id="triton-fp32"),
    pytest.param("cuda", torch.float32, id="cuda-fp32"),
]
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
    for backend in ("reference", "cpu", "triton", "cuda"):
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


def train(head, optimizer, count=4, passes=1):
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


def both(head, rule=RULE, count=4, passes=1, **options):
    """What the same head finds with and without the gradient."""
    twin = copy.deepcopy(head)
    found = train(head, RowSGD(head.parameters(), **rule, **options, fused=True), count, passes)
    expected = train(twin, RowSGD(twin.parameters(), **rule, **options), count, passes)
    return found, expected


# ---- the same steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_steps_of_torchs_optimiser(backend, dtype, rule, stepped):
    head = make_head("arcface", backend, dtype)
    twin = copy.deepcopy(head)
    found, expected = both(head, RULES[rule])
    same(found, expected, **close(dtype))
    same(found, train(twin, torch.optim.SGD(twin.parameters(), **RULES[rule])), **close(dtype))
    assert len(stepped) == 4
    start = batch_of(CLASSES)[1].to(head.weight)
    assert (head.weight - start).abs().amax(1).min() > 0


@pytest.mark.parametrize("margin", ["adaface", "kappaface", "no_form", "curricular", "filtered"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_of_other_margins(backend, dtype, margin, stepped):
    """Running statistics, a margin of Python with a penalty, rules for hard negatives."""
    same(*both(make_head(margin, backend, dtype)), **close(dtype))
    assert len(stepped) == 4
    assert (stepped[0].hard is None) == (margin not in ("curricular", "filtered"))


def test_of_nearest_negatives(stepped):
    """Which have no such factors: their gradient is formed."""
    same(*both(make_head("npt_3", "reference", torch.float64)), **close(torch.float64))
    assert not stepped


@pytest.mark.parametrize("margin", ["arcface", "no_form"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_of_rows_left_out(backend, dtype, margin, stepped):
    head = make_head(margin, backend, dtype, row_tolerance=0.5)
    head.margin.s = 4.0
    exact = copy.deepcopy(head)
    exact.row_tolerance = 0.0
    found, expected = both(head)
    same(found, expected, **close(dtype))
    left = sum(int((one.d_lse == 0).sum()) for one in stepped)
    ignored = sum(int((labels < 0).sum()) for _, labels in batches(4, head.weight))
    assert left > ignored and all(one.skip_zero_rows for one in stepped)
    assert not torch.allclose(both(exact)[0][4], expected[4], rtol=1e-3)


@pytest.mark.parametrize("strides", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_of_sixteen_bit_centres(backend, dtype, strides):
    head = make_head("arcface", backend, torch.float32).to(dtype)
    if strides == "columns":
        head.weight.data = head.weight.data.t().contiguous().t()
    found, expected = both(head)
    same(found, expected, rtol=0, atol=0)
    assert head.weight.dtype == dtype and found[-1].dtype == torch.float32


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_of_a_column_major_weight(backend, dtype):
    head = make_head("adaface", backend, dtype)
    head.weight.data = head.weight.data.t().contiguous().t()
    same(*both(head), **close(dtype))
    assert head.weight.stride() == (1, CLASSES)


# ---- several passes -----------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_accumulated_passes_are_one(backend, dtype, tolerance, stepped):
    head = make_head("arcface", backend, dtype, row_tolerance=tolerance)
    same(*both(head, passes=3), **close(dtype))
    assert [len(one.labels) for one in stepped] == [3 * 23] * 4


def test_passes_that_are_not_one_add_their_gradients(stepped):
    """Running rules, other scales, a loss of the centres beside; no pass is lost or taken twice."""
    for margin, other in (("curricular", None), ("arcface", "arcface_cold"), ("arcface", "npt_3")):
        heads = [make_head(margin, "reference", torch.float64) for _ in range(2)]
        for head, fused in zip(heads, (True, False), strict=True):
            optimizer = RowSGD(head.parameters(), **RULE, fused=fused)
            for step in range(2):
                optimizer.zero_grad()
                for x, labels in batches(2, head.weight):
                    loss = head(x, labels)
                    loss.backward(retain_graph=step == 0)
                    if step == 0:
                        loss.backward()
                    if other is not None:
                        fm.margin_loss(x, head.weight, labels, MARGINS[other]()).backward()
                        head.weight.square().sum().backward()
                optimizer.step()
        torch.testing.assert_close(heads[0].weight, heads[1].weight, **close(torch.float64))
    assert not stepped


@pytest.mark.parametrize("sparse", [False, True])
def test_a_gradient_beside(sparse, stepped):
    heads = [make_head("arcface", "reference", torch.float64) for _ in range(2)]
    rows = torch.tensor([1, 4, 4])
    for head, fused in zip(heads, (True, False), strict=True):
        optimizer = RowSGD(head.parameters(), **RULE, fused=fused)
        for x, labels in batches(3, head.weight):
            optimizer.zero_grad()
            nn.functional.embedding(rows, head.weight, sparse=sparse).square().sum().backward()
            before = head.weight.grad.clone()
            head(x, labels).backward()
            optimizer.step()
            if fused:
                assert torch.equal(head.weight.grad.to_dense(), before.to_dense())
    torch.testing.assert_close(heads[0].weight, heads[1].weight, **close(torch.float64))
    assert not stepped


def test_buffers_of_the_caller_may_be_filled_anew():
    """With the labels of the next pass, and the coefficients of the next rule."""

    class Reused(fm.SoftmaxMargin):
        def hard(self, cos_y, labels):
            self.kept = getattr(self, "kept", cos_y.clone()).copy_(cos_y - 0.1)
            return fm.spec.HardRule.of(self.kept, 1.0, 0.3, 0.0)

        def forward(self, cos_y, norm, labels):
            return cos_y - 0.1

    for margin in (fm.ArcFace(), Reused(16.0)):
        heads = [make_head("arcface", "reference", torch.float64) for _ in range(2)]
        for head, fused in zip(heads, (True, False), strict=True):
            head.margin = copy.deepcopy(margin)
            optimizer = RowSGD(head.parameters(), **RULE, fused=fused)
            static = torch.empty(23, dtype=torch.int64)
            for x, labels in batches(2, head.weight):
                head(x, static.copy_(labels)).backward()
                static.fill_(-1)
                if hasattr(head.margin, "kept"):
                    head.margin.kept.fill_(2)
            optimizer.step()
        torch.testing.assert_close(heads[0].weight, heads[1].weight, **close(torch.float64))


# ---- sampled classes ----------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("unsampled", ["lazy", "dense", "frozen"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_of_sampled_classes(backend, dtype, unsampled, sparse, stepped):
    """The rows of the sample step, and the others owe what they owed."""
    options = {"num_sampled": 30, "sparse_grad": sparse}
    heads = [make_head("adaface", backend, dtype, **options) for _ in range(2)]
    optimizers = [
        RowSGD(head.parameters(), **RULE, unsampled=unsampled, fused=fused)
        for head, fused in zip(heads, (True, False), strict=True)
    ]
    for x, labels in batches(4, heads[0].weight):
        for head, optimizer in zip(heads, optimizers, strict=True):
            optimizer.zero_grad()
            head(x, labels).backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.8
        states = [o.state[h.weight] for h, o in zip(heads, optimizers, strict=True)]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            if name == "last_step":
                assert torch.equal(value, states[1][name])
        # before anything settles, too
        torch.testing.assert_close(heads[0].weight, heads[1].weight, **close(dtype))
    debts = [deferred.debt_of(head.weight) is not None for head in heads]
    assert debts == [unsampled == "lazy" and sparse] * 2
    for optimizer in optimizers:
        optimizer.settle()
    torch.testing.assert_close(heads[0].weight, heads[1].weight, **close(dtype))
    torch.testing.assert_close(*(s["momentum_buffer"] for s in states), **close(dtype))
    assert len(stepped) == (0 if unsampled == "frozen" and not sparse else 4)


@pytest.mark.parametrize("unsampled", ["lazy", "dense", "frozen"])
def test_of_corrected_samples(unsampled):
    """Two parts of the centres: their gradient, of the sampled rows, is formed."""
    options = {"num_sampled": 40, "sparse_grad": True, "correct_sampling": True}
    head = make_head("arcface", "reference", torch.float64, **options)
    same(*both(head, unsampled=unsampled), **close(torch.float64))


@pytest.mark.parametrize("unsampled", ["lazy", "frozen"])
def test_accumulated_samples(unsampled):
    head = make_head("arcface", "reference", torch.float64, num_sampled=30, sparse_grad=True)
    same(*both(head, passes=2, unsampled=unsampled), **close(torch.float64))


def test_samples_and_whole_passes_take_turns():
    heads = [make_head("arcface", "cpu", torch.float64, num_sampled=30, sparse_grad=True)]
    heads.append(copy.deepcopy(heads[0]))
    for head, fused in zip(heads, (True, False), strict=True):
        optimizer = RowSGD(head.parameters(), **RULE, fused=fused)
        for step, (x, labels) in enumerate(batches(6, head.weight)):
            head.train(step % 3 < 2)  # not in training, all classes take part
            optimizer.zero_grad()
            head(x, labels).backward()
            optimizer.step()
        optimizer.settle()
    torch.testing.assert_close(heads[0].weight, heads[1].weight, **close(torch.float64))


@pytest.mark.parametrize("places", [[5, -1, 2, 99, -1], [-1, -1], [-1, 3], []])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_empty_places_write_nothing(backend, places):
    """Chunks of two places, some without any row."""
    device = device_for(backend)
    chosen = fm.backends.get(backend)
    ComposedLoss.step_bytes  # the chunks below are of the class
    type(chosen).step_bytes = 2 * 4 * 4
    weight, momentum, x = (torch.randn(n, 4, device=device) for n in (9, 9, 6))
    x = nn.functional.normalize(x)
    index = torch.tensor(places, dtype=torch.int64, device=device)
    labels = torch.tensor([0, 1, 2, -1, 7, 3], device=device)
    d_lse, d_cos, lse = torch.rand(3, 6, device=device)
    update = fm.spec.SgdUpdate(0.1, 0.9, 0.2, True)
    rest = index, labels, lse + 5, 8.0, None, 0, "fp32"
    grad = chosen.row_stats_backward(d_lse, d_cos, x, weight, *rest)
    expected = [weight.clone(), momentum.clone()]
    for place, row in enumerate(places):
        if 0 <= row < 9:
            views = [tensor[row] for tensor in expected]
            update.apply_(*views, grad[place])
    chosen.centre_step(weight, momentum, update, d_lse, d_cos, x, *rest)
    same([weight, momentum], expected, rtol=1e-5, atol=1e-6)
    still = [row for row in range(9) if row not in places]
    assert torch.equal(weight[still], expected[0][still])


# ---- what is not there --------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Bytes of the largest new tensor, inside the operators of fastmargin, too."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes, self.waits = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "fastmargin":
            definition = torch._library.custom_ops.OPDEFS.get(function._schema.name)
            if definition is not None:
                with self:
                    return definition._init_fn(*args, **kwargs)
        out = function(*args, **kwargs)
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.waits.append(function)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.bytes = max(self.bytes, storage.nbytes())
        return out


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_nothing_of_the_size_of_the_centres(backend, sparse):
    device, classes = device_for(backend), 3000
    head = fm.MarginHead(
        DIM,
        classes,
        fm.AdaFace(),
        backend=backend,
        device=device,
        validate=False,
        num_sampled=200 if sparse else None,
        sparse_grad=sparse,
    )
    optimizer = RowSGD(head.parameters(), **RULE, unsampled="frozen", fused=True)
    x, labels = torch.randn(6, DIM, device=device), torch.arange(6, device=device)
    for _ in range(2):
        loss = head(x, labels)
        state = optimizer.state[head.weight].values()
        with Largest(head.weight, *state) as largest:
            loss.backward()
            step = optimizer.state[head.weight].get("step")
            optimizer.step()
    assert 0 < largest.bytes <= 6 * classes  # a gradient has 32 bytes a row
    # the count of steps is a scalar of the host
    assert step == 1 and len(largest.waits) == 1


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


def test_only_the_wanted_gradient_is_left():
    head = make_head("arcface", "reference", torch.float64)
    optimizer = RowSGD(head.parameters(), 0.1, fused=True)
    x, labels = next(batches(1, head.weight))
    x.requires_grad_()
    expected = torch.autograd.grad(copy.deepcopy(head)(x, labels), x)[0]
    assert torch.equal(torch.autograd.grad(head(x, labels), x)[0], expected)
    assert not factors.pending(head.weight)
    head.weight.requires_grad_(False)
    head(x, labels).backward()
    assert torch.equal(x.grad, expected) and not factors.pending(head.weight)
    assert optimizer.fused


@pytest.mark.parametrize("how", ["compile", "checkpoint"])
def test_gradients_that_are_formed_all_the_same(how, stepped):
    torch._dynamo.reset()
    head = make_head("arcface", "cpu", torch.float64)
    twin = copy.deepcopy(head)
    optimizers = [RowSGD(head.parameters(), **RULE, fused=True), RowSGD(twin.parameters(), **RULE)]
    call = torch.compile(head, fullgraph=True, backend="aot_eager")
    if how == "checkpoint":
        call = functools.partial(checkpoint, head, use_reentrant=False)
    for x, labels in batches(2, head.weight):
        for run_, optimizer in zip((call, twin), optimizers, strict=True):
            optimizer.zero_grad()
            run_(x.clone().requires_grad_(), labels).backward()
            optimizer.step()
    torch.testing.assert_close(head.weight, twin.weight, **close(torch.float64))
    assert how == "checkpoint" or not stepped


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
            assert (head.weight.grad is None) == fused
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            assert not factors.pending(head.weight)
        assert optimizers[0].state[head.weight]["step"] == 5
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
    head(x, labels).backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)


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
    with pytest.warns(UserWarning, match="3 backward passes wait for a step"):
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
    rows = slice(None) if group is None else own_rows(group.size(), group.rank())
    optimiser = functools.partial(RowSGD, momentum=0.9, weight_decay=0.1, fused=fused)
    found = steps(head, rows, optimiser=optimiser)
    assert (head.weight.grad is None) == fused
    return found


@pytest.mark.dist
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("margin", ["arcface", "adaface", "curricular", "no_form"])
def test_of_shared_out_classes(margin, n):
    whole = fused_steps(None, margin, fused=False)
    compare(run(n, fused_steps, margin), whole, margin, CLASSES, n)


@pytest.mark.dist
def test_of_shared_out_classes_with_rows_left_out():
    options = (("row_tolerance", 0.9),)
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
