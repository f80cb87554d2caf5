"""The step of RowSGD inside the centre pass is its step along the gradient."""

from __future__ import annotations

import copy
import functools

import fused_step_cases
import pytest
import torch
from conftest import BACKENDS, BACKENDS_AND_DTYPES, device_for
from fused_step_cases import (
    CLASSES,
    RULE,
    RULES,
    batches,
    both,
    close,
    make_head,
    same,
    train,
)
from sharded_cases import DIM, MARGINS, batch_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmargin as fm
from fastmargin import deferred
from fastmargin.optim import RowSGD

# fixtures
small_chunks, stepped = fused_step_cases.small_chunks, fused_step_cases.stepped


# ---- the same steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_steps_of_torchs_optimiser(backend, dtype, rule, stepped):
    head = make_head("arcface", backend, dtype)
    twin = copy.deepcopy(head)
    found, expected = both(head, RULES[rule])
    same(found, expected, **close(dtype))
    same(found, train(twin, torch.optim.SGD(twin.parameters(), **RULES[rule])), **close(dtype))
    assert len(stepped) == 3
    start = batch_of(CLASSES)[1].to(head.weight)
    assert (head.weight - start).abs().amax(1).min() > 0


@pytest.mark.parametrize(
    "margin", ["adaface", "kappaface", "no_form", "curricularface", "filtered"]
)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_of_other_margins(backend, dtype, margin, stepped):
    """Running statistics, a margin of Python with a penalty, rules for hard negatives."""
    same(*both(make_head(margin, backend, dtype)), **close(dtype))
    assert len(stepped) == 3
    assert (stepped[0].hard is None) == (margin not in ("curricularface", "filtered"))


def test_of_nearest_negatives(stepped):
    """Which have no such factors: their gradient is formed."""
    same(*both(make_head("npt_3", "reference", torch.float64)), **close(torch.float64))
    assert not stepped


@pytest.mark.parametrize(
    ("margin", "tolerance"), [("arcface", 0.998), ("no_form", 0.987), ("curricularface", 0.999)]
)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_of_rows_left_out(backend, dtype, margin, tolerance, stepped):
    head = make_head(margin, backend, dtype, row_tolerance=tolerance)
    head.margin.s = 4.0
    exact = copy.deepcopy(head)
    exact.row_tolerance = 0.0
    found, expected = both(head)
    same(found, expected, **close(dtype))
    left = sum(int((one.d_lse == 0).sum()) for one in stepped)
    ignored = sum(int((labels < 0).sum()) for _, labels in batches(3, head.weight))
    assert ignored + 3 < left < 3 * 23 - 20 and all(one.skip_zero_rows for one in stepped)
    assert not torch.allclose(both(exact)[0][3], expected[3], rtol=1e-3)


@pytest.mark.parametrize("strides", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_sixteen_bit_centres(backend, dtype, strides):
    head = make_head("arcface", backend, torch.float32).to(dtype)
    if strides == "columns":
        head.weight.data = head.weight.data.t().contiguous().t()
    exact = copy.deepcopy(head).double()
    exact.backend, exact.precision = "reference", "auto"
    truth = train(exact, torch.optim.SGD(exact.parameters(), **RULE))[3:]
    found, expected = (values[3:] for values in both(head))
    for ours, plain, value in zip(found, expected, truth, strict=True):
        errors = [(tensor - value).norm() for tensor in (ours, plain)]
        assert errors[0] <= 1.2 * errors[1]  # no more rounding than the gradient brings
    assert head.weight.dtype == dtype and found[-1].dtype == torch.float32


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_of_a_column_major_weight(backend, dtype):
    head = make_head("adaface", backend, dtype)
    head.weight.data = head.weight.data.t().contiguous().t()
    same(*both(head), **close(dtype))
    assert head.weight.stride() == (1, CLASSES)


# ---- several passes -----------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [0.0, 0.998])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_accumulated_passes_are_one(backend, dtype, tolerance, stepped):
    head = make_head("arcface", backend, dtype, row_tolerance=tolerance)
    head.margin.s = 4.0
    same(*both(head, passes=2), **close(dtype))
    assert [len(one.labels) for one in stepped] == [2 * 23] * 3
    assert all(one.skip_zero_rows == (tolerance > 0) for one in stepped)


def test_passes_that_are_not_one_add_their_gradients(stepped):
    """Running rules, other scales, a loss of the centres beside; no pass is lost or taken twice."""
    for margin, other in (
        ("curricularface", None),
        ("arcface", "arcface_cold"),
        ("arcface", "npt_3"),
    ):
        heads = [make_head(margin, "reference", torch.float64) for _ in range(2)]
        if other is not None:
            options = {"margin": MARGINS[other](), "backend": "reference"}
            other_loss = functools.partial(fm.margin_loss, **options)
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
                        other_loss(x, head.weight, labels).backward()
                        if step == 1:
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
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_of_sampled_classes(backend, dtype, unsampled, sparse, stepped):
    """The rows of the sample step, and the others owe what they owed."""
    options = {"num_sampled": 30, "sparse_grad": sparse}
    heads = [make_head("adaface", backend, dtype, **options) for _ in range(2)]
    optimizers = [
        RowSGD(head.parameters(), **RULE, unsampled=unsampled, fused=fused)
        for head, fused in zip(heads, (True, False), strict=True)
    ]
    for x, labels in batches(3, heads[0].weight):
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
    assert len(stepped) == (0 if unsampled == "frozen" and not sparse else 3)


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


@pytest.mark.parametrize("strides", ["rows", "columns"])
@pytest.mark.parametrize("places", [[5, -1, 2, 99, -1], [-1, -1], [-1, 3], []])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_places_write_nothing(backend, places, strides, monkeypatch):
    """Chunks of two places, some without any row."""
    device = device_for(backend)
    chosen = fm.backends.get(backend)
    monkeypatch.setattr(type(chosen), "step_bytes", 2 * 4 * 4)
    weight, momentum, x = (torch.randn(n, 4, device=device) for n in (9, 9, 6))
    if strides == "columns":
        weight = weight.t().contiguous().t()
    x = nn.functional.normalize(x)
    index = torch.tensor(places, dtype=torch.int64, device=device)
    labels = torch.tensor([0, 1, 2, -1, 7, 3], device=device)
    d_lse, d_cos, lse = torch.rand(3, 6, device=device)
    update = fm.spec.SgdUpdate(0.1, 0.9, 0.2, True)
    part = fm.spec.GradientFactors(
        d_lse=d_lse,
        d_cos=d_cos,
        x_hat=x,
        labels=labels,
        lse_neg=lse + 5,
        scale=8.0,
        index=index,
        precision="fp32",
    )
    grad = chosen.row_stats_backward(weight, part)
    expected = [weight.clone(), momentum.clone()]
    for place, row in enumerate(places):
        if 0 <= row < 9:
            views = [tensor[row] for tensor in expected]
            update.apply_(*views, grad[place])
    chosen.centre_step(weight, momentum, update, part)
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
def test_nothing_of_the_size_of_the_centres(backend, sparse, monkeypatch):
    device, classes = device_for(backend), 3000
    if backend == "triton":  # a buffer of fixed size, here smaller than the centres
        from fastmargin.backends.triton import centres

        monkeypatch.setattr(centres, "STAGED_BYTES", 4096)
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
    assert step == 2 and len(largest.waits) == 1
