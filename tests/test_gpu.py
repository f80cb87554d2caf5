"""What only a GPU can show: offsets beyond 2^31, graph capture, streams, no synchronisation."""

from __future__ import annotations

import pytest
import torch

import fastmargin as fm
from fastmargin import ops, testing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_offsets_beyond_31_bits(backend):
    """C x D = 2.25e9 elements: the last classes count as the first do."""
    classes, dim, batch = 4_400_000, 512, 32
    weight = torch.randn(classes, dim, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, classes, (batch,), device="cuda")
    labels[:8] = classes - 1 - torch.arange(8, device="cuda")
    x_hat = torch.nn.functional.normalize(torch.randn(batch, dim, device="cuda"))
    stats = ops.row_stats(x_hat, weight, labels, 32.0, precision="bf16", backend=backend)
    parts = []
    for start in range(0, classes, 400_000):
        part = ops.row_stats(
            x_hat, weight[start : start + 400_000], labels, 32.0, None, start, "fp32", "reference"
        )
        parts.append((part.lse_neg, part.cos_y))
    lse, cos_y = (torch.stack(p) for p in zip(*parts, strict=True))
    torch.testing.assert_close(stats.lse_neg, lse.logsumexp(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stats.cos_y, cos_y.sum(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_offsets_of_an_index_beyond_31_bits(backend):
    """Rows at both ends of 2.25e9 elements are what their copy is, and so are their gradients."""
    classes, dim, batch, places = 4_400_000, 512, 32, 1000
    weight = torch.randn(classes, dim, device="cuda", dtype=torch.bfloat16)
    index = torch.arange(places, device="cuda")
    index[::2] = classes - 1 - index[::2]
    index[7::10] = -1
    labels = torch.randint(0, places, (batch,), device="cuda")
    x_hat = torch.nn.functional.normalize(torch.randn(batch, dim, device="cuda"))

    def passes(x_hat, weight, index, labels, name, precision, sparse_grad):
        x_hat, weight = x_hat.clone().requires_grad_(), weight.requires_grad_()
        rest = {"precision": precision, "backend": name}
        rest |= {"index": index, "sparse_grad": sparse_grad}
        stats = ops.row_stats(x_hat, weight, labels, 32.0, **rest)
        top, _, _ = ops.row_topk(x_hat, weight, labels, 4, **rest)
        loss = (stats.lse_neg - stats.cos_y).sum()
        return stats.lse_neg, stats.cos_y, top, *torch.autograd.grad(loss, (x_hat, weight))

    *ours, gradient = passes(x_hat, weight, index, labels, backend, "bf16", True)
    copy, place = torch.where((index >= 0)[:, None], weight.detach()[index], 0), index.clone()
    place[index >= 0] = (index >= 0).nonzero().flatten()
    *plain, copied = passes(x_hat, copy, place, labels, "reference", "fp32", False)
    for a, b in zip(ours[:3], plain[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    assert testing.relative_error(ours[3], plain[3]) < 1e-2
    assert torch.equal(gradient._indices()[0][index >= 0], index[index >= 0])
    assert testing.relative_error(gradient._values(), copied) < 1e-2


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_pass_over_an_index_does_not_synchronise(sparse_grad):
    x_hat = torch.nn.functional.normalize(torch.randn(32, 64, device="cuda")).requires_grad_()
    weight = torch.randn(500, 64, device="cuda", requires_grad=True)
    index = torch.randperm(500, device="cuda")[:100]
    labels = torch.randint(-1, 100, (32,), device="cuda")

    def step():
        rest = {"index": index, "sparse_grad": sparse_grad}
        stats = ops.row_stats(x_hat, weight, labels, 32.0, **rest)
        top, _, _ = ops.row_topk(x_hat, weight, labels, 4, **rest)
        (stats.lse_neg.sum() + stats.cos_y.sum() + top.sum()).backward()
        weight.grad = None

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_captured_step_replays_with_new_data(backend):
    case = testing.make_case("random", batch=64, classes=1000, dim=128).to(torch.float32, "cuda")
    head = fm.MarginHead(128, 1000, fm.AdaFace(), backend=backend).cuda()
    x, labels = case.x.requires_grad_(), case.labels

    def step():
        head.weight.grad = x.grad = None
        loss = head(x, labels)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    head.weight.grad = x.grad = None
    with torch.cuda.graph(graph):
        loss = head(x, labels)
        loss.backward()
    state = {k: v.clone() for k, v in head.margin.state_dict().items()}
    fresh = testing.make_case("random", batch=64, classes=1000, dim=128, seed=7)
    with torch.no_grad():
        x.copy_(fresh.x)
        labels.copy_(fresh.labels)
    head.margin.load_state_dict(state)
    graph.replay()
    captured = loss.clone(), x.grad.clone(), head.weight.grad.clone()
    head.margin.load_state_dict(state)
    eager = step(), x.grad, head.weight.grad
    for a, b in zip(captured, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["arcface", "adaface", "kappaface", "npt"])
def test_training_step_does_not_synchronise(name):
    from conftest import MARGINS

    head = fm.MarginHead(64, 500, MARGINS[name]()).cuda()
    x = torch.randn(32, 64, device="cuda", requires_grad=True)
    labels = torch.randint(0, 500, (32,), device="cuda")
    head(x, labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        head(x, labels).backward()
        _ = head.metrics
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream():
    head = fm.MarginHead(64, 5000, fm.ArcFace()).cuda()
    x = torch.randn(32, 64, device="cuda")
    labels = torch.randint(0, 5000, (32,), device="cuda")
    expected = head(x, labels)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = x * 1.0
        loss = head(late, labels)
    stream.synchronize()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("precision", ["auto", "fp16", "tf32"])
def test_gradient_error_at_scale_64(precision):
    """At most 3e-4 of the float64 gradient with 16-bit operands, in a large, confident problem."""
    classes, dim, batch = 60_000, 512, 256
    g = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(classes, dim, device="cuda", generator=g)
    labels = torch.randint(0, classes, (batch,), device="cuda", generator=g)
    noise = torch.randn(batch, dim, device="cuda", generator=g)
    x = torch.nn.functional.normalize(weight[labels]) + 0.03 * noise
    margin = fm.ArcFace()

    def gradients(loss_of, x, weight):
        x, weight = x.requires_grad_(), weight.requires_grad_()
        return torch.autograd.grad(loss_of(x, weight), (x, weight))

    truth = gradients(
        lambda x, w: testing.plain_loss(x, w, labels, margin, stable=True),
        x.double(),
        weight.double(),
    )
    ours = gradients(
        lambda x, w: fm.margin_loss(x, w, labels, margin, backend="triton", precision=precision),
        x.clone(),
        weight.clone(),
    )
    for a, t in zip(ours, truth, strict=True):
        assert testing.relative_error(a, t) < (2e-3 if precision == "tf32" else 3e-4)
