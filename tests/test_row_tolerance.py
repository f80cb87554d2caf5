"""Rows left out of the centre pass: which, what that may change, and that nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, NoForm, device_for
from processes import run
from sharded_cases import batch_of, compare, head_of, own_rows, steps

import fastmargin as fm
from fastmargin import testing

SOFTMAX = ["cosface", "arcface", "straight", "adaface", "no_form"]


def mixed(dtype=torch.float64, device="cpu"):
    """Rows from near their centre to anywhere, and ignored ones: every tolerance splits them."""
    case = testing.make_case("some_ignored", 32)
    own = torch.nn.functional.normalize(case.weight[case.labels.clamp_min(0)])
    x = 10 * own + torch.linspace(0.3, 6, 32)[:, None] * case.x / case.x.norm(dim=1).mean() * 5
    return testing.Case(x, case.weight, case.labels).to(dtype, device)


def misses(case, margin):
    """1 - p_y of every row in float64, 0 where it is ignored."""
    with torch.no_grad():
        rows = testing.plain_loss(
            case.x.double().cpu(),
            case.weight.double().cpu(),
            case.labels.cpu(),
            margin.cpu(),
            "none",
            stable=True,
        )
    return -torch.expm1(-rows)


def between(values):
    """A tolerance with about half of these on either side, and none of them near."""
    values = values[values > 0].sort().values
    ratios = (values[1:] / values[:-1])[len(values) // 3 : -len(values) // 3]
    low = values[len(values) // 3 + int(ratios.argmax())]
    return float(low * ratios.max().sqrt())


def gradients(case, margin, upstream=None, **options):
    x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
    reduction = "mean" if upstream is None else "none"
    loss = fm.margin_loss(x, weight, case.labels, margin, reduction, **options)
    total = loss if upstream is None else (loss * upstream).sum()
    return torch.autograd.grad(total, (x, weight))


@pytest.fixture
def tame():
    """Without a penalty, whose rows the plain miss would not know."""
    made = {
        "cosface": fm.CosFace(m=0.1, s=16),
        "arcface": fm.ArcFace(m=0.2, s=16),
        "straight": fm.ArcFace(m=0.2, s=16, guard="none", grad="straight_through"),
        "adaface": fm.AdaFace(m=0.1, s=16).eval(),
        "no_form": NoForm(s=16.0),
    }
    made["no_form"].penalty = lambda norm: None
    return made


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_up_to_the_tolerance_are_left_out(backend, name, tame):
    """As if their upstream gradient were 0, for the centres; embeddings see no difference."""
    device, margin = device_for(backend), tame[name]
    case = mixed()
    miss = misses(case, margin)
    tolerance = between(miss)
    kept = miss > tolerance
    assert 5 < kept.sum() < (case.labels >= 0).sum() - 5
    upstream = torch.randn(len(kept), dtype=torch.double)
    exact = gradients(case, margin, upstream, backend="reference")
    expected = gradients(case, margin, upstream * kept, backend="reference")
    dtype = torch.float64 if backend == "reference" else torch.float32
    low = case.to(dtype, device)
    found = gradients(
        low,
        margin.to(device),
        upstream.to(low.x),
        backend=backend,
        row_tolerance=tolerance,
    )
    allowed = 1e-12 if dtype == torch.float64 else 1e-4
    assert testing.relative_error(found[0], exact[0]) < allowed
    assert testing.relative_error(found[1], expected[1]) < allowed
    # so that this is seen at all
    assert testing.relative_error(found[1], exact[1]) > 10 * allowed


@pytest.mark.parametrize("weights", ["even", "uneven"])
@pytest.mark.parametrize("name", SOFTMAX)
def test_bound_of_the_error(name, weights, tame):
    """docs/math.md: sqrt(2) s tolerance sum |g_i| over the rows left out, over the least norm."""
    case, margin = mixed(), tame[name]
    miss = misses(case, margin)
    upstream = torch.full((len(miss),), 1 / len(miss), dtype=torch.double)
    if weights == "uneven":
        upstream = torch.randn(len(miss), dtype=torch.double) * 10
    exact = gradients(case, margin, upstream, backend="reference")[1]
    for tolerance in (*miss[miss > 0].quantile(torch.tensor([0.1, 0.5, 0.9]).double()), 0.999):
        found = gradients(
            case, margin, upstream, backend="reference", row_tolerance=float(tolerance)
        )[1]
        out = (miss <= tolerance) & (case.labels >= 0)
        bound = math.sqrt(2) * margin.s * tolerance * upstream[out].abs().sum()
        bound /= case.weight.norm(dim=1).min()
        assert 0 < (found - exact).norm() <= bound


def test_bound_is_reached():
    """One row nearly at right angles to two centres, left out by just its own 1 - p_y."""
    weight = 3 * torch.eye(3, dtype=torch.double)[:2]
    x = torch.tensor([[0.3, -0.3, 1.0]]).double()
    case, margin = testing.Case(x, weight, torch.tensor([0])), fm.CosFace(m=0.0, s=16)
    tolerance = float(misses(case, margin)) * (1 + 1e-9)
    exact = gradients(case, margin, backend="reference")[1]
    found = gradients(case, margin, backend="reference", row_tolerance=tolerance)[1]
    assert found.abs().max() == 0
    bound = math.sqrt(2) * margin.s * tolerance / 3
    assert 0.9 * bound < exact.norm() <= bound


@pytest.mark.parametrize("name", ["adaface", "no_form"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tolerance_changes_no_bit(backend, name, tame):
    device = device_for(backend)
    case = mixed(torch.float32, device)
    margin = tame[name].to(device)
    plain = gradients(case, margin, backend=backend)
    zero = gradients(case, margin, backend=backend, row_tolerance=0.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, zero, strict=True))


@pytest.mark.parametrize("name", ["adaface", "no_form"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_row_left_out(backend, name, tame):
    device = device_for(backend)
    case = testing.make_case("confident").to(torch.float32, device)
    margin = tame[name].to(device)
    margin.m = 0.0
    exact = gradients(case, margin, backend=backend)
    found = gradients(case, margin, backend=backend, row_tolerance=1 - 1e-7)
    assert torch.equal(found[0], exact[0]) and exact[1].abs().max() > 0
    assert found[1].abs().max() == 0


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_sampled_classes(backend, sparse, corrected):
    """The rows of the sample that take part are those of the classes that take part."""
    device = device_for(backend)
    case = mixed(torch.float32, device)
    heads = []
    for tolerance in (0.0, 0.3):
        head = fm.MarginHead(
            24,
            70,
            fm.CosFace(m=0.1, s=16),
            sample_rate=0.7,
            backend=backend,
            precision="fp32",
            sparse_grad=sparse,
            correct_sampling=corrected,
            row_tolerance=tolerance,
        ).to(device)
        head.weight.data.copy_(case.weight)
        heads.append(head)
    exact, ours = heads
    rows = exact(case.x, case.labels, reduction="none")  # both draw the same classes
    kept = -torch.expm1(-rows.detach()) > 0.3
    assert 3 < kept.sum() < (case.labels >= 0).sum() - 3
    (rows * kept).sum().backward()
    ours(case.x, case.labels, reduction="sum").backward()
    expected, found = (h.weight.grad.to_dense() if sparse else h.weight.grad for h in heads)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 0.1


def cool_steps(group, margin, tolerance, options=()):
    """Steps at a scale where random rows have any 1 - p_y."""
    head = head_of(margin, 70, group, row_tolerance=tolerance, **dict(options))
    head.margin.s = 4.0
    rows = slice(None) if group is None else own_rows(group.size(), group.rank())
    return steps(head, rows, count=1)


@pytest.mark.dist
@pytest.mark.parametrize("options", [(), (("num_sampled", 500),)])
@pytest.mark.parametrize("margin", ["adaface", "no_form"])
def test_of_shards(margin, options):
    """N processes leave out the rows that one does."""
    whole, exact = (cool_steps(None, margin, tolerance) for tolerance in (0.9985, 0.0))
    assert testing.relative_error(whole["weight"], exact["weight"]) > 1e-3
    compare(run(3, cool_steps, margin, 0.9985, options), whole, margin, 70, 3)


@pytest.mark.dist
def test_of_shards_with_statistics_of_each_process():
    start = batch_of(70)[1]
    moved = []
    for tolerance in (0.0, 0.9985, 1 - 1e-6):
        found = run(2, cool_steps, "adaface_local", tolerance)
        moved.append((torch.cat([own["weight"] for own in found]) - start).norm())
    assert moved[0] > moved[1] > 0 == moved[2]


def test_of_fp16_operands():
    """The scale of fp16 gradients follows the rows that stay."""
    device = device_for("triton")
    case, margin = mixed(torch.float32, device), fm.CosFace(m=0.1, s=32)
    miss = misses(case, margin)
    tolerance = between(miss)
    options = {"backend": "triton", "precision": "fp16"}
    upstream = torch.ones(len(miss), device=device)
    upstream[(miss <= tolerance).to(device)] = 1e6  # what is left out would set it
    found = gradients(case, margin, upstream, row_tolerance=tolerance, **options)[1]
    upstream[(miss <= tolerance).to(device)] = 0
    expected = gradients(case, margin, upstream, **options)[1]
    assert testing.relative_error(found, expected) < 1e-5


def test_compiled_leaves_out_the_same_rows():
    torch._dynamo.reset()
    case, margin = mixed(torch.float32), fm.CosFace(m=0.1, s=16)

    def loss(x, weight):
        return fm.margin_loss(
            x, weight, case.labels, margin, backend="cpu", row_tolerance=0.3, reduction="sum"
        )

    device_for("cpu")
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        found.append(torch.autograd.grad(function(x, weight), (x, weight)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    exact = gradients(case, margin, torch.ones(len(case.labels)), backend="cpu")
    assert not torch.allclose(found[0][1], exact[1], rtol=1e-2)


@pytest.mark.parametrize("dim", [5, 512])
@pytest.mark.parametrize("batch", [1, 16, 1, 70, 2100])
def test_compaction(batch, dim):
    """More rows than a program counts at once; NaN stays, so that it shows."""
    device = device_for("triton")
    from fastmargin.backends.triton.compact import compact

    if batch == 2100 and dim == 512:
        pytest.skip("slow in the interpreter, and nothing new")
    g = torch.Generator().manual_seed(batch)
    level = torch.randn(batch, generator=g)
    level[torch.rand(batch, generator=g) < 0.6] = torch.inf
    level[batch // 2] = torch.nan
    kept = level != torch.inf
    code = torch.arange(batch, dtype=torch.int32)
    rows = [level, code, *torch.randn(2, batch, generator=g)]
    rows.append(torch.randn(batch, dim, generator=g).half())
    whole = -(-batch // 128) * 128 - batch
    padded = [F.pad(level, (0, whole), value=torch.inf), F.pad(code, (0, whole), value=-2)]
    count, *moved = compact(*(t.to(device) for t in (*padded, *rows[2:])))
    assert count.tolist() == [int(kept.sum())]
    for given, found in zip(rows, moved, strict=True):
        torch.testing.assert_close(
            found[: int(count)].cpu(), given[kept], rtol=0, atol=0, equal_nan=True
        )
    # a block of nothing follows: the centre pass reads whole blocks
    assert [len(part) for part in moved[:2]] == [batch + whole] * 2
    for part, nothing in zip((*moved[:2], moved[-1]), (torch.inf, -2, 0), strict=True):
        assert part[int(count) :][:128].eq(nothing).all()
    nobody = torch.full_like(padded[0], torch.inf), padded[1], *rows[2:]
    count, *moved = compact(*(t.to(device) for t in nobody))
    assert count.item() == 0 and moved[0][:128].eq(torch.inf).all()


@pytest.mark.parametrize("batch", [5, 128, 130])
@pytest.mark.parametrize("alone", [True, False])
def test_what_follows_the_rows_does_nothing(alone, batch, monkeypatch):
    """The centre pass reads whole tiles of rows and masks none; both kernels that write them."""
    device = device_for("triton")
    from fastmargin.backends.triton import own_rows

    made, empty = [], own_rows.OwnRows.empty

    def noted(x_hat):
        made.append(empty(x_hat))
        made[-1].level.fill_(1.0), made[-1].code.fill_(7)
        return made[-1]

    monkeypatch.setattr(own_rows.OwnRows, "empty", staticmethod(noted))
    x, weight = torch.randn(batch, 8, device=device), torch.randn(7, 8, device=device)
    labels = torch.arange(batch, device=device) % 7
    if alone:
        each = torch.ones(batch, device=device)
        rows = {"d_lse": each, "d_cos": each, "x_hat": x, "labels": labels, "lse_neg": each}
        own_rows.own_rows(weight, fm.spec.GradientFactors(**rows, scale=4.0))
    else:
        head = fm.MarginHead(8, 7, fm.ArcFace(), backend="triton").to(device)
        head(x, labels).backward()
    (rows,) = made
    assert len(rows.level) == len(rows.code) == (256 if batch > 128 else 128)
    assert (rows.level[:batch] != 1).all() and rows.level[batch:].eq(torch.inf).all()
    assert (rows.code[:batch] == 2 * labels).all() and rows.code[batch:].eq(-2).all()


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_bad_tolerance(value):
    with pytest.raises(ValueError, match=r"row_tolerance must be in \[0, 1\)"):
        fm.MarginHead(4, 5, fm.ArcFace(), row_tolerance=value)
    with pytest.raises(ValueError, match=r"row_tolerance must be in \[0, 1\)"):
        fm.margin_loss(
            torch.ones(1, 4), torch.ones(5, 4), torch.tensor([1]), fm.ArcFace(), row_tolerance=value
        )


def test_nearest_centres_have_no_probability():
    with pytest.raises(ValueError, match="has no probability"):
        fm.MarginHead(4, 5, fm.NPT(), row_tolerance=0.1)
