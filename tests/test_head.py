"""The module: inference, metrics, state, training, and what it says to bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import BACKENDS, MARGINS, ON_GPU, device_for, margin_for

import fastmargin as fm
from fastmargin import testing
from fastmargin.backends import BackendError
from fastmargin.margins import NearestMargin


def head_and_batch(name="arcface", batch=8, classes=11, dim=6, **kwargs):
    head = fm.MarginHead(dim, classes, margin_for(name, classes), **kwargs)
    case = testing.make_case("some_ignored", batch, classes, dim).to(torch.float32)
    with torch.no_grad():
        head.weight.copy_(case.weight)
    return head, case.x, case.labels


@pytest.mark.parametrize("name", MARGINS)
def test_head_is_the_plain_loss(name):
    head, x, labels = head_and_batch(name)
    testing.shape_table(head.margin, *head.weight.shape)
    plain = testing.plain_loss(x, head.weight, labels, head.margin.eval())
    torch.testing.assert_close(head(x, labels), plain, rtol=1e-4, atol=1e-5)


def test_centres_start_as_insightface_does():
    weight = fm.MarginHead(64, 3000, fm.ArcFace()).weight
    assert weight.shape == (3000, 64) and weight.dtype == torch.float32
    assert abs(float(weight.std()) - 0.01) < 2e-4 and abs(float(weight.mean())) < 2e-4


def test_centres_of_other_types_start_as_those_of_float32():
    heads = {}
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        torch.manual_seed(3)
        heads[dtype] = fm.MarginHead(8, 1100, fm.AdaFace(), dtype=dtype)
    for dtype, head in heads.items():
        assert torch.equal(head.weight, heads[torch.float32].weight.to(dtype))
        assert head.margin.batch_mean.dtype == torch.float32
        x = torch.randn(4, 8, dtype=dtype)
        loss = head(x, torch.tensor([0, 5, 1099, -1]))
        loss.backward()
        assert loss.isfinite() and head.weight.grad.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference(backend):
    device = device_for(backend)
    head, x, _ = head_and_batch(backend=backend, precision="fp32")
    head, x = head.to(device), x.to(device)
    cos = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(head.weight).t()
    torch.testing.assert_close(head.logits(x), (64 * cos).detach(), rtol=1e-4, atol=1e-4)
    best = cos.topk(3)
    prediction = head.predict(x, topk=3)
    assert torch.equal(prediction.label, best.indices)
    torch.testing.assert_close(prediction.cosine, best.values.detach(), rtol=1e-4, atol=1e-5)
    assert head.predict(x).label.shape == (len(x), 1)
    everything = head.predict(x, topk=11).label
    assert torch.equal(everything.sort(1).values[0].cpu(), torch.arange(11))


def test_many_predictions_are_streamed(monkeypatch):
    """More than the kernels keep: chunks of classes merge to what the logits say."""
    monkeypatch.setattr("fastmargin.head.PREDICT_CHUNK", 13)
    head, x, _ = head_and_batch(classes=40)
    best = head.logits(x).topk(30)
    prediction = head.predict(x, topk=30)
    assert torch.equal(prediction.label, best.indices)
    torch.testing.assert_close(prediction.cosine * 64, best.values)


def test_export_centers():
    head, _, _ = head_and_batch()
    unit = head.export_centers()
    torch.testing.assert_close(unit, torch.nn.functional.normalize(head.weight).detach())
    raw = head.export_centers(normalized=False)
    assert torch.equal(raw, head.weight) and raw.data_ptr() != head.weight.data_ptr()


def test_inference_of_16_bit_centres():
    """Norms that 16 bits do not hold, and their inverses, are taken in float32."""
    torch.manual_seed(0)
    head = fm.MarginHead(2, 400, fm.CosFace(), dtype=torch.float16)
    with torch.no_grad():
        head.weight[:10] *= 1e-3
    x = torch.randn(5, 2) * 1e5
    unit = torch.nn.functional.normalize(head.weight.detach().float())
    expected = 64 * torch.nn.functional.normalize(x) @ unit.t()
    logits = head.logits(x)
    assert logits.dtype == torch.float32 and logits.is_contiguous()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(head.export_centers(), unit.half())
    torch.testing.assert_close(head.predict(x).cosine * 64, logits.amax(1, keepdim=True))


OPTIMISERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RowSGD": lambda p: fm.optim.RowSGD(p, lr=0.1),
    "fused": lambda p: fm.optim.RowSGD(p, lr=0.1, fused=True),
    "RowAdamW": lambda p: fm.optim.RowAdamW(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_of_centres_that_were_replaced(name):
    head, x, labels = head_and_batch()
    other, _, _ = head_and_batch()
    optimiser, unconcerned = (
        OPTIMISERS[name](head.parameters()),
        OPTIMISERS[name](other.parameters()),
    )
    head.extend_classes(2)
    head(x, labels).backward()
    with pytest.raises(RuntimeError, match="make it anew"):
        optimiser.step()
    other(x, labels).backward()
    unconcerned.step()
    frozen, _, _ = head_and_batch()
    frozen.freeze()
    held = OPTIMISERS[name]([*frozen.parameters(), torch.nn.Parameter(torch.ones(3, 6))])
    frozen.extend_classes(1)
    held.step()  # it would not have moved them
    before = head.weight.detach().clone()
    optimiser.param_groups[0]["params"] = [head.weight]
    optimiser.zero_grad()
    head(x, labels).backward()
    optimiser.step()
    assert not torch.equal(before, head.weight)


@pytest.mark.parametrize("name", ["arcface", "kappaface", "elasticface", "npt", "no_form"])
def test_another_margin(name):
    head, x, labels = head_and_batch("adaface")
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    head(x, labels).backward()
    optimiser.step()
    fresh = fm.MarginHead(head.embedding_size, head.num_classes, margin_for(name, 11))
    fresh.weight.data.copy_(head.weight)
    head.change_margin(margin_for(name, 11))
    assert head(x, labels) == fresh(x, labels)
    optimiser.zero_grad()
    head(x, labels).backward()
    optimiser.step()
    head.eval()
    head.change_margin(MARGINS["elasticface"]())
    assert not head.margin.training


def test_a_margin_that_a_head_cannot_have():
    head, x, labels = head_and_batch(num_sampled=5, correct_sampling=True)
    before, step = head.margin, head.sampler.step.clone()
    with pytest.raises(ValueError, match="correct_sampling"):
        head.change_margin(fm.NPT())
    with pytest.raises(TypeError, match="margin must be"):
        head.change_margin("arcface")
    counts = fm.KappaFace(class_counts=[1, 2])
    with pytest.raises(ValueError, match="class_counts has shape"):
        head.change_margin(counts)
    assert head.margin is before
    head(x, labels)
    head.change_margin(fm.ArcFace(m=0.2))
    assert head.sampler.step == step + 1  # the draws go on


def test_metrics_of_one_class():
    """No negative: the hardest one is left out of the mean instead of being -inf."""
    head, x, labels = head_and_batch(classes=1)
    head(x, labels)
    assert head.metrics["hardest_negative_cosine"] == 0 and head.metrics["top1"] == 1


def test_predictions_are_the_same_under_autocast():
    head, x, _ = head_and_batch(classes=40)
    plain = head.logits(x), *head.predict(x, 3), *head.predict(x, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = head.logits(x), *head.predict(x, 3), *head.predict(x, 20)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_margin_state_stays_in_float32(dtype):
    """In 16 bits a running mean stops moving."""
    head, _, _ = head_and_batch("adaface")
    head.to(dtype)
    assert head.weight.dtype == dtype
    assert all(state.dtype == torch.float32 for state in head.margin.buffers())


@pytest.mark.parametrize("name", ["arcface", "adaface", "npt_3"])
def test_metrics(name):
    head, x, labels = head_and_batch(name)
    with pytest.raises(RuntimeError, match="before the first forward"):
        _ = head.metrics
    head(x, labels)
    valid = labels >= 0
    cos = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(head.weight).t()
    cos, own, norm = cos[valid], labels[valid][:, None], x[valid].norm(dim=1)
    cos_y = cos.gather(1, own)[:, 0]
    expected = {
        "top1": (cos.argmax(1) == own[:, 0]).float().mean(),
        "target_cosine": cos_y.mean(),
        "hardest_negative_cosine": cos.scatter(1, own, -2).amax(1).mean(),
        "margin": torch.zeros(()),
        "norm_mean": norm.mean(),
        "norm_std": norm.std(),
    }
    if not isinstance(head.margin, NearestMargin):
        expected["margin"] = (cos_y - head.margin(cos_y, norm, own[:, 0])).mean()
    assert head.metrics.keys() == expected.keys()
    for key, value in head.metrics.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, expected[key].detach(), rtol=1e-4, atol=1e-5)


def test_metrics_without_a_valid_row():
    head, x, labels = head_and_batch()
    loss = head(x.requires_grad_(), labels * 0 - 1)
    loss.backward()
    assert loss == 0 and x.grad.abs().max() == 0 and head.weight.grad.abs().max() == 0
    assert all(torch.isfinite(v) for v in head.metrics.values())


def test_training_reduces_the_loss_and_any_optimiser_works():
    torch.manual_seed(0)
    centers = torch.nn.functional.normalize(torch.randn(10, 8))
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
        lambda p: torch.optim.AdamW(p, lr=0.05),
    ):
        backbone = torch.nn.Linear(8, 8)
        head = fm.MarginHead(8, 10, fm.AdaFace(s=16))
        optimiser = make([*backbone.parameters(), *head.parameters()])
        losses = []
        for _ in range(60):
            labels = torch.randint(0, 10, (32,))
            x = backbone(centers[labels] + 0.1 * torch.randn(32, 8)) * 10
            loss = head(x, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss))
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
        assert head.metrics["top1"] > 0.9


def test_two_heads_accumulation_and_deepcopy():
    head, x, labels = head_and_batch()
    other = copy.deepcopy(head)
    (head(x, labels) + other(x, labels)).backward()
    once = head.weight.grad.clone()
    torch.testing.assert_close(other.weight.grad, once)
    head(x, labels).backward()
    torch.testing.assert_close(head.weight.grad, 2 * once)


# ---- bad input: a clear error, and nothing has changed ------------------------------------------

BAD = {
    "label too large": (lambda x, y: (x, y + 11), {}, ValueError, r"labels must be in \[-1, 11\)"),
    "label below -1": (lambda x, y: (x, y * 0 - 2), {}, ValueError, "found -2"),
    "torch's ignore_index": (lambda x, y: (x, y * 0 - 100), {}, ValueError, "to ignore with -1"),
    "list": (lambda x, y: (x, y.tolist()), {}, TypeError, "labels must be a tensor"),
    "float labels": (lambda x, y: (x, y.float()), {}, TypeError, r"labels\.long\(\)"),
    "too few labels": (lambda x, y: (x, y[:-1]), {}, ValueError, "labels must have shape"),
    "empty batch": (lambda x, y: (x[:0], y[:0]), {}, ValueError, "empty batch"),
    "no size": (lambda x, y: (x[:, :0], y), {}, ValueError, "embeddings have size 0"),
    "wrong size": (lambda x, y: (x[:, :-1], y), {}, ValueError, "embeddings have size 5"),
    "one dimension": (lambda x, y: (x[0], y[:1]), {}, ValueError, "must have 2 dimensions"),
    "integers": (lambda x, y: (x.long(), y), {}, TypeError, "embeddings must be a float tensor"),
    "float64": (lambda x, y: (x.double(), y), {}, TypeError, "float64 requires both"),
    "nan": (lambda x, y: (x / 0 * 0, y), {"validate": True}, ValueError, "first in row 0"),
    "precision": (lambda x, y: (x, y), {"precision": "fp8"}, ValueError, "precision must be"),
    "precision of backend": (
        lambda x, y: (x, y),
        {"precision": "bf16", "backend": "reference"},
        BackendError,
        "no precision 'bf16'",
    ),
    "unknown backend": (lambda x, y: (x, y), {"backend": "cudnn"}, ValueError, "backend must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    spoil, kwargs, error, message = BAD[case]
    head, x, labels = head_and_batch("adaface", **kwargs)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(error, match=message):
        head(*spoil(x, labels))
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert head._rows is None


@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
def test_cpu_tensor_on_a_gpu_backend(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    head, x, labels = head_and_batch(backend=backend)
    with pytest.raises(BackendError, match=f"backend='{backend}' cannot run: "):
        head(x, labels)


def test_bad_construction():
    for args, kwargs, error in (
        ((0, 5, fm.ArcFace()), {}, ValueError),
        ((5, 0, fm.ArcFace()), {}, ValueError),
        ((5, 5, "arcface"), {}, TypeError),
        ((5, 5, fm.ArcFace()), {"sample_rate": 0.0}, ValueError),
        ((5, 5, fm.ArcFace()), {"sample_rate": 1.1}, ValueError),
        ((5, 5, fm.ArcFace()), {"num_sampled": 0}, ValueError),
        ((5, 5, fm.ArcFace()), {"num_sampled": 3, "sample_rate": 0.5}, ValueError),
        ((5, 5, fm.NPT()), {"num_sampled": 3, "correct_sampling": True}, ValueError),
        ((5, 5, fm.ArcFace()), {"grad_reduce": "avg"}, ValueError),
        ((5, 5, fm.ArcFace()), {"batch_size": 0}, ValueError),
        ((5, 5, fm.ArcFace()), {"group": object()}, TypeError),
        ((5, 5, fm.ArcFace()), {"dtype": torch.int32}, TypeError),
    ):
        with pytest.raises(error):
            fm.MarginHead(*args, **kwargs)
    head, x, labels = head_and_batch()
    for call in (
        lambda: head(x, labels, reduction="avg"),
        lambda: head.predict(x, topk=0),
        lambda: head.predict(x, topk=12),
        lambda: head.logits(x[:, :3]),
        lambda: fm.margin_loss(x, head.weight, labels, fm.ArcFace(), reduction="avg"),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("name", ["arcface", "kappaface", "no_form", "npt"])
def test_unchecked_label_is_loud(name):
    """Where checking would synchronise, a label out of range makes its row NaN."""
    head, x, labels = head_and_batch(name, validate=False)
    labels[3] = 11
    rows = head(x, labels, reduction="none")
    assert torch.isnan(rows[3]) and torch.isfinite(rows).sum() == len(rows) - 1
