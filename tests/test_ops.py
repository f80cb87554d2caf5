"""The operators as torch sees them: opcheck, gradcheck, compile, autocast."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from conftest import BACKENDS, MARGINS, ON_CPU, ON_GPU, device_for

import fastmargin as fm
from fastmargin import ops, testing
from fastmargin.spec import SOURCES, Draw, HardRule, MarginForm, NormEma


def tensors(backend, dtype=torch.float32, seed=0):
    device = device_for(backend)
    case = testing.make_case("some_ignored", batch=6, classes=9, dim=5, seed=seed)
    return case.to(dtype, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    case = tensors(backend)
    x, weight, labels = case.x, case.weight, case.labels
    device, n = x.device, len(x)
    x_hat = torch.nn.functional.normalize(x)
    grad_x, grad_w = x_hat.clone().requires_grad_(), weight.clone().requires_grad_()
    ema = torch.full((1,), 20.0, device=device), torch.full((1,), 9.0, device=device)
    strided_w = weight.t().contiguous().t().requires_grad_()
    index = torch.tensor([7, 0, -1, 3, 5], device=device)
    columns = (index == labels[:, None]).int().argmax(1) - 1  # some with a centre, some without
    plain = 8.0, None, None, 1.0
    hard = 8.0, x_hat[:, 0], x_hat[0, :3], 3.0
    checks = {
        "row_prologue": [
            (x.t().contiguous().t().requires_grad_(), labels, None, None, [], backend),
            (x.clone().requires_grad_(), labels, None, None, [], backend),
            (x.clone().requires_grad_(), labels, *ema, [0.1, 1e-3, 100.0], backend),
        ],
        "row_stats": [
            (*(grad_x, grad_w, None, labels), *plain, 0, True, False, 0.0, "auto", backend),
            (*(grad_x, strided_w, None, labels), *plain, 0, True, False, 0.0, "auto", backend),
            (*(x_hat, grad_w, None, labels), *hard, 3, False, False, 0.0, "auto", backend),
            (*(grad_x, grad_w, index, columns), *plain, 0, True, False, 0.5, "auto", backend),
            (*(x_hat, strided_w, index, columns), *hard, 3, False, False, 0.0, "auto", backend),
        ],
        "row_topk": [
            (grad_x, grad_w, None, labels, 3, 0, False, "auto", backend),
            (grad_x, grad_w, index, columns, 3, 0, False, "auto", backend),
        ],
    }
    lse = torch.rand(n, device=device)
    cos = (torch.rand(n, device=device) * 2 - 1).requires_grad_()
    after = "auto", backend
    checks["row_stats_backward"] = [
        (lse, lse, x_hat, weight, None, labels, *plain, 0, lse + 5, False, [], *after),
        (lse * 0, lse * 0, x_hat, weight, None, labels, *plain, 0, lse + 5, True, [], *after),
        (lse, lse, x_hat, weight, index, columns, *hard, 0, lse + 5, True, [], *after),
    ]
    buffer = torch.zeros_like(weight)
    checks["centre_step"] = [
        (
            *(x_hat, kind(weight), places, own, *rule, 0, lse + 5, False, [], *after, lse, lse),
            *(None if heavy == 0 else buffer.clone(), 0.1, heavy, 0.01, False, key),
        )
        for kind, places, own, rule, heavy, key in (
            (torch.clone, None, labels, plain, 0.9, None),
            (torch.Tensor.bfloat16, index, columns, hard, 0.0, 12345),
        )
    ]
    checks["row_stats_backward_x"] = [
        (lse, lse, x_hat, weight, None, labels, 8.0, 0, backend),
        (lse, lse, x_hat, weight, index, columns, 8.0, 0, backend),
    ]
    checks["row_prologue_backward"] = [
        (x, lse, x_hat, lse + 5, torch.bfloat16, backend),
        (x.t().contiguous().t(), None, x_hat, lse + 5, torch.float32, backend),
    ]
    nearest = torch.tensor([0, 2, 4, 3, -1, 1], device=device)[:, None].repeat(1, 2)
    top = torch.rand(n, 2, device=device)
    checks["hinge_loss"] = [
        (cos, top.clone().requires_grad_(), labels, 9, 2.0, 0.5, slot, reduction, backend)
        for slot, reduction in ((False, "mean"), (True, "sum"), (False, "none"))
    ]
    strided = top.t().contiguous().t().requires_grad_()
    checks["hinge_loss"] += [(cos, strided, labels, 9, 2.0, 0.5, True, "mean", backend)]
    checks["row_topk_backward"] = [
        (top, lse, x_hat, weight, None, labels, nearest, 0, backend),
        (top, lse, x_hat, weight, index, columns, nearest, 0, backend),
    ]
    checks["spread_rows"] = [(weight[:5], index, weight, distinct) for distinct in (True, False)]
    form = MarginForm(8.0, m2_u=0.5, source="class", guard="mm", table=torch.rand(9, device=device))
    by_row = replace(form, source="row")
    norm = (torch.rand(n, device=device) + 5).requires_grad_()
    checks["margin_rows"] = [
        (cos, lse, norm, labels, form.params(), form.codes(), None, None, form.table, backend),
        (cos, lse, norm, labels, form.params(), by_row.codes(), None, None, cos.detach(), backend),
    ]
    checks["marked"] = [(cos, norm, lse)]
    ada = replace(form, source="adaface", h=0.3, low=1e-3, high=100.0, mean=ema[0], std=ema[1])
    checks["softmax_loss"] = [
        (
            *(x, weight, None, labels, labels, 0, 9, form.params(), form.codes()),
            *(None, None, form.table, [], "mean", True, "auto", backend),
        ),
        (
            *(x, weight, None, labels, labels, 0, 9, form.params(), by_row.codes()),
            *(None, None, cos.detach(), [], "mean", True, "auto", backend),
        ),
        (
            *(x, weight, index, labels, columns, 0, 9, ada.params(), ada.codes()),
            *(*ema, None, [0.1, 1e-3, 100.0], "none", False, "auto", backend),
        ),
    ]
    loss_of = functools.partial(ops.softmax_loss, x, weight, labels, backend=backend)
    whole = loss_of(labels, 9, form, None, "mean", True).tensors()
    places = loss_of(columns, 9, ada, None, "none", True, index=index).tensors()
    checks["softmax_loss_backward"] = [
        (
            *(lse.sum(), whole, weight, None, labels, 0, 8.0, torch.bfloat16, True, True),
            *(0.1, "auto", backend),
        ),
        (
            *(lse, places, weight, index, columns, 0, 8.0, torch.float32, False, True),
            *(0.0, "auto", backend),
        ),
        (
            *(lse, places, weight, index, columns, 0, 8.0, torch.float32, True, False),
            *(0.0, "auto", backend),
        ),
    ]
    for name, samples in checks.items():
        options = {}
        if backend in ON_GPU and name.startswith("softmax_loss"):
            # never traced, and what the backend keeps for its centre pass has no shape of its own
            options["test_utils"] = ("test_schema", "test_autograd_registration")
        for sample in samples:
            torch.library.opcheck(getattr(torch.ops.fastmargin, name).default, sample, **options)


@pytest.mark.gradcheck
@pytest.mark.parametrize("backend", ON_CPU)
def test_gradcheck_of_every_op(backend):
    case = tensors(backend, torch.float64)
    labels = case.labels
    x, weight = case.x.requires_grad_(), case.weight.requires_grad_()
    x_hat = torch.nn.functional.normalize(case.x.detach()).requires_grad_()

    def prologue(x):
        return ops.row_prologue(x, labels, backend=backend)[:2]

    def stats(x_hat, weight, hard=None):
        s = ops.row_stats(x_hat, weight, labels, 4.0, hard, backend=backend)
        return s.lse_neg, s.cos_y

    def hard_stats(x_hat, weight):
        return stats(x_hat, weight, HardRule.of(torch.full((6,), 0.1).double(), 1.0, 0.3, 0.05))

    def topk(x_hat, weight):
        top, _, cos_y = ops.row_topk(x_hat, weight, labels, 3, backend=backend)
        return top, cos_y

    assert torch.autograd.gradcheck(prologue, (x,))
    assert torch.autograd.gradcheck(stats, (x_hat, weight))
    assert torch.autograd.gradcheck(hard_stats, (x_hat, weight))
    assert torch.autograd.gradcheck(topk, (x_hat, weight))


@pytest.mark.gradcheck
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("guard", ["none", "clip", "mm", "mmm", "easy"])
@pytest.mark.parametrize("source", SOURCES)
def test_gradcheck_of_margin_rows(backend, guard, source):
    device_for(backend)
    labels = torch.tensor([0, 3, -1, 2, 1, 0, 4])
    cos = torch.tensor([0.3, -0.9, 0.1, -0.2, 0.8, -0.99, 0.05]).double().requires_grad_()
    lse = (torch.rand(7).double() * 4).requires_grad_()
    norm = torch.linspace(12.3, 19, 7).double().requires_grad_()
    form = MarginForm(
        4.0,
        m2=0.2,
        m3=0.1,
        m2_u=0.02 if source == "norm" else 0.3,
        m3_u=0.01,
        source=source,
        guard=guard,
        angle_eps=1e-3,
        h=0.333,
        low=13.0,
        high=18.0,
        eps=1e-3,
        mean=torch.tensor([15.0]).double(),
        std=torch.tensor([2.0]).double(),
        table=torch.rand(7 if source == "row" else 5).double(),
    )

    def rows(cos, lse, norm):
        return ops.margin_rows(cos, lse, norm, labels, form, backend=backend)[0]

    if source == "adaface":  # by definition no gradient through the norm
        assert torch.autograd.grad(rows(cos, lse, norm).sum(), norm)[0].abs().max() == 0
        norm = norm.detach()
    assert torch.autograd.gradcheck(rows, (cos, lse, norm))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_of_other_rows_is_refused(backend):
    """Kernels read it by row, past its end if it were shorter."""
    case = tensors(backend)
    on, labels = case.x.device, case.labels
    rows = torch.rand(3, len(labels), device=on)
    draw = Draw(*torch.ones(2, 1, dtype=torch.int64, device=on))
    for table, drawing, says in (
        (rows[0, :5], None, r"shape \(5,\), expected one number for each row, \(6,\)"),
        (torch.rand(7, device=on), None, r"shape \(7,\)"),
        (rows[:1], None, r"shape \(1, 6\)"),
        (None, None, "needs a table"),
        (None, draw, "draw it with ops.row_normals"),
    ):
        form = MarginForm(8.0, m2_u=0.5, source="row", table=table, draw=drawing)
        with pytest.raises(ValueError, match=says):
            ops.margin_rows(*rows, labels, form, backend=backend)
        with pytest.raises(ValueError, match=says):
            about = 9, form, None, "mean", True
            ops.softmax_loss(case.x, case.weight, labels, labels, *about, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", ["class", "row"])
def test_tables_may_be_strided(backend, source):
    case = tensors(backend)
    rows = torch.rand(3, 6, device=case.x.device)
    table = torch.rand(9 if source == "class" else 6, 2, device=case.x.device)[:, 1]
    form = MarginForm(8.0, m2_u=0.5, source=source, table=table)
    plain = replace(form, table=table.contiguous())
    got = ops.margin_rows(*rows, case.labels, form, backend=backend)
    right = ops.margin_rows(*rows, case.labels, plain, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
    about = None, "sum", True
    got = ops.softmax_loss(
        case.x, case.weight, case.labels, case.labels, 9, form, *about, backend=backend
    )
    right = ops.softmax_loss(
        case.x, case.weight, case.labels, case.labels, 9, plain, *about, backend=backend
    )
    assert torch.equal(got.loss, right.loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_stats_of_shards_add_up(backend):
    """Two shards by ``class_start``, one of them empty of labels, merge to the whole."""
    case = tensors(backend)
    x_hat = torch.nn.functional.normalize(case.x)
    whole = ops.row_stats(x_hat, case.weight, case.labels, 8.0, backend=backend)
    parts = [
        ops.row_stats(x_hat, case.weight[a:b], case.labels, 8.0, class_start=a, backend=backend)
        for a, b in ((0, 4), (4, 4), (4, 9))
    ]
    lse = torch.logsumexp(torch.stack([p.lse_neg for p in parts]), 0)
    torch.testing.assert_close(lse, whole.lse_neg)
    torch.testing.assert_close(sum(p.cos_y for p in parts), whole.cos_y)
    torch.testing.assert_close(torch.stack([p.max_neg for p in parts]).amax(0), whole.max_neg)
    assert (parts[1].lse_neg == -torch.inf).all() and (parts[1].cos_y == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_shards_add_up(backend):
    """With ``class_start`` the own centre is found on its shard, and only there."""
    case = tensors(backend)
    x_hat = torch.nn.functional.normalize(case.x)
    upstream = torch.randn(2, len(x_hat), device=x_hat.device)

    def gradients(weight, start, whole_lse=None):
        x, w = x_hat.clone().requires_grad_(), weight.clone().requires_grad_()
        stats = ops.row_stats(
            x, w, case.labels, 8.0, class_start=start, precision="fp32", backend=backend
        )
        # d lse of the whole by lse of the part is its share of the sum
        share = 1 if whole_lse is None else (stats.lse_neg - whole_lse).exp().detach()
        total = (stats.lse_neg * share * upstream[0] + stats.cos_y * upstream[1]).sum()
        _, _, cos_y = ops.row_topk(x, w, case.labels, 2, start, "fp32", backend)
        return stats.lse_neg.detach(), *torch.autograd.grad(total + cos_y.sum(), (x, w))

    lse, dx, dw = gradients(case.weight, 0)
    parts = [gradients(case.weight[a:b], a, lse) for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(sum(p[1] for p in parts), dx, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([p[2] for p in parts]), dw, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 30.0, 64.0, 90.0, 256.0])
def test_bounded_and_unbounded_logits(backend, scale):
    """The plain sums and the running maximum, with and without a rule that doubles the bound."""
    device = device_for(backend)
    case = testing.make_case("ragged", dim=16)
    case = testing.Case(case.x, case.weight, case.labels)
    x_hat = torch.nn.functional.normalize(case.x)
    x_hat[0] = torch.nn.functional.normalize(case.weight)[3]
    x_hat[1] = -x_hat[0]
    threshold = torch.full((len(x_hat),), 0.1, dtype=torch.double)
    for hard in (None, HardRule.of(threshold, 1.0, 0.9, 0.0)):
        truth = ops.row_stats(x_hat, case.weight, case.labels, scale, hard, backend="reference")
        low = None if hard is None else HardRule.of(threshold.float().to(device), 1.0, 0.9, 0.0)
        ours = ops.row_stats(
            x_hat.float().to(device),
            case.weight.float().to(device),
            case.labels.to(device),
            scale,
            low,
            precision="fp32",
            backend=backend,
        )
        torch.testing.assert_close(
            ours.lse_neg.double().cpu(), truth.lse_neg, rtol=2e-6, atol=4e-7 * scale
        )
        torch.testing.assert_close(ours.cos_y.double().cpu(), truth.cos_y, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.max_neg.double().cpu(), truth.max_neg, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_rule_gradients(backend):
    device = device_for(backend)
    case = testing.make_case("random", dim=8)
    threshold = torch.linspace(-0.2, 0.4, len(case.x)).double()
    upstream = torch.randn(len(case.x)).double()

    def gradients(case, name, threshold, upstream):
        x = torch.nn.functional.normalize(case.x).requires_grad_()
        w = case.weight.clone().requires_grad_()
        rule = HardRule.of(threshold, 0.5, 0.9, 0.1)
        precision = "auto" if case.x.dtype == torch.float64 else "fp32"
        stats = ops.row_stats(x, w, case.labels, 20.0, rule, precision=precision, backend=name)
        return torch.autograd.grad((stats.lse_neg * upstream).sum(), (x, w))

    truth = gradients(case, "reference", threshold, upstream)
    low = case.to(torch.float32, device)
    ours = gradients(low, backend, threshold.float().to(device), upstream.float().to(device))
    for a, t in zip(ours, truth, strict=True):
        assert testing.relative_error(a, t) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_topk_ties_and_short_rows(backend):
    device = device_for(backend)
    weight = torch.eye(4, device=device)[[0, 1, 1, 0, 2]]
    x_hat = torch.eye(4, device=device)[:2]
    labels = torch.tensor([3, -1], device=device)
    top, index, cos_y = ops.row_topk(x_hat, weight, labels, 6, backend=backend)
    assert index.tolist() == [[0, 1, 2, 4, -1, -1], [1, 2, 0, 3, 4, -1]]
    assert top.tolist() == [[1, 0, 0, 0, *[-torch.inf] * 2], [1, 1, 0, 0, 0, -torch.inf]]
    assert cos_y.tolist() == [1, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_statistics(backend):
    device = device_for(backend)
    x = torch.randn(9, 6, device=device) * torch.linspace(0.0, 90, 9, device=device)[:, None]
    labels = torch.tensor([0, 1, -1, 3, 4, 5, -1, 7, 8], device=device)
    ema = NormEma(
        torch.tensor([20.0], device=device), torch.tensor([100.0], device=device), 0.3, 1e-3, 100.0
    )
    _, norm, mean, std = ops.row_prologue(x, labels, ema, backend=backend)
    torch.testing.assert_close(norm, torch.where(labels >= 0, x.norm(dim=1), 0))
    counted = norm[labels >= 0].clamp(1e-3, 100)
    torch.testing.assert_close(mean, 0.3 * counted.mean()[None] + 0.7 * 20)
    torch.testing.assert_close(std, 0.3 * counted.std()[None] + 0.7 * 100)

    _, _, mean, std = ops.row_prologue(x[5:6], labels[5:6], ema, backend=backend)
    torch.testing.assert_close(mean, 0.3 * norm[5:6].clamp_max(100) + 0.7 * 20)
    assert std.item() == 100
    _, _, mean, std = ops.row_prologue(x[2:3], labels[2:3], ema, backend=backend)
    assert mean.item() == 20 and std.item() == 100


@pytest.mark.parametrize("name", ["arcface", "adaface", "kappaface", "elasticface", "npt"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager(backend, name):
    """One graph, state and ignored rows included; the kernels are the same, so are the bits."""
    torch._dynamo.reset()  # its limit on recompilations counts over all the tests of a process
    case = tensors(backend)
    heads = []
    for _ in range(2):
        head = fm.MarginHead(5, 9, MARGINS[name](), backend=backend).to(case.x.device)
        head.weight.data.copy_(case.weight)
        heads.append(head)
    eager, compiled = heads[0], torch.compile(heads[1], fullgraph=True, backend="aot_eager")
    for batch in (6, 5, 6):
        results = []
        for head in (eager, compiled):
            x = case.x[:batch].clone().requires_grad_()
            loss = head(x, case.labels[:batch])
            results.append((loss, *torch.autograd.grad(loss, (x, head.weight))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(eager.state_dict().values(), heads[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ON_CPU)
def test_inductor_equals_eager(backend):
    """Through code generation, with an embedding of odd strides."""
    torch._dynamo.reset()
    case = tensors(backend)
    x = case.x.t().contiguous().t().requires_grad_()
    weight = case.weight.requires_grad_()

    def loss(x, weight, labels):
        return fm.margin_loss(x, weight, labels, fm.ArcFace(), backend=backend)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        value = function(x, weight, case.labels)
        results.append((value, *torch.autograd.grad(value, (x, weight))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_centres_alone(backend):
    case = tensors(backend)
    head = fm.MarginHead(5, 9, fm.ArcFace(), backend=backend, precision="fp32").to(case.x.device)
    plain = head(case.x, case.labels)
    with torch.autocast(case.x.device.type, dtype=torch.bfloat16):
        cast = head(case.x, case.labels)
        low = head(case.x.bfloat16(), case.labels)
    assert cast.dtype == torch.float32 and torch.equal(cast, plain)
    torch.testing.assert_close(low, plain, rtol=2e-2, atol=2e-2)
    low.backward()
    assert head.weight.dtype == head.weight.grad.dtype == torch.float32


def test_pull_is_asked_for_when_needed():
    """Only a gradient of the embeddings pays for the second product of the forward pass."""
    case = tensors("reference")
    x_hat = torch.nn.functional.normalize(case.x)
    assert ops.row_stats(x_hat, case.weight, case.labels, 8.0).pull.shape[0] == 0
    stats = ops.row_stats(x_hat.clone().requires_grad_(), case.weight, case.labels, 8.0)
    assert stats.pull.shape == x_hat.shape
