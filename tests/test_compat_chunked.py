"""Scores in chunks of classes: every question that logits are asked, against all (B, C) of them."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fastmargin.compat import chunked
from fastmargin.compat.chunked import ChunkedScores, over_chunks
from fastmargin.compat.logits import stream
from fastmargin.margins.guards import add_angle
from fastmargin.testing import make_case, relative_error

B, C, D = 10, 29, 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 9)


def psi(cos_y):
    return add_angle(cos_y, torch.full_like(cos_y, 0.4), "mmm", "exact")


def parts(centres=2, dtype=torch.float64, classes=C):
    g = torch.Generator().manual_seed(centres)
    x = F.normalize(torch.randn(B, D, generator=g)).to(dtype).requires_grad_()
    weight = torch.randn(classes, centres, D, generator=g).to(dtype).requires_grad_()
    scale = (3 + torch.rand(B, generator=g)).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (B,), generator=g)
    labels[0] = classes - 1  # in the last chunk, which is not full
    return x, weight, scale, labels


def dense(x, weight, scale, labels=None, k=0, angle=0.0):
    """All logits, written out."""
    cosine = (x @ F.normalize(weight, dim=2).flatten(0, 1).t()).unflatten(1, weight.shape[:2])
    cosine = found = cosine.max(2).values
    if k:
        masked = cosine if labels is None else cosine.scatter(1, labels[:, None], -2.0)
        index = masked.topk(k, dim=1).indices
        found = cosine.scatter(1, index, (cosine.gather(1, index).acos() - angle).cos())
    if labels is not None:
        own = labels[:, None]
        found = found.scatter(1, own, psi(cosine.gather(1, own)))
    return scale[:, None] * found


def streamed(x, weight, scale, labels=None, k=0, angle=0.0):
    scores = ChunkedScores.of(x, weight, scale, labels, psi)
    return stream(scores.with_nearer(k, angle) if k else scores)


def compare(question, inputs, *args, tolerance=1e-11):
    """A question's answer and gradients, from streamed and from dense logits."""
    found = []
    for logits in (streamed, dense):
        leaves = [each.detach().requires_grad_() for each in inputs]
        answer = question(logits(*leaves, *args))
        share = torch.linspace(1, 2, answer.numel(), dtype=answer.dtype).reshape(answer.shape)
        found.append((answer, *torch.autograd.grad((answer * share).sum(), leaves)))
    for mine, truth in zip(*found, strict=True):
        assert relative_error(mine, truth) < tolerance


OPTIONS = list(itertools.product((False, True), (0.0, 0.2), ("mean", "none"), (-100, 3)))


@pytest.mark.parametrize(("weighted", "smoothing", "reduction", "ignored"), OPTIONS)
@pytest.mark.parametrize(
    ("target_is", "k"),
    [("labels", 0), ("labels", 4), ("another", 0), ("another", 4), ("no margin", 0)],
)
def test_cross_entropy(weighted, smoothing, reduction, ignored, target_is, k):
    *inputs, labels = parts()
    labels[1] = 3
    target = labels if target_is == "labels" else (labels + torch.arange(B) % 3) % C
    if target_is == "another" and k:
        # a class that the penalty is on
        target[2] = dense(*inputs).detach()[2].scatter(0, labels[2], -9.0).argmax()
    options = {"label_smoothing": smoothing, "reduction": reduction, "ignore_index": ignored}
    if weighted:
        options["weight"] = torch.rand(C, dtype=torch.float64)
    margin = () if target_is == "no margin" else (labels, k, 0.2)
    compare(lambda logits: F.cross_entropy(logits, target, **options), inputs, *margin)


@pytest.mark.parametrize("k", [0, 4])
@pytest.mark.parametrize("centres", [1, 3])
def test_other_questions(k, centres):
    *inputs, labels = parts(centres)
    margin = (labels, k, 0.2)
    compare(lambda logits: logits.topk(7).values, inputs, *margin)
    compare(lambda logits: logits.max(1).values, inputs, *margin)
    compare(lambda logits: getattr(logits, "dense", lambda: logits)(), inputs, *margin)
    logits, truth = streamed(*inputs, *margin), dense(*inputs, *margin)
    assert logits.shape == truth.shape and logits.requires_grad
    assert torch.equal(logits.argmax(1), truth.argmax(1))
    assert torch.equal(logits.topk(7).indices, truth.topk(7).indices)
    alone = logits.detach()
    assert not alone.requires_grad and not alone.topk(2).values.requires_grad
    assert copy.deepcopy(logits.scores).x is logits.scores.x


