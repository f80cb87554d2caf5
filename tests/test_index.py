"""Passes over the rows of an index against gathered centres in float64: backends, regimes."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS, ON_CPU, ON_GPU, device_for

from fastmargin import ops, testing
from fastmargin.norms import inverse_norm
from fastmargin.spec import HardRule

SCALE = 32.0


def sampled(case: testing.Case, gaps: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An index with all the labels and about half of the other classes, in random order, and the
    labels as its columns; with ``gaps`` a third of its places are empty."""
    g = torch.Generator().manual_seed(seed)
    classes = case.weight.shape[0]
    taken = torch.rand(classes, generator=g) < 0.5
    taken[case.labels[case.labels >= 0]] = True
    index = taken.nonzero().flatten()
    if gaps:
        index = torch.cat([index, torch.full((len(index) // 2 + 1,), -1)])
    index = index[torch.randperm(len(index), generator=g)]
    column = torch.full((classes + 1,), -1)
    column[index] = torch.arange(len(index))
    column[-1] = -1  # where empty places and ignored rows have put themselves
    return index, column[case.labels]


def passes(backend, x_hat, weight, labels, index, hard=None, sparse_grad=False, scale=SCALE):
    """Every output and gradient of the two passes by name, on the CPU."""
    device = device_for(backend)
    g = torch.Generator().manual_seed(3)
    upstream = torch.randn(5, len(x_hat), generator=g, dtype=torch.float64).to(device, x_hat.dtype)
    x_hat, weight = (t.detach().to(device).requires_grad_() for t in (x_hat, weight))
    labels, index = labels.to(device), None if index is None else index.to(device)
    rest = {"precision": "fp32" if x_hat.dtype == torch.float32 else "auto", "backend": backend}
    rest |= {"index": index, "sparse_grad": sparse_grad}
    stats = ops.row_stats(x_hat, weight, labels, scale, hard, **rest)
    top, nearest, cos_y = ops.row_topk(x_hat, weight, labels, 3, **rest)
    total = stats.lse_neg @ upstream[0] + stats.cos_y @ upstream[1]
    dx, dw = torch.autograd.grad(total, (x_hat, weight))
    total = (torch.where(nearest >= 0, top, 0).T * upstream[2:]).sum() + cos_y @ upstream[1]
    top_dx, top_dw = torch.autograd.grad(total, (x_hat, weight))
    found = {"lse_neg": stats.lse_neg, "cos_y": stats.cos_y, "max_neg": stats.max_neg}
    found |= {"top": top, "nearest": nearest, "top_cos_y": cos_y, "dx": dx, "top_dx": top_dx}
    found |= {"dw": dw, "top_dw": top_dw}
    return {name: value.detach().cpu() for name, value in found.items()}


def gathered(x_hat, weight, labels, index, hard=None, scale=SCALE):
    """What ``passes`` should find, in float64 from a copy of the rows that take part."""
    places = (index >= 0).nonzero().flatten()  # of the index, by column of the copy
    rows = index[places]
    column = torch.full((len(index) + 1,), -1)
    column[places] = torch.arange(len(places))
    found = passes("reference", x_hat, weight[rows], column[labels], None, hard, scale=scale)
    for name in ("dw", "top_dw"):
        whole = torch.zeros_like(weight)
        whole[rows] = found[name]
        found[name] = whole
    nearest = found["nearest"]
    if len(places):
        found["nearest"] = torch.where(nearest >= 0, places[nearest], -1)
    return found


def unit(x):
    return x * inverse_norm(x)


def assert_same(ours, truth, rtol):
    for name, expected in truth.items():
        value = ours[name]
        if name == "nearest":
            assert torch.equal(value == -1, expected == -1)
            continue
        infinite = torch.isinf(expected)
        assert torch.equal(torch.isinf(value), infinite), name
        value, expected = (torch.where(infinite, 0, t.double()) for t in (value, expected))
        size = 1 if name in ("cos_y", "top_cos_y", "top", "max_neg") else float(expected.norm())
        error = float((value - expected).norm())
        assert error <= rtol * max(size, 1e-3), (name, error, size)


@pytest.mark.parametrize("gaps", [False, True], ids=["full", "gaps"])
@pytest.mark.parametrize("regime", testing.REGIMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_regimes(backend, regime, gaps):
    case = testing.make_case(regime, batch=10, classes=40, dim=12)
    index, labels = sampled(case, gaps)
    x_hat = unit(case.x).float().double()
    truth = gathered(x_hat, case.weight, labels, index)
    assert_same(passes(backend, x_hat.float(), case.weight.float(), labels, index), truth, 3e-5)
    if backend in ON_CPU:
        ours = passes(backend, x_hat, case.weight, labels, index)
        assert_same(ours, truth, 1e-12)
        # cosines that differ by a rounding may change places
        assert (ours["nearest"] != truth["nearest"]).float().mean() < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_rule(backend):
    case = testing.make_case("random", batch=10, dim=12)
    index, labels = sampled(case, gaps=True)
    x_hat = unit(case.x).float().double()
    cos_y = ops.target_cosine(x_hat, case.weight, labels, index=index)
    torch.testing.assert_close(cos_y, ops.target_cosine(x_hat, case.weight, case.labels))

    def rule(dtype, device="cpu"):
        return HardRule.of((0.5 * cos_y).to(device, dtype), 1.0, 0.3, 0.0)

    truth = gathered(x_hat, case.weight, labels, index, rule(torch.float64))
    hard = rule(torch.float32, device_for(backend))
    ours = passes(backend, x_hat.float(), case.weight.float(), labels, index, hard)
    assert_same(ours, truth, 3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_permutation_of_all_rows(backend):
    case = testing.make_case("ragged", batch=10, dim=12).to(torch.float32)
    index = torch.randperm(len(case.weight))
    labels = index.argsort()[case.labels]
    x_hat = unit(case.x)
    ours = passes(backend, x_hat, case.weight, labels, index)
    whole = passes(backend, x_hat, case.weight, case.labels, None)
    assert_same(ours, whole, 2e-6)
    assert torch.equal(
        torch.where(ours["nearest"] >= 0, index[ours["nearest"]], -1).sort().values,
        whole["nearest"].sort().values,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_takes_part(backend):
    """Empty places only, no places, no rows: values beyond the rows are empty places too."""
    case = testing.make_case("random", batch=5, classes=7, dim=6).to(torch.float32)
    x_hat, labels = unit(case.x), torch.tensor([0, 1, -1, 2, 9])
    for weight, index in (
        (case.weight, torch.full((70,), -1)),
        (case.weight, torch.tensor([7, -2, 2**40, -(2**63)])),
        (case.weight, torch.empty(0, dtype=torch.int64)),
        (case.weight[:0], torch.tensor([0, -1, 3])),
    ):
        for sparse_grad in (False, True):
            found = passes(backend, x_hat, weight, labels, index, sparse_grad=sparse_grad)
            for name in ("lse_neg", "max_neg", "top"):
                assert torch.isneginf(found[name]).all(), name
            assert (found["nearest"] == -1).all()
            for name in ("cos_y", "top_cos_y", "dx", "top_dx", "dw", "top_dw"):
                value = found[name].to_dense()
                assert value.eq(0).all(), name
            assert found["dw"].shape == weight.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_place(backend):
    case = testing.make_case("random", batch=4, classes=7, dim=6)
    x_hat, index = unit(case.x).float().double(), torch.tensor([4])
    labels = torch.tensor([0, -1, 0, 1])
    truth = gathered(x_hat, case.weight, torch.tensor([0, -1, 0, -1]), index)
    ours = passes(backend, x_hat.float(), case.weight.float(), labels, index)
    assert_same(ours, truth, 1e-5)
    assert torch.isneginf(ours["lse_neg"]).tolist() == [True, False, True, False]
    assert ours["dw"].abs().amax(1).gt(0).nonzero().tolist() == [[4]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_on_an_empty_place_has_no_centre(backend):
    case = testing.make_case("random", batch=4, classes=7, dim=6).to(torch.float32)
    x_hat, index = unit(case.x), torch.tensor([3, -1, 5])
    ours, none = (
        passes(backend, x_hat, case.weight, torch.tensor(labels), index)
        for labels in ([1, 1, 1, 1], [-1, -1, -1, -1])
    )
    for name, value in ours.items():
        assert torch.equal(value, none[name]), name
    assert ours["cos_y"].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_places_weigh_nothing_among_far_negatives(backend):
    """exp(s * 0 - lse) of an empty place would be infinite where every cosine is near -1."""
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(8, generator=g)
    weight = direction + 0.01 * torch.randn(40, 8, generator=g)
    x_hat = unit(-direction + 0.01 * torch.randn(3, 8, generator=g))
    index, labels = torch.tensor([3, -1, 17, 22, -1]), torch.tensor([0, -1, 3])
    truth = gathered(x_hat.double(), weight.double(), labels, index, scale=128.0)
    assert truth["lse_neg"].max() < -100
    for sparse_grad in (False, True):
        ours = passes(backend, x_hat, weight, labels, index, sparse_grad=sparse_grad, scale=128.0)
        assert_same({name: value.to_dense() for name, value in ours.items()}, truth, 1e-4)


@pytest.mark.parametrize("gaps", [False, True], ids=["full", "gaps"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_gradient_is_the_dense_one(backend, gaps):
    case = testing.make_case("some_ignored", batch=10, dim=12).to(torch.float32)
    index, labels = sampled(case, gaps)
    for chosen, y in ((index, labels), (None, case.labels)):
        dense, sparse = (
            passes(backend, unit(case.x), case.weight, y, chosen, sparse_grad=sparse_grad)
            for sparse_grad in (False, True)
        )
        for name, entries in (
            ("dw", len(index if chosen is not None else case.weight)),
            ("top_dw", 4 * len(y)),
        ):
            gradient = sparse[name]
            assert gradient.layout == torch.sparse_coo and dense[name].layout == torch.strided
            assert gradient.shape == case.weight.shape and gradient.sparse_dim() == 1
            assert gradient._nnz() == entries
            touched = gradient._indices().unique()
            if chosen is not None:  # no row is listed that does not take part
                assert torch.isin(touched, index).all()
            torch.testing.assert_close(gradient.to_dense(), dense[name])
        if chosen is not None:
            untouched = torch.ones(len(case.weight), dtype=torch.bool)
            untouched[index[index >= 0]] = False
            assert untouched.any() and dense["dw"][untouched].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_31_bits(backend, tmp_path):
    """2.25e9 elements in a file of holes; a gradient of this size would not fit in memory."""
    device_for(backend)
    if torch.cuda.is_available() and backend in ON_GPU:
        pytest.skip("test_gpu.py has it")
    rows, dim = 70_000_000, 32
    path = str(tmp_path / "weight")
    weight = torch.from_file(path, shared=True, size=rows * dim, dtype=torch.bfloat16)
    weight = weight.view(rows, dim)
    index = rows - 1 - torch.arange(0, 64, 7)
    index[3], index[4] = -1, 5
    for row in index[index >= 0].tolist():
        weight[row] = torch.randn(dim).bfloat16()
    x_hat, labels = unit(torch.randn(3, dim)), torch.tensor([0, 1, -1])
    kept = index[index >= 0]
    column = torch.where(index >= 0, (index >= 0).cumsum(0) - 1, -1)
    copy = passes(backend, x_hat, weight[kept], labels, None)
    ours = passes(backend, x_hat, weight, labels, index, sparse_grad=True)
    for name in ("lse_neg", "cos_y", "max_neg", "top", "dx", "top_dx"):
        torch.testing.assert_close(ours[name], copy[name], rtol=1e-6, atol=1e-6)
    taken = column[ours["nearest"]]
    assert torch.equal(taken, copy["nearest"])
    assert torch.equal(ours["dw"]._indices()[0][index >= 0], kept)
    assert torch.equal(ours["dw"]._values()[index >= 0], copy["dw"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend):
    case = testing.make_case("repeated", classes=20, dim=12).to(torch.float32)
    index, labels = sampled(case, gaps=True)
    first, second = (passes(backend, unit(case.x), case.weight, labels, index) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_ties_go_to_the_lower_column(backend):
    device = device_for(backend)
    weight = torch.eye(4, device=device)[[0, 1, 1, 0, 2]]
    x_hat = torch.eye(4, device=device)[:2]
    index = torch.tensor([4, 3, -1, 2, 0, 1], device=device)
    labels = torch.tensor([1, -1], device=device)
    top, nearest, cos_y = ops.row_topk(x_hat, weight, labels, 6, backend=backend, index=index)
    assert nearest.tolist() == [[4, 0, 3, 5, -1, -1], [3, 5, 0, 1, 4, -1]]
    assert top.tolist() == [[1, 0, 0, 0, *[-torch.inf] * 2], [1, 1, 0, 0, 0, -torch.inf]]
    assert cos_y.tolist() == [1, 0]


@pytest.mark.parametrize("layout", ["transposed", "every_other_column", "every_other_row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_layouts(backend, dtype, layout):
    """Any strides, of the index too, are what a contiguous copy is."""
    case = testing.make_case("random", batch=10, dim=20).to(torch.float32)
    index, labels = sampled(case, gaps=True)
    weight = case.weight.to(dtype)
    strided = {
        "transposed": lambda: weight.t().contiguous().t(),
        "every_other_column": lambda: torch.stack([weight, -weight], 2).flatten(1)[:, ::2],
        "every_other_row": lambda: torch.stack([weight, -weight], 1).flatten(0, 1)[::2],
    }[layout]()
    assert torch.equal(strided, weight) and not strided.is_contiguous()
    spread = torch.stack([index, -index], 1).flatten()[::2]
    ours = passes(backend, unit(case.x), strided, labels, spread)
    whole = passes(backend, unit(case.x), weight, labels, index)
    for name, value in whole.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.gradcheck
@pytest.mark.parametrize("backend", ON_CPU)
def test_gradcheck(backend):
    device_for(backend)
    case = testing.make_case("some_ignored", batch=6, classes=9, dim=5)
    index = torch.tensor([7, 0, -1, 3, 5, 8])
    labels = torch.tensor([0, 1, 2, -1, 5, 3])
    x_hat, weight = unit(case.x).requires_grad_(), case.weight.requires_grad_()
    hard = HardRule.of(torch.full((6,), 0.1).double(), 1.0, 0.3, 0.05)

    def stats(x_hat, weight):
        s = ops.row_stats(x_hat, weight, labels, 4.0, hard, backend=backend, index=index)
        return s.lse_neg, s.cos_y

    def topk(x_hat, weight):
        top, _, cos_y = ops.row_topk(x_hat, weight, labels, 3, backend=backend, index=index)
        return top, cos_y

    assert torch.autograd.gradcheck(stats, (x_hat, weight))
    assert torch.autograd.gradcheck(topk, (x_hat, weight))


@pytest.mark.parametrize(
    ("backend", "engine"), [("reference", "aot_eager"), ("cpu", "aot_eager"), ("cpu", "inductor")]
)
def test_compiled_equals_eager(backend, engine):
    torch._dynamo.reset()  # its limit on recompilations counts over all the tests of a process
    device_for(backend)
    case = testing.make_case("some_ignored", batch=10, dim=12).to(torch.float32)

    def loss(x, weight, labels, index):
        x_hat, *_ = ops.row_prologue(x, labels, backend=backend)
        cos_y = ops.target_cosine(x_hat, weight, labels, index=index)
        hard = HardRule.of(cos_y, 1.0, 0.3, 0.0)
        stats = ops.row_stats(x_hat, weight, labels, 8.0, hard, backend=backend, index=index)
        top, _, _ = ops.row_topk(x_hat, weight, labels, 2, backend=backend, index=index)
        return (stats.lse_neg - 8 * stats.cos_y).sum() + top.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=engine)
    for seed in (0, 1):  # of another length, too
        index, labels = sampled(case, gaps=True, seed=seed)
        results = []
        for function in (loss, compiled):
            x, weight = (t.clone().requires_grad_() for t in (case.x, case.weight))
            value = function(x, weight, labels, index)
            results.append((value, *torch.autograd.grad(value, (x, weight))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_spread_rows():
    weight = torch.zeros(6, 2, dtype=torch.bfloat16)
    rows = torch.tensor([[1.0, 2], [0, 0], [3, 4], [5, 6]])
    index = torch.tensor([4, -1, 2, 1])
    expected = torch.tensor([[0, 0], [5.0, 6], [3, 4], [0, 0], [1, 2], [0, 0]]).bfloat16()
    assert torch.equal(ops.spread_rows(rows, index, weight), expected)
    sparse = ops.spread_rows(rows, index, weight, sparse_grad=True)
    assert sparse.dtype == torch.bfloat16 and sparse.device == weight.device
    assert torch.equal(sparse.to_dense(), expected)
    assert sparse._indices()[0, 1] in (4, 2, 1)  # an optimiser may decay what is listed
    twice = torch.tensor([4, 6, 4, -1])
    expected = torch.zeros(6, 2).bfloat16()
    expected[4] = torch.tensor([4.0, 6])
    assert torch.equal(ops.spread_rows(rows, twice, weight, distinct=False), expected)
    whole = torch.randn(6, 2)
    assert torch.equal(ops.spread_rows(whole, None, weight), whole.bfloat16())
    assert torch.equal(ops.spread_rows(whole, None, weight, True).to_dense(), whole.bfloat16())


def test_optimisers_take_the_sparse_gradient():
    case = testing.make_case("random", batch=10, dim=12).to(torch.float32)
    index, labels = sampled(case, gaps=True)
    results = []
    for sparse_grad in (False, True):
        weight = torch.nn.Parameter(case.weight.clone())
        optimiser = torch.optim.SGD([weight], lr=0.1)
        for _ in range(2):  # gradients accumulate
            rest = {"index": index, "sparse_grad": sparse_grad}
            stats = ops.row_stats(unit(case.x), weight, labels, 8.0, **rest)
            top, _, _ = ops.row_topk(unit(case.x), weight, labels, 2, **rest)
            (stats.lse_neg.sum() + top.sum()).backward()
        assert weight.grad.is_sparse == sparse_grad
        optimiser.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0], case.weight)


@pytest.mark.parametrize(
    ("index", "error", "says"),
    [
        (torch.zeros(3, dtype=torch.int32), TypeError, r"index must be int64.*index\.long\(\)"),
        (torch.zeros(3, 1, dtype=torch.int64), ValueError, r"index must have shape \(K,\)"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), ValueError, "index is on meta.*move"),
    ],
)
def test_a_wrong_index_is_refused(index, error, says):
    case = testing.make_case("random", batch=4, classes=7, dim=6)
    for call in (
        lambda: ops.row_stats(case.x, case.weight, case.labels, 8.0, index=index),
        lambda: ops.row_topk(case.x, case.weight, case.labels, 2, index=index),
        lambda: ops.target_cosine(case.x, case.weight, case.labels, index=index),
    ):
        with pytest.raises(error, match=says):
            call()
