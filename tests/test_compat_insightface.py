"""insightface's classifiers: recorded values, the training loops, what is the same and what not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from pfc_cases import (
    LIMIT,
    Recorded,
    close,
    compare,
    compare_centres,
    everywhere,
    load_rows,
    merged,
    names,
    own_rows,
    place,
    read,
)
from processes import run_world
from torch import nn

import fastmargin as fm
from fastmargin.compat.insightface import (
    ArcFace,
    CombinedMarginLoss,
    CosFace,
    PartialFC,
    PartialFC_V2,
)
from fastmargin.compat.plain_pfc import PlainSampler

DTYPES = [torch.float64, torch.float32]
SHARDED = names("insightface_pfc_arc", "insightface_pfc_cos")
ODD = ("label_minus1", "zero_embedding", "guard_exact")
"""Cases in which the default is documented to differ."""


def combined(hyper) -> CombinedMarginLoss:
    filtered = hyper.get("interclass_filtering_threshold", 0)
    m = (hyper[name] for name in ("s", "m1", "m2", "m3"))
    return CombinedMarginLoss(*m, filtered, faithful=True)  # some records have m2 beside m3


def recorded_steps(group, name, faithful, dtype):
    file, meta, records = read(name)
    hyper, dim = meta["hyper"], file["weight"].shape[1]
    head = PartialFC_V2(
        combined(hyper), dim, meta["num_classes"], hyper["sample_rate"], faithful=faithful
    )
    head.to(dtype)
    load_rows(head.weight, file)
    found = []
    for record in records:
        if "class_index" in record:
            start, count = head.class_start, head.num_local
            head._placed().sampler = Recorded(record["class_index"], start, count)
        x = own_rows(record["embeddings"]).to(dtype).requires_grad_()
        loss = head(x, own_rows(record["labels"]))
        head.weight.grad = None
        loss.backward()
        assert place()[1] == 1 or head.last_batch_size == len(x)
        found.append(
            {"loss": loss.detach(), "d_x": x.grad, "d_weight": head.weight.grad, "state": {}}
        )
    return found


@pytest.mark.dist
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", SHARDED)
def test_recorded_values(name, faithful, dtype):
    if not faithful and any(tag in name for tag in ODD):
        pytest.skip("documented to differ: tested below")
    if dtype == torch.float32 and "guard_exact" in name:
        pytest.skip("whether a cosine of 1 is above 1 is decided by rounding")
    _, _, records = read(name)
    for found, record in zip(
        merged(everywhere(name, recorded_steps, faithful, dtype)), records, strict=True
    ):
        if not faithful and bool((record["loss_per_sample"] > LIMIT).any()):
            assert found["loss"] > record["loss"]
            found["loss"] = record["loss"]
        compare(found, record, dtype)


@pytest.mark.dist
@pytest.mark.parametrize("tag", ODD)
def test_what_differs_by_default(tag):
    """The row itself gets nothing or something finite here; the others are as recorded."""
    (name,) = (name for name in SHARDED if tag in name)
    _, _, (record,) = read(name)
    (found,) = merged(everywhere(name, recorded_steps, False, torch.float64))
    x, labels = record["embeddings"], record["labels"]
    odd = {
        "label_minus1": labels < 0,
        "zero_embedding": (x == 0).all(1),
        "guard_exact": torch.arange(len(x)) < 4,
    }[tag]
    assert odd.any() and found["d_x"].isfinite().all() and found["d_weight"].isfinite().all()
    if tag != "guard_exact":
        assert (found["d_x"][odd] == 0).all()
        assert record["grad_embeddings"][odd].norm() > 1e-3
    counted = (labels >= 0).double().mean()
    close(found["d_x"][~odd] * counted, record["grad_embeddings"][~odd], torch.float64)


MODULES = {
    "insightface_arcface": lambda hyper: ArcFace(hyper["s"], hyper["m"]),
    "insightface_cosface": lambda hyper: CosFace(hyper["s"], hyper["m"]),
    "insightface_combined_arc": combined,
    "insightface_combined_cos": combined,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names(*MODULES))
def test_margin_modules_on_dense_cosines(name, dtype):
    file, meta, (record,) = read(name)
    margin = MODULES[meta["family"]](meta["hyper"])
    x = record["embeddings"].to(dtype).requires_grad_()
    w = torch.from_numpy(file["weight"]).to(dtype).requires_grad_()
    cosine = F.linear(F.normalize(x), F.normalize(w)).clamp(-1, 1)
    before = cosine.detach().clone()
    labels = record["labels"]
    if "combined" in name and "filter" in name:
        logits = margin(cosine, labels[:, None])
    else:
        logits = margin(cosine, labels)
        assert not torch.equal(cosine, before)  # written into, as there
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    if dtype == torch.float32 and meta.get("guard"):
        return  # whether a cosine of 1 is above 1 is decided by rounding
    close(logits, record["logits"], dtype)
    close(loss, record["loss"], dtype)
    close(x.grad, record["grad_embeddings"], dtype)
    compare_centres(w.grad, record, dtype)


@pytest.mark.parametrize("threshold", [0, 0.2])
@pytest.mark.parametrize("m", [(1.0, 0.5, 0.0), (1.0, 0.0, 0.35)])
def test_margin_modules_leave_other_rows_alone(m, threshold):
    """A row with the label -1 has its class elsewhere: cosines, scaled, under the filter."""
    margin = CombinedMarginLoss(30.0, *m, threshold)
    cosine = torch.rand(5, 7, dtype=torch.float64) * 1.8 - 0.9
    labels = torch.tensor([3, -1, 0, -1, 6])
    logits = margin(cosine.clone(), labels)
    plain = torch.where(cosine > threshold, 0.0, cosine) if threshold else cosine
    torch.testing.assert_close(logits[labels < 0], 30 * plain[labels < 0])
    own = cosine[0, 3]
    moved = (own.acos() + 0.5).cos() if m[2] == 0 else own - 0.35
    torch.testing.assert_close(logits[0, 3], 30 * moved)
    torch.testing.assert_close(margin(cosine.clone(), labels[:, None]), logits)


LOSSES = {
    "arcface": lambda: ArcFace(20.0, 0.4),
    "cosface": lambda: CosFace(24.0, 0.2),
    "combined_arc": lambda: CombinedMarginLoss(30.0, 1.0, 0.3, 0.0),
    "combined_filter": lambda: CombinedMarginLoss(16.0, 1.0, 0.0, 0.3, 0.15),
}


def two_steps(group, loss, classes, rate, faithful):
    """Losses, gradients and centres of two steps on the batches that all processes share."""
    _, ranks = place()
    head = PartialFC_V2(LOSSES[loss](), 6, classes, rate, faithful=faithful).double()
    g = torch.Generator().manual_seed(3)
    whole = torch.randn(classes, 6, generator=g, dtype=torch.float64)
    start = head.class_start
    head.weight.data.copy_(whole[start : start + head.num_local])
    found = []
    for _ in range(2):
        if rate < 1:  # both ways draw the same
            index = torch.randperm(classes, generator=g)[: classes // 2]
            index = torch.cat([index, torch.arange(classes)[::3]]).unique()
            head._placed().sampler = Recorded(index, start, head.num_local)
        x = torch.randn(5 * ranks, 6, generator=g, dtype=torch.float64)
        labels = torch.randint(0, (classes + 2) // 3, (5 * ranks, 1), generator=g) * 3
        x, labels = own_rows(x).requires_grad_(), own_rows(labels)
        value = head(x, labels)
        value.backward()
        found.append((value.detach(), x.grad, head.weight.grad.clone()))
        head.weight.data.sub_(0.5 * head.weight.grad)
        head.weight.grad = None
    return found


@pytest.mark.dist
@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("classes", [11, 28])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_fused_equals_plain(loss, ranks, classes, rate):
    both = [
        [two_steps(None, loss, classes, rate, faithful)]
        if ranks == 1
        else run_world(ranks, two_steps, loss, classes, rate, faithful)
        for faithful in (False, True)
    ]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-11)


def test_a_margin_of_fastmargin():
    margin = fm.AdaFace(t_alpha=0.5)
    head = PartialFC_V2(margin, 8, 20)
    twin = fm.MarginHead(8, 20, fm.AdaFace(t_alpha=0.5))
    twin.weight.data.copy_(head.weight.data)
    x, labels = torch.randn(6, 8) * 20, torch.randint(0, 20, (6,))
    torch.testing.assert_close(head(x, labels), twin(x, labels))
    assert {"weight", "margin_softmax.batch_mean"} < head.state_dict().keys()
    torch.testing.assert_close(margin.batch_mean, twin.margin.batch_mean)


def test_an_original_margin_is_known_by_its_attributes():
    """The ArcFace before 2022 has ``m`` and an exact gradient, the later one ``margin``."""
    x, labels = torch.randn(6, 8, dtype=torch.float64), torch.randint(0, 20, (6,))
    gradients = []
    for attribute, grad in (("m", "exact"), ("margin", "straight_through")):
        original = type("ArcFace", (nn.Module,), {})()
        original.s = 20.0
        setattr(original, attribute, 0.4)
        head = PartialFC_V2(original, 8, 20).double()
        rows = x.clone().requires_grad_()
        head(rows, labels).backward()
        margin = fm.ArcFace(0.4, 20.0, guard="none", grad=grad)
        expected = x.clone().requires_grad_()
        fm.margin_loss(expected, head.weight, labels, margin).backward()
        torch.testing.assert_close(rows.grad, expected.grad)
        gradients.append(rows.grad)
    assert not torch.allclose(*gradients)


def test_state_dict_and_initial_values():
    torch.manual_seed(7)
    head = PartialFC_V2(ArcFace(), 16, 50, 0.2)
    torch.manual_seed(7)
    assert torch.equal(head.weight, torch.normal(0, 0.01, (50, 16)))
    assert list(head.state_dict()) == ["weight"]
    x, labels = torch.randn(4, 16), torch.randint(0, 50, (4,))
    head(x, labels).backward()
    assert list(head.state_dict()) == ["weight"] and list(dict(head.named_buffers())) == []
    other = PartialFC_V2(ArcFace(), 16, 50, 0.2)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.weight, head.weight)
    assert torch.equal(copy.deepcopy(head)(x, labels), head(x, labels))


def test_a_step_samples_and_eval_does_not():
    head = PartialFC_V2(CosFace(), 8, 60, 0.2)
    x, labels = torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 3])
    head(x, labels).backward()
    rows = head.weight.grad.abs().sum(1) > 0
    assert rows.sum() == int(0.2 * 60) and rows[:4].all()
    first = rows.clone()
    head.weight.grad = None
    head(x, labels).backward()
    assert not torch.equal(first, head.weight.grad.abs().sum(1) > 0)
    head.eval()
    full = fm.margin_loss(x, head.weight, labels, fm.CosFace())
    torch.testing.assert_close(head(x, labels), full)
    assert not torch.allclose(head(x.requires_grad_(), labels), full)  # a frozen classifier's step


def test_labels_are_left_as_they_are():
    labels = torch.randint(0, 20, (4, 1))
    before = labels.clone()
    for faithful in (False, True):
        PartialFC_V2(ArcFace(), 8, 20, 0.5, faithful=faithful)(torch.randn(4, 8), labels)
        assert torch.equal(labels, before) and labels.shape == (4, 1)


def test_sparse_gradients_step_as_dense_ones():
    torch.manual_seed(0)
    dense = PartialFC_V2(CosFace(), 8, 40, 0.3)
    sparse = PartialFC_V2(CosFace(), 8, 40, 0.3, sparse_grad=True)
    sparse.load_state_dict(dense.state_dict())
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    optimisers = [
        torch.optim.SGD(dense.parameters(), **settings),
        fm.optim.RowSGD(sparse.parameters(), **settings),
    ]
    for _ in range(4):
        x, labels = torch.randn(5, 8), torch.randint(0, 40, (5,))
        for head, optimiser in zip((dense, sparse), optimisers, strict=True):
            optimiser.zero_grad()
            head(x, labels).backward()
            optimiser.step()
    assert sparse.weight.grad.is_sparse
    torch.testing.assert_close(dense.state_dict(), sparse.state_dict())


def official_loop(group, faithful, fp16):
    """The loop of ``train_v2.py``, in small: DDP, one optimiser, scaler, clipping, schedule."""
    rank, _ = place()
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.PReLU(), nn.Linear(16, 8))
    backbone = nn.parallel.DistributedDataParallel(backbone)
    backbone.train()
    margin_loss = CombinedMarginLoss(16, 1.0, 0.5, 0.0, 0)  # 64 there; losses under the limit
    torch.manual_seed(1 + rank)
    module_partial_fc = PartialFC_V2(margin_loss, 8, 23, 1.0, False, faithful=faithful)
    module_partial_fc.train()
    opt = torch.optim.SGD(
        [{"params": backbone.parameters()}, {"params": module_partial_fc.parameters()}],
        lr=0.02,
        momentum=0.9,
        weight_decay=5e-4,
    )
    schedule = torch.optim.lr_scheduler.PolynomialLR(opt, 14)
    amp = torch.amp.GradScaler("cpu", growth_interval=2, enabled=fp16)
    losses = []
    for step in range(12):
        g = torch.Generator().manual_seed(rank + 10 * (step % 2))
        img = torch.randn(7, 10, generator=g)
        local_labels = torch.randint(0, 23, (7,), generator=g)
        local_embeddings = backbone(img)
        loss = module_partial_fc(local_embeddings, local_labels)
        if fp16:
            amp.scale(loss).backward()
            amp.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
            amp.step(opt)
            amp.update()
        else:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
            opt.step()
        opt.zero_grad()
        schedule.step()
        losses.append(loss.item())
    checkpoint = {
        "state_dict_backbone": backbone.module.state_dict(),
        "state_dict_softmax_fc": module_partial_fc.state_dict(),
    }
    assert checkpoint["state_dict_softmax_fc"]["weight"].shape == ((12, 11)[rank], 8)
    return losses, checkpoint


@pytest.mark.dist
@pytest.mark.parametrize("fp16", [False, True])
def test_the_training_loop(fp16):
    fused = run_world(2, official_loop, False, fp16)
    plain = run_world(2, official_loop, True, fp16)
    torch.testing.assert_close(fused, plain, rtol=2e-3, atol=2e-4)
    losses = fused[0][0]
    assert losses == fused[1][0] and losses[-1] < losses[1]
    for name, value in fused[0][1]["state_dict_backbone"].items():
        if "running" not in name:  # batch statistics are each process's own
            torch.testing.assert_close(value, fused[1][1]["state_dict_backbone"][name])


def uneven(group):
    """A short batch on one process, a longer one than at first on the other."""
    rank, _ = place()
    head = PartialFC_V2(CosFace(), 4, 9)
    head(torch.randn(6 - rank, 4), torch.randint(0, 9, (6 - rank,)))
    assert head.last_batch_size == 6
    loss = head(torch.randn(2 + 4 * rank, 4), torch.randint(0, 9, (2 + 4 * rank,)))
    with pytest.raises(ValueError, match="first step had at most 6"):
        head(torch.randn(7, 4), torch.randint(0, 9, (7,)))
    return loss.item()


@pytest.mark.dist
def test_uneven_batches():
    first, second = run_world(2, uneven)
    assert first == second


def other_groups(group):
    with pytest.raises(ValueError, match="rank=0 and world_size=1"):
        PartialFC(0, 0, 1, 4, False, ArcFace(), 10)


@pytest.mark.dist
def test_numbers_of_processes_are_checked():
    run_world(2, other_groups)
    with pytest.raises(ValueError, match="init_process_group first"):
        PartialFC(1, 1, 2, 4, False, ArcFace(), 10)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: CombinedMarginLoss(64, 1.35, 0.5, 0.0), ValueError, "stops with an error"),
        (lambda: CombinedMarginLoss(64, 1.0, 0.5, 0.2), ValueError, "would be ignored beside m3"),
        (lambda: PartialFC_V2(nn.Identity(), 8, 10), TypeError, "got Identity"),
        (lambda: PartialFC_V2(ArcFace(), 0, 10), ValueError, "embedding_size and num_classes"),
        (lambda: PartialFC_V2(ArcFace(), 8, 10, 0.0), ValueError, "sample_rate"),
        (lambda: PartialFC_V2(fm.ArcFace(), 8, 10, faithful=True), ValueError, "faithful=True"),
        (
            lambda: PartialFC_V2(ArcFace(), 8, 10, 0.5, faithful=True, sparse_grad=True),
            ValueError,
            "without sparse_grad",
        ),
        (lambda: PartialFC(0, 0, 1, 0, False, ArcFace(), 10), ValueError, "batch_size"),
        (lambda: PartialFC(0, 0, 1, 4, False, nn.Identity(), 10), TypeError, "got Identity"),
    ],
)
def test_misuse(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bad_input_changes_nothing():
    head = PartialFC_V2(ArcFace(), 8, 10, 0.5)
    x, labels = torch.randn(3, 8), torch.tensor([1, 2, 3])
    head(x, labels)
    step = head._placed().sampler.step.clone()
    for bad in [(x, labels + 9), (x[:, :5], labels), (x, labels[:2]), (x, None), (None, labels)]:
        with pytest.raises((TypeError, ValueError)):
            head(*bad)
    assert torch.equal(head._placed().sampler.step, step)


def test_backward_twice():
    """Fused it may run twice; the original's refuses, since it overwrites the softmax."""
    x, labels = torch.randn(4, 8, requires_grad=True), torch.arange(4)
    loss = PartialFC_V2(ArcFace(), 8, 10)(x, labels)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * first)
    loss = PartialFC_V2(ArcFace(), 8, 10, faithful=True)(x, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_plain_sampling():
    """All positives, at random others up to the number, or only positives if they are more."""
    sampler = PlainSampler(20, 6, 100)
    labels = torch.tensor([105, 101, 3, 105, -1, 119, 120])
    draws = [sampler.draw(labels) for _ in range(200)]
    for sample in draws:
        assert torch.equal(sample.index, sample.index.unique()) and len(sample.index) == 6
        assert {1, 5, 19} <= set(sample.index.tolist()) and sample.num_positives == 3
        here = torch.tensor([True, True, False, True, False, True, False])
        assert torch.equal(sample.column >= 0, here)
        assert torch.equal(sample.index[sample.column[here]] + 100, labels[here])
    seen = torch.cat([sample.index for sample in draws]).bincount(minlength=20)
    assert (seen > 0).all() and seen[[0, 2, 3, 4]].max() < 100
    sample = PlainSampler(20, 2, 100).draw(labels)
    assert sample.index.tolist() == [1, 5, 19]


def sampled_step(group):
    head = PartialFC_V2(CosFace(), 4, 23, 0.4)
    labels = torch.tensor([0, 22, 12, 11, 3])
    head(torch.randn(5, 4), labels).backward()
    drawn = head.weight.grad.abs().sum(1) > 0
    here = labels - head.class_start
    here = here[(here >= 0) & (here < head.num_local)]
    assert drawn.sum() == head.num_sample == int(0.4 * head.num_local) and drawn[here].all()
    return drawn


@pytest.mark.dist
def test_each_process_draws_its_own():
    first, second = run_world(2, sampled_step)
    assert (len(first), len(second)) == (12, 11)
    assert not torch.equal(first[:11], second)


def test_cosines_in_fp16():
    """The flag means something to the original's operations only."""
    x, labels = torch.randn(16, 8), torch.arange(16)
    torch.manual_seed(0)
    plain = PartialFC_V2(CosFace(), 8, 20, faithful=True)
    torch.manual_seed(0)
    half = PartialFC_V2(CosFace(), 8, 20, 1.0, True, faithful=True)
    losses = [plain(x, labels).item(), half(x, labels).item()]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=1e-2)
