"""Sampled classes, with classes here or shared out: the loss on those classes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from sharded_cases import (
    DIM,
    MARGINS,
    batch_of,
    head_of,
    own_classes,
    own_rows,
    steps,
)
from torch.distributed.device_mesh import DeviceMesh

import fastmargin as fm
from fastmargin.distributed.shard import bounds

pytestmark = pytest.mark.dist


# ---- sampled classes ----


def sampled_step(group, margin: str, classes: int, options: dict, rows=None):
    head = head_of(margin, classes, group, **options)
    rows = own_rows(group.size(), group.rank()) if rows is None else rows
    x, _, labels = batch_of(classes)
    x = x[rows].clone().requires_grad_()
    drawn = []
    draw = head.sampler.draw
    head.sampler.draw = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    loss = head(x, labels[rows])
    loss.backward()
    (sample,) = drawn
    index = sample.index[sample.index >= 0] + head.shard.start
    weights = torch.where(
        torch.arange(len(sample.index)) < sample.num_positives, 0.0, head.sampler.log_weight(sample)
    )[sample.index >= 0]
    return loss.detach(), x.grad, head.weight.grad, index, weights


@pytest.mark.parametrize("classes, n", [(507, 4), (5, 4), (70, 3), (70, 1)])
@pytest.mark.parametrize("margin", ["arcface", "adaface", "kappaface", "npt_3", "curricularface"])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_sampled_classes_are_the_loss_on_those_classes(margin, classes, n, sparse_grad):
    options = {"sample_rate": 0.3, "sparse_grad": sparse_grad}
    found = run(n, sampled_step, margin, classes, options)
    index = torch.cat([own[3] for own in found])
    assert len(index.unique()) == len(index)
    labels = batch_of(classes)[2]
    assert set(labels[labels >= 0].tolist()) <= set(index.tolist())
    if classes > 100:
        sizes = [stop - start for start, stop in (bounds(classes, n, r) for r in range(n))]
        positives = [
            len(set(labels[(labels >= 0)].tolist()) & set(range(*bounds(classes, n, r))))
            for r in range(n)
        ]
        want = sum(max(int(0.3 * s), p) for s, p in zip(sizes, positives, strict=True))
        assert len(index) == want

    loss, d_x, d_weight = plain_on_classes(margin, classes, index)
    close = {"rtol": 2e-6, "atol": 1e-9}
    for rank, own in enumerate(found):
        torch.testing.assert_close(own[0], loss, **close)
        torch.testing.assert_close(own[1], d_x[own_rows(n, rank)] * n, **close)
        assert own[2].is_sparse == sparse_grad
        grad = own[2].to_dense()
        torch.testing.assert_close(grad, d_weight[own_classes(classes, n, rank)], **close)


def plain_on_classes(margin: str, classes: int, index, log_weight=None):
    """Loss and gradients of the batch against the classes ``index``, dense, in float64."""
    x, weight, labels = batch_of(classes)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    margin = MARGINS[margin]().double()
    place = torch.full((classes + 1,), -1)
    place[index] = torch.arange(len(index))
    if log_weight is None:
        if isinstance(margin, fm.KappaFace):
            margin.bind(len(index), DIM)
            margin.class_weights.copy_(torch.linspace(0.2, 1, classes)[index])
        loss = fm.margin_loss(x, weight[index], place[labels], margin, backend="reference")
    else:
        cos = F.normalize(x) @ F.normalize(weight[index]).t()
        own = place[labels][:, None] == torch.arange(len(index))
        psi = margin((cos * own).sum(1), x.norm(dim=1), labels)
        logits = margin.s * torch.where(own, psi[:, None], cos)
        logits = logits + torch.where(own, 0.0, log_weight.double())
        rows = logits.logsumexp(1) - (logits * own).sum(1)
        loss = (rows * (labels >= 0)).sum() / (labels >= 0).sum()
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


@pytest.mark.parametrize("n", [1, 3])
def test_corrected_sampling_is_a_weighted_sum(n):
    options = {"sample_rate": 0.3, "correct_sampling": True}
    found = run(n, sampled_step, "cosface", 70, options)
    index, log_weight = (torch.cat([own[i] for own in found]) for i in (3, 4))
    loss, d_x, d_weight = plain_on_classes("cosface", 70, index, log_weight)
    assert float(log_weight.max()) > 0.5
    close = {"rtol": 1e-6, "atol": 1e-9}
    for rank, own in enumerate(found):
        torch.testing.assert_close(own[0], loss, **close)
        torch.testing.assert_close(own[1], d_x[own_rows(n, rank)] * n, **close)
        torch.testing.assert_close(own[2], d_weight[own_classes(70, n, rank)], **close)


def test_corrected_sampling_is_right_on_average():
    """The mean of the sum of exponentials over many draws is that over all classes."""
    torch.manual_seed(0)
    head = fm.MarginHead(4, 40, fm.CosFace(s=3), sample_rate=0.25, correct_sampling=True)
    plain = fm.MarginHead(4, 40, fm.CosFace(s=3))
    plain.load_state_dict(head.state_dict(), strict=False)
    x, labels = torch.randn(6, 4), torch.arange(6)

    def odds(head):  # sum over negatives / exp(target): exp(loss) - 1
        return head(x, labels, reduction="none").detach().double().exp() - 1

    draws = torch.stack([odds(head) for _ in range(2000)])
    deviation = draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - odds(plain)).abs() < 4 * deviation).all()
    head.correct_sampling = False
    assert (torch.stack([odds(head) for _ in range(50)]).mean(0) < 0.6 * odds(plain)).all()


def test_sample_rate_of_one_and_eval_are_the_full_softmax():
    x, _, labels = batch_of(70)
    heads = [head_of("arcface", 70), head_of("arcface", 70, sample_rate=0.1).eval()]
    heads.append(head_of("arcface", 70, num_sampled=70))
    losses = [head(x, labels) for head in heads]
    assert losses[0] == losses[1] and heads[0].sampler is None
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-12, atol=0)
    assert head_of("arcface", 70, num_sampled=7).sampler.num_sampled == 7


# ---- meshes ----


def mesh_steps(group, margin: str, options: dict):
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    head = head_of(margin, 71, mesh, **options)
    return steps(head, own_rows(4, dist.get_rank()))


def test_replicas_keep_the_same_statistics():
    first, *others = run(4, mesh_steps, "adaface_local", {})
    assert first["state"]["batch_mean"] != 20
    for own in others:
        torch.testing.assert_close(own["state"], first["state"], rtol=0, atol=0)


@pytest.mark.parametrize("margin", ["arcface", "adaface", "curricularface", "npt", "no_form"])
def test_classes_shared_out_in_a_node_and_repeated_over_nodes(margin):
    found = run(4, mesh_steps, margin, {})
    whole = steps(head_of(margin, 71), slice(None))
    for rank, own in enumerate(found):
        for step in range(2):
            torch.testing.assert_close(own["loss"][step], whole["loss"][step], rtol=2e-6, atol=0)
            expected = whole["d_x"][step][own_rows(4, rank)] * 4
            torch.testing.assert_close(own["d_x"][step], expected, rtol=2e-6, atol=1e-9)
        here = own_classes(71, 2, rank % 2)
        torch.testing.assert_close(own["weight"], whole["weight"][here], rtol=2e-6, atol=1e-9)
        for name, value in own["state"].items():
            torch.testing.assert_close(value, whole["state"][name], rtol=2e-6, atol=1e-6)


def mesh_sampled_step(group, margin: str, options: dict):
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    return sampled_step(mesh, margin, 71, options, own_rows(4, dist.get_rank()))


@pytest.mark.parametrize(
    "margin, corrected", [("arcface", False), ("arcface", True), ("npt_3", False)]
)
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_replicas_draw_the_same_classes(margin, corrected, sparse_grad):
    """The loss of all rows on the classes drawn, which are those of all rows of all replicas."""
    options = {"sample_rate": 0.4, "sparse_grad": sparse_grad, "correct_sampling": corrected}
    found = run(4, mesh_sampled_step, margin, options)
    for rank in (0, 1):
        assert torch.equal(found[rank][3], found[rank + 2][3])
    index, log_weight = (torch.cat([own[i] for own in found[:2]]) for i in (3, 4))
    loss, d_x, d_weight = plain_on_classes(margin, 71, index, log_weight if corrected else None)
    close = {"rtol": 2e-6, "atol": 1e-9}
    for rank, own in enumerate(found):
        torch.testing.assert_close(own[0], loss, **close)
        torch.testing.assert_close(own[1], d_x[own_rows(4, rank)] * 4, **close)
        grad = own[2].to_dense()
        torch.testing.assert_close(grad, d_weight[own_classes(71, 2, rank % 2)], **close)


# ---- optimisers over rows ----


def trained(group, margin: str, options: dict, optimiser: str, unsampled: str = ""):
    """A head that learned from 12 batches with a schedule and two micro-batches a step."""
    head = head_of(margin, 71, group, seed=3, **options)
    rows = slice(None) if group is None else own_rows(group.size(), group.rank())
    rule = getattr(fm.optim, optimiser, None) or getattr(torch.optim, optimiser)
    settings = {"lr": 0.3, "momentum": 0.9} if "SGD" in optimiser else {"lr": 0.02, "eps": 1e-30}
    settings |= {"unsampled": unsampled} if unsampled else {}
    optimiser = rule(head.parameters(), weight_decay=0.02, **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 12)
    for step in range(12):
        for part in range(2):
            x, _, labels = batch_of(71, 2 * step + part)
            head(x[rows], labels[rows]).backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return head.state_dict(keep_vars=False)["weight"], head.export_centers(normalized=False)


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("margin", ["arcface", "arcface, corrected", "npt"])
@pytest.mark.parametrize("unsampled", ["lazy", "dense"])
def test_rows_learn_as_from_a_dense_gradient(n, kind, margin, unsampled):
    """Sampled classes, sparse gradients and lazy rows: torch's optimiser on the same draws."""
    margin, _, corrected = margin.partition(", ")
    options = {"sample_rate": 0.2, "correct_sampling": bool(corrected)}

    def learned(*args):
        return [trained(None, margin, *args)] if n == 0 else run(n, trained, margin, *args)

    dense = learned(options, kind)
    rows = learned(options | {"sparse_grad": True}, f"Row{kind}", unsampled)
    for own, expected in zip(rows, dense, strict=True):
        close = {"rtol": 1e-6, "atol": 1e-9}  # each row's last change may be tiny
        torch.testing.assert_close(own[1], expected[1], **close)
        saved = own[0].to_local() if n else own[0]
        assert torch.equal(saved, own[1])
    whole = torch.cat([own[1] for own in rows])
    assert not torch.isclose(whole, batch_of(71)[1]).all(1).any()