def test_only_what_wants_a_gradient_gets_one():
    x, weight, scale, labels = parts()
    for wanted in ((0,), (1,), (2,), (0, 2)):
        inputs = enumerate((x, weight, scale))
        leaves = [each.detach().requires_grad_(number in wanted) for number, each in inputs]
        F.cross_entropy(streamed(*leaves, labels), labels).backward()
        whole = [each.detach().requires_grad_() for each in (x, weight, scale)]
        F.cross_entropy(dense(*whole, labels), labels).backward()
        for leaf, full in zip(leaves, whole, strict=True):
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.requires_grad:
                assert relative_error(leaf.grad, full.grad) < 1e-11


@pytest.mark.parametrize("regime", ["confident", "aligned", "antipodal", "one_row", "one_class"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_regimes(regime, dtype):
    """Finite, and with the digits of 1 - p_y that (B, C) logits lose."""
    case = make_case(regime, batch=B, classes=C, dim=D)

    def loss(x, weight, run):
        x = F.normalize(x)
        if not run:
            own = case.labels[:, None]
            cosine = x @ F.normalize(weight).t()
            negatives = (200 * cosine).scatter(1, own, -math.inf).logsumexp(1)
            return -F.logsigmoid(200 * psi(cosine.gather(1, own).squeeze(1)) - negatives)
        scores = ChunkedScores.of(x, weight[:, None], 200.0, case.labels, psi)
        return F.cross_entropy(stream(scores), case.labels, reduction="none")

    found = []
    for run, kind in ((True, dtype), (False, torch.float64)):
        leaves = [each.to(kind).requires_grad_() for each in (case.x, case.weight)]
        value = loss(*leaves, run)
        value.sum().backward()
        found.append((value, *(leaf.grad for leaf in leaves)))
    for mine, truth in zip(*found, strict=True):
        assert torch.isfinite(mine).all()
        # a slope of 1 / sin(theta) multiplies the rounding of the cosine
        near = regime in ("aligned", "antipodal")
        bound = {torch.float64: 1e-9, torch.float32: 3e-4}[dtype] * (100 if near else 1)
        if regime == "aligned" and mine is not found[0][0]:
            continue  # the true gradient is 0: only rounding is left
        assert relative_error(mine, truth) < bound


def test_ignored_rows_may_be_nan():
    x, weight, scale, labels = parts()
    with torch.no_grad():
        x[2], scale[2], labels[2] = math.nan, math.nan, 5
    target = labels.clone()
    target[2] = -100
    F.cross_entropy(streamed(x, weight, scale, labels), target).backward()
    for each in (x, weight, scale):
        assert torch.isfinite(each.grad).all()
    assert not x.grad[2].any()


def test_weight_in_16_bits_and_autocast():
    x, weight, scale, labels = parts(dtype=torch.float32)
    half = weight.detach().bfloat16().requires_grad_()
    truth = F.cross_entropy(dense(x, half.detach().float(), scale, labels), labels)
    value = F.cross_entropy(streamed(x, half, scale, labels), labels)
    assert relative_error(value, truth) < 1e-5
    value.backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.any()
    seen = []

    def function(cosines, first):
        seen.append(cosines)
        return (cosines.sum(1),)

    with torch.autocast("cpu", torch.bfloat16):
        total = sum(part for (part,) in over_chunks(function, x, weight))
    before = len(seen)
    total.sum().backward()
    again = seen[before:]
    assert len(again) == before > 1
    assert all(torch.equal(a, b) for a, b in zip(seen, again, strict=False))
    assert seen[0].dtype == torch.float32
    exact = dense(x, weight, torch.ones_like(scale))[:, : seen[0].shape[1]]
    assert 1e-4 < relative_error(seen[0], exact) < 2e-2  # 16-bit products, and the same twice


def test_a_chunk_is_all_that_exists():
    largest = []

    def function(cosines, first):
        largest.append((first, cosines.shape[1]))
        return (cosines.exp().sum(1),)

    x, weight, _, _ = parts(centres=2)
    sum(part for (part,) in over_chunks(function, x, weight)).sum().backward()
    assert max(count for _, count in largest) == 4
    assert [first for first, _ in largest[:3]] == [0, 4, 8] and largest[7] == (28, 1)


def test_weight_written_before_backward():
    x, weight, scale, labels = parts()
    loss = F.cross_entropy(streamed(x, weight, scale, labels), labels)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_labels_may_change_afterwards():
    x, weight, scale, labels = parts()
    logits = streamed(x, weight, scale, labels)
    truth = dense(x, weight, scale, labels.clone())
    labels.zero_()
    assert relative_error(logits.dense(), truth) < 1e-12


def test_second_order_gradient_is_refused():
    x, weight, scale, labels = parts()
    loss = F.cross_entropy(streamed(x, weight, scale, labels), labels)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (loss + grad.square().sum()).backward()
