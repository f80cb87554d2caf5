"""What only a GPU can show: offsets beyond 2^31, graph capture, streams, no synchronisation."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from conftest import MARGINS, ON_GPU, device_for

import fastmargin as fm
from fastmargin import deferred, ops, testing
from fastmargin.sampling import ClassSampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("backend", ON_GPU)
def test_offsets_beyond_31_bits(backend):
    """C x D = 2.25e9 elements: the last classes count as the first do."""
    device_for(backend)
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


@pytest.mark.parametrize("backend", ON_GPU)
def test_offsets_of_an_index_beyond_31_bits(backend):
    """Rows at both ends of 2.25e9 elements are what their copy is, and so are their gradients."""
    device_for(backend)
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


@pytest.mark.parametrize("row_tolerance", [0.0, 0.9])
@pytest.mark.parametrize("backend", ON_GPU)
def test_captured_step_replays_with_new_data(backend, row_tolerance):
    """With rows left out, too: how many they are is not the graph's."""
    device_for(backend)
    margin = fm.AdaFace(m=0.1, s=16)
    _check_captured_step(margin, backend=backend, row_tolerance=row_tolerance)


@pytest.mark.parametrize("options", [{}, {"sample_rate": 0.5}])
@pytest.mark.parametrize("name", ["elasticface", "npt", "arcface", "curricularface", "magface"])
def test_captured_step_of_other_heads(name, options):
    """What is drawn follows from steps counted on the device: a replay draws as they say."""
    _check_captured_step(MARGINS[name](), **options)