# ---- one process: what a head keeps right around its rows ----


def test_rows_that_are_owed_are_settled_wherever_they_are_used():
    head = head_of("arcface", 70, sample_rate=0.2, sparse_grad=True)
    optimiser = fm.optim.RowSGD(head.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    x, _, labels = batch_of(70)
    for _ in range(4):
        head(x, labels).backward()
        optimiser.step()
        optimiser.zero_grad()
    stale = head.weight.detach().clone()
    loss = fm.margin_loss(x, head.weight, labels, fm.ArcFace())
    assert not torch.equal(head.weight, stale)
    assert loss == fm.margin_loss(x, head.weight.detach().clone(), labels, fm.ArcFace())


@pytest.mark.parametrize("labels", [torch.full((6,), -1), torch.arange(100, 106) % 70 + 1])
def test_frozen_rows_stay_when_a_corrected_part_is_empty(labels):
    head = head_of("arcface", 70, num_sampled=5, correct_sampling=True, sparse_grad=True)
    optimiser = fm.optim.RowSGD(head.parameters(), lr=0.5, weight_decay=0.1, unsampled="frozen")
    drawn, draw = [], head.sampler.draw
    head.sampler.draw = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    before = head.weight.detach().clone()
    head(batch_of(70)[0][:6], labels).backward()
    optimiser.step()
    moved = set((head.weight != before).any(1).nonzero().flatten().tolist())
    assert moved <= set(drawn[0].index.tolist()) and moved


def test_draws_go_on_with_other_classes():
    head = head_of("arcface", 70, sample_rate=0.2, seed=3)
    x, _, labels = batch_of(70)
    for _ in range(4):
        head(x, labels)
    head.extend_classes(5)
    assert head.sampler.step == 4 and head.sampler.seed == 3 and head.sampler.num_classes == 75
    plain = fm.MarginHead(DIM, 75, fm.ArcFace()).double()
    plain.load_state_dict(head.state_dict())  # sampling is a setting
    head.load_state_dict(plain.state_dict())
    assert head.sampler.step == 4


def test_a_change_of_classes_that_fails_changes_nothing():
    head = head_of("arcface", 70, sample_rate=0.2)
    before = {name: value.clone() for name, value in head.state_dict().items()}

    def fails(change):
        raise MemoryError("no")

    head.margin.change_classes = fails
    with pytest.raises(MemoryError):
        head.extend_classes(5)
    assert head.num_classes == 70 and len(head.weight) == 70
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    x, _, labels = batch_of(70)
    with pytest.raises(fm.backends.BackendError):
        head.precision = "fp16"
        head(x, labels)
    assert head.sampler.step == 0
