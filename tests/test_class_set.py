"""Inference, other sets of classes, and states of heads that share out their classes."""

from __future__ import annotations

import pytest
import torch
from processes import run
from safetensors.torch import load_file
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
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fastmargin as fm

pytestmark = pytest.mark.dist


# ---- inference, and another set of classes ----


def inference(group, classes: int):
    head = head_of("arcface", classes, group)
    x = batch_of(classes)[0][own_rows(group.size(), group.rank())]
    many = min(20, classes)
    return head.logits(x), head.predict(x, 3), head.predict(x, many), head.export_centers()


@pytest.mark.parametrize("classes, n", [(70, 3), (5, 4)])
def test_inference(classes, n):
    head, x = head_of("arcface", classes), batch_of(classes)[0]
    few, many = head.predict(x, 3), head.predict(x, min(20, classes))
    for rank, own in enumerate(run(n, inference, classes)):
        rows = own_rows(n, rank)
        torch.testing.assert_close(own[0], head.logits(x)[rows])
        for found, whole in ((own[1], few), (own[2], many)):
            torch.testing.assert_close(found.cosine, whole.cosine[rows])
            assert torch.equal(found.label, whole.label[rows])
        torch.testing.assert_close(own[3], head.export_centers()[own_classes(classes, n, rank)])


def fresh_centres(group):
    head = fm.MarginHead(DIM, 2500, fm.ArcFace(), group=group)
    return head.weight.detach()


def test_centres_do_not_depend_on_the_number_of_processes():
    torch.manual_seed(0)
    whole = fm.MarginHead(DIM, 2500, fm.ArcFace()).weight.detach()
    for n in (1, 3):
        assert torch.equal(torch.cat(run(n, fresh_centres)), whole)
    assert len(whole.unique(dim=0)) == 2500


def changed(group, change: str):
    torch.manual_seed(1)
    head = head_of("kappaface", 70, group)
    rows = slice(None) if group is None else own_rows(group.size(), group.rank())
    steps(head, rows, 1)
    head.margin.end_epoch()
    steps(head, rows, 1)
    before = head.weight
    if change == "extend":
        head.extend_classes(9)
    elif change == "extend with":
        head.extend_classes(2, torch.arange(2.0 * DIM).view(2, DIM))
    else:
        head.select_rows(torch.tensor([69, 3, 0, 41, 40, 39, 12]))
    assert head.weight is not before and head.weight.requires_grad
    state = dict(head.margin.named_buffers())
    x, _, labels = batch_of(70)
    labels = labels.clamp_max(head.num_classes - 1)
    loss = head(x[rows], labels[rows])
    loss.backward()
    head.margin.end_epoch()
    return head.weight.detach(), state, loss.detach(), head.margin.class_weights


@pytest.mark.parametrize("change", ["extend", "extend with", "select"])
def test_another_set_of_classes(change):
    weight, state, loss, weights = changed(None, change)
    old = steps(head_of("kappaface", 70), slice(None), 0)["weight"]
    if change == "extend":
        assert weight.shape[0] == 79 and 0.005 < weight[70:].std() < 0.015
    elif change == "extend with":
        torch.testing.assert_close(weight[70:], torch.arange(2.0 * DIM).view(2, DIM).double())
        assert state["class_weights"][70:].tolist() == [1, 1]
    else:
        assert weight.shape[0] == 7
        # one small step away from where they were
        torch.testing.assert_close(weight, old[[69, 3, 0, 41, 40, 39, 12]], rtol=0, atol=2.0)
    for n in (2, 3):
        found = run(n, changed, change)
        torch.testing.assert_close(torch.cat([own[0] for own in found]), weight)
        for own in found:
            torch.testing.assert_close(own[1]["class_weights"], state["class_weights"])
            torch.testing.assert_close(own[2], loss, rtol=1e-6, atol=0)
            torch.testing.assert_close(own[3], weights, rtol=1e-4, atol=1e-6)
        for name in ("class_sums", "class_seen"):
            torch.testing.assert_close(torch.cat([own[1][name] for own in found]), state[name])


def exported(group, path: str):
    return head_of("arcface", 70, group).export_centers(path=path)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_export_to_safetensors(n, tmp_path, monkeypatch):
    path = tmp_path / "centers.safetensors"
    path.write_text("an older file")
    if n:
        run(n, exported, str(path))
    else:
        monkeypatch.setattr("fastmargin.export.PIECE", 16)
        exported(None, path)
    whole = head_of("arcface", 70).export_centers()
    torch.testing.assert_close(load_file(path)["centers"], whole, rtol=1e-14, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_freeze():
    head = head_of("arcface", 70)
    x, _, labels = batch_of(70)
    head.freeze()
    head(x.requires_grad_(), labels).backward()
    assert head.weight.grad is None and x.grad is not None
    head.freeze(False)
    head(x, labels).backward()
    assert head.weight.grad is not None


def whole_state(group):
    head = head_of("kappaface", 70, group)
    steps(head, own_rows(group.size(), group.rank()), 1)
    whole = {
        k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in head.state_dict().items()
    }
    other = fm.MarginHead(DIM, 70, MARGINS["kappaface"](), group=group).double()
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.weight, head.weight)
    other.reset_parameters()
    other.load_state_dict(whole)
    assert torch.equal(other.weight, head.weight)
    assert torch.equal(other.margin.class_sums, head.margin.class_sums)
    assert other.weight.shape[0] < 70
    short = fm.MarginHead(DIM, 60, MARGINS["kappaface"](), group=group)
    for state in (whole, head.state_dict()):
        try:
            short.load_state_dict(state)
        except ValueError as error:
            assert "weight has 70 rows to load, but the head has 60 classes" in str(error)
        else:
            raise AssertionError("loaded 70 classes into 60")
    return whole


def test_state_dict_of_shards_is_that_of_the_whole():
    head = head_of("kappaface", 70)
    steps(head, slice(None), 1)
    for whole in run(3, whole_state):
        assert whole.keys() == head.state_dict().keys()
        for name, value in head.state_dict().items():
            torch.testing.assert_close(whole[name], value, rtol=1e-5, atol=1e-7)
        fm.MarginHead(DIM, 70, MARGINS["kappaface"]()).double().load_state_dict(whole)


def of_a_dtensor(group):
    mesh = DeviceMesh.from_group(group, "cpu")
    x, weight, labels = batch_of(70)
    rows = own_rows(group.size(), group.rank())
    x = x[rows].clone().requires_grad_()
    weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    loss = fm.margin_loss(x, weight, labels[rows], fm.ArcFace())
    loss.backward()
    try:
        fm.margin_loss(x, weight.redistribute(placements=[Replicate()]), labels[rows], fm.ArcFace())
    except ValueError as error:
        assert "redistribute it to" in str(error)
    else:
        raise AssertionError("took a replicated DTensor")
    return loss.detach(), x.grad, weight.grad.full_tensor()


def test_weight_may_be_a_dtensor():
    x, weight, labels = batch_of(70)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    loss = fm.margin_loss(x, weight, labels, fm.ArcFace())
    loss.backward()
    for rank, own in enumerate(run(3, of_a_dtensor)):
        torch.testing.assert_close(own[0], loss.detach())
        torch.testing.assert_close(own[1], x.grad[own_rows(3, rank)] * 3)
        torch.testing.assert_close(own[2], weight.grad)