def _check_captured_step(margin, **options):
    case = testing.make_case("random", batch=64, classes=1000, dim=128).to(torch.float32, "cuda")
    head = fm.MarginHead(128, 1000, margin, **options).cuda()
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
    state = {k: v.clone() for k, v in head.named_buffers()}

    def restore():
        for name, buffer in head.named_buffers():
            buffer.copy_(state[name])

    fresh = testing.make_case("random", batch=64, classes=1000, dim=128, seed=7)
    with torch.no_grad():
        x.copy_(fresh.x)
        labels.copy_(fresh.labels)
    restore()
    graph.replay()
    captured = loss.clone(), x.grad.clone(), head.weight.grad.clone()
    restore()
    eager = step(), x.grad, head.weight.grad
    for a, b in zip(captured, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("row_tolerance", [0.0, 1e-3])
@pytest.mark.parametrize("name", ["arcface", "adaface", "elasticface", "kappaface", "npt"])
def test_training_step_does_not_synchronise(name, row_tolerance):
    if name == "npt" and row_tolerance > 0:
        pytest.skip("has no probability to compare with")
    head = fm.MarginHead(64, 500, MARGINS[name](), row_tolerance=row_tolerance).cuda()
    x = torch.randn(32, 64, device="cuda", requires_grad=True)
    labels = torch.randint(0, 500, (32,), device="cuda")
    head(x, labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        head(x, labels).backward()
        _ = head.metrics
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streamed_logits_do_not_synchronise_and_are_captured():
    """The AdaFace repository's training step, its import changed."""
    from fastmargin.compat import adaface

    head = adaface.AdaFace(64, 500).cuda()
    x = torch.nn.functional.normalize(torch.randn(32, 64, device="cuda")).requires_grad_()
    norms = torch.rand(32, 1, device="cuda") * 20
    labels = torch.randint(0, 500, (32,), device="cuda")
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    def step():
        x.grad = head.kernel.grad = None
        logits = head(x, norms, labels)
        loss = criterion(logits, labels)
        loss.backward()
        return loss.detach(), logits.argmax(1), x.grad

    state = {name: value.clone() for name, value in head.state_dict().items()}
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    head.load_state_dict(state)
    graph.replay()
    found = [tensor.clone() for tensor in captured]
    head.load_state_dict(state)
    for a, b in zip(found, step(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def nccl(tmp_path):
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["arcface", "adaface", "kappaface", "npt"])
@pytest.mark.parametrize("options", [{}, {"sample_rate": 0.3}])
def test_shared_out_step_on_nccl(name, options, nccl):
    """One process that shares out classes with itself: the same numbers, no synchronisation."""
    heads = [
        fm.MarginHead(64, 507, MARGINS[name](), device="cuda", **options),
        fm.MarginHead(
            64, 507, MARGINS[name](), group=nccl, device="cuda", batch_size=40, **options
        ),
    ]
    heads[1].load_state_dict(heads[0].state_dict())
    x = torch.randn(32, 64, device="cuda")
    labels = torch.randint(-1, 507, (32,), device="cuda")
    found = []
    for head in heads:
        own = x.clone().requires_grad_()
        head(own, labels).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            head.weight.grad = own.grad = None
            loss = head(own, labels)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append((loss, own.grad, head.weight.grad))
    for plain, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_checkpoint_of_a_gpu(shared, nccl, tmp_path):
    """Written at once or later, it loads and trains on to the bit, and into a CPU."""

    def made(device="cuda"):
        torch.manual_seed(0)
        group = nccl if shared and device == "cuda" else None
        head = fm.MarginHead(64, 507, fm.AdaFace(), group=group, device=device)
        return {"head": head, "optimiser": torch.optim.AdamW(head.parameters())}

    def step(head, optimiser):
        generator = torch.Generator("cuda").manual_seed(1)
        x = torch.randn(32, 64, device="cuda", generator=generator)
        head(x, torch.arange(32, device="cuda")).backward()
        optimiser.step()
        optimiser.zero_grad()

    saved = made()
    step(**saved)
    fm.checkpoint.save(tmp_path / "now", saved)
    saving = fm.checkpoint.async_save(tmp_path / "later", saved)
    weight = saved["head"].weight.detach().clone()
    step(**saved)
    saving.result()
    for path in (tmp_path / "now", tmp_path / "later"):
        loaded = made()
        fm.checkpoint.load(path, loaded)
        assert loaded["head"].weight.equal(weight)
        step(**loaded)
        assert loaded["head"].weight.equal(saved["head"].weight)
        on_cpu = made("cpu")
        fm.checkpoint.load(path, on_cpu)
        assert on_cpu["head"].weight.equal(weight.cpu())


@pytest.mark.parametrize("rule", ["RowSGD", "RowAdamW"])
def test_sampled_step_over_rows_does_not_synchronise(rule):
    """Forward, backward and update of lazy rows; the CPU learns the same."""
    losses = []
    torch.manual_seed(0)
    x, labels = torch.randn(32, 64), torch.randint(0, 5000, (32,))
    state = fm.MarginHead(64, 5000, fm.ArcFace(), sample_rate=0.1).state_dict()
    for device in ("cpu", "cuda"):
        head = fm.MarginHead(
            64,
            5000,
            fm.ArcFace(),
            sample_rate=0.1,
            sparse_grad=True,
            device=device,
            precision="fp32",
        )
        head.load_state_dict(state)
        optimiser = getattr(fm.optim, rule)(head.parameters(), lr=0.01, weight_decay=1e-3)
        batch = x.to(device), labels.to(device)
        for step in range(4):
            mode = "error" if step > 1 and device == "cuda" else "default"
            torch.cuda.set_sync_debug_mode(mode)
            try:
                optimiser.zero_grad()
                loss = head(*batch)
                loss.backward()
                optimiser.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        losses.append((loss.cpu(), head.export_centers(normalized=False).cpu()))
    for own, expected in zip(losses[1], losses[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4)


def test_launches_of_a_training_step():
    """What tests/test_launches.py counts in the interpreter, as the GPU sees it."""
    torch.use_deterministic_algorithms(False)  # which fills every tensor, one launch each
    head = fm.MarginHead(64, 500, fm.AdaFace()).cuda()
    x = torch.randn(32, 64, device="cuda", requires_grad=True)
    labels = torch.randint(-1, 500, (32,), device="cuda")
    for _ in range(2):
        head.weight.grad = x.grad = None
        head(x, labels).backward()
    head.weight.grad = x.grad = None
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        head(x, labels).backward()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    names = [event.name for event in profile.events() if event.device_type == on_device]
    assert 0 < len(names) <= 8, names


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


@pytest.mark.parametrize("backend", ON_GPU)
def test_captured_draw_replays_with_the_next_step(backend):
    """The draws of the CPU, one step further with each replay; nothing waits for the device."""
    device_for(backend)
    labels = torch.randint(-1, 100_000, (256,))
    there = labels.cuda()
    draws, plain = ClassSampler(100_000, 5000, device="cuda"), ClassSampler(100_000, 5000)
    draws(there, backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        draws(there, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample = draws(there, backend)
    plain.load_state_dict(draws.state_dict())  # capturing has run nothing: step is 2
    for _ in range(3):
        there.copy_(labels)
        graph.replay()
        expected = plain(labels, "reference")
        for name in ("index", "column", "num_positives"):
            assert torch.equal(getattr(sample, name).cpu(), getattr(expected, name))
        labels = torch.randint(-1, 100_000, (256,))


@pytest.mark.parametrize("unsampled", ["lazy", "dense", "frozen"])
@pytest.mark.parametrize("kind", [fm.optim.RowSGD, fm.optim.RowAdamW])
def test_row_optimisers_do_not_wait(kind, unsampled, monkeypatch):
    """Nor do duplicates across chunks change a bit from run to run; the CPU gives the same."""
    monkeypatch.setattr("fastmargin.optim.row_chunks.CHUNK_BYTES", 100 * 32 * 4)
    options = {"weight_decay": 0.01} | ({"momentum": 0.9} if kind is fm.optim.RowSGD else {})
    start = torch.randn(5000, 32)
    grads = [(torch.randint(0, 600, (1, 700)), torch.randn(700, 32)) for _ in range(6)]
    used = torch.randint(-1, 5000, (300,))
    results = []
    for device in ("cuda", "cuda", "cpu"):
        weight = torch.nn.Parameter(start.to(device).clone())
        optimizer = kind([weight], lr=0.01, unsampled=unsampled, **options)
        on_device = [
            torch.sparse_coo_tensor(i.to(device), v.to(device), start.shape, check_invariants=False)
            for i, v in grads
        ]
        rows = used.to(device)
        weight.grad = on_device[0]
        optimizer.step()  # makes the state and the table
        torch.cuda.set_sync_debug_mode("error")
        try:
            for grad in on_device[1:]:
                weight.grad = grad
                deferred.settle(weight, rows)
                optimizer.step()
            optimizer.settle()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append(weight.detach().cpu())
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)


def test_captured_step_of_the_row_optimiser():
    """Of the one that has nothing on the host but its numbers; others say so."""
    start = torch.randn(500, 32, device="cuda")
    weights = [torch.nn.Parameter(start.clone()) for _ in "ab"]
    rule = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "unsampled": "frozen"}
    captured, eager = (fm.optim.RowSGD([weight], **rule) for weight in weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    captured.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
        with pytest.raises(RuntimeError, match="repeat this very step"):
            lazy = torch.nn.Parameter(start)
            lazy.grad = weights[0].grad
            fm.optim.RowSGD([lazy], lr=0.1).step()
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        eager.step()
    assert torch.equal(*weights)


def test_row_optimiser_beyond_31_bits():
    """C x D = 2.25e9 elements: the last rows are stepped and settled as the first are."""
    rows, dim = 4_400_000, 512
    weight = torch.nn.Parameter(torch.ones(rows, dim, device="cuda", dtype=torch.bfloat16))
    optimizer = fm.optim.RowSGD([weight], lr=0.5, momentum=0.5)
    ids = torch.tensor([0, 1, rows - 2, rows - 1], device="cuda")
    values = torch.ones(4, dim, device="cuda", dtype=torch.bfloat16)
    for part in (ids, ids[::3]):
        weight.grad = torch.sparse_coo_tensor(
            part[None], values[: len(part)], weight.shape, check_invariants=True
        )
        optimizer.step()
    deferred.settle(weight, ids[1:3])
    # 1 - 0.5 - 0.75 with a second gradient, 1 - 0.5 - 0.25 without
    expected = torch.tensor([-0.25, 0.25, 0.25, -0.25], device="cuda")
    assert torch.equal(weight.detach()[ids].float(), expected[:, None].expand(4, dim))
    optimizer.settle()
    assert torch.equal(weight.detach()[ids].float(), expected[:, None].expand(4, dim))
    assert bool((weight.detach()[2:-2] == 1).all())
