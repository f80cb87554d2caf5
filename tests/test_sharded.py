"""Classes shared out among processes: N processes are one process, to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import run
from sharded_cases import (
    BATCH,
    DIM,
    MARGINS,
    batch_of,
    compare,
    head_of,
    own_classes,
    own_rows,
    sharded_steps,
    steps,
)
from torch.distributed.device_mesh import DeviceMesh

import fastmargin as fm
from fastmargin.distributed import agreement, collectives

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("classes, n", [(507, 4), (5, 4), (70, 3), (70, 2), (70, 1)])
@pytest.mark.parametrize("margin", [name for name in MARGINS if name != "adaface_local"])
def test_many_processes_are_one(margin, classes, n):
    whole = steps(head_of(margin, classes), slice(None))
    compare(run(n, sharded_steps, margin, classes), whole, margin, classes, n)


@pytest.mark.parametrize("margin", ["arcface", "npt_3", "no_form"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions(margin, reduction):
    whole = steps(head_of(margin, 70), slice(None), reduction=reduction)
    options = (("grad_reduce", "sum"),)
    compare(run(3, sharded_steps, margin, 70, reduction, options), whole, margin, 70, 1)


def test_adaface_with_statistics_of_each_process():
    """Every process's rows follow its own batch; the first one's statistics are kept."""
    x, _, labels = batch_of(70)
    alone = [head_of("adaface_local", 70) for _ in range(2)]
    rows = [own_rows(2, rank) for rank in range(2)]
    losses = [h(x[r], labels[r], reduction="sum") for h, r in zip(alone, rows, strict=True)]
    loss = sum(losses).detach() / (labels >= 0).sum()
    after = steps(head_of("adaface_local", 70), rows[0])["state"]
    assert not torch.equal(alone[0].margin.batch_mean, alone[1].margin.batch_mean)
    for found in run(2, sharded_steps, "adaface_local", 70):
        torch.testing.assert_close(found["loss"][0], loss, rtol=1e-6, atol=0)
        for name in ("batch_mean", "batch_std"):
            torch.testing.assert_close(found["state"][name], after[name])


# ---- epochs of KappaFace ----


def epoch(group, features: str):
    margin = fm.KappaFace(features=features, num_samples=BATCH if features == "memory" else None)
    fm.MarginHead(DIM, 70, margin, group=group)  # tells it the classes and processes
    rows = slice(None) if group is None else own_rows(group.size(), group.rank())
    for step in range(3):
        x, _, labels = batch_of(70, step)
        x, labels = x[rows].float(), (labels // 8)[rows]
        index = (torch.arange(BATCH).roll(step)[rows],) if features == "memory" else ()
        margin.accumulate(x, labels, *index)
    margin.end_epoch()
    return margin.class_weights, margin.kappa


@pytest.mark.parametrize("features", ["momentum", "memory"])
def test_kappaface_takes_features_of_all_processes(features):
    weights, kappa = epoch(None, features)
    assert len(weights.unique()) > 3
    for own in run(4, epoch, features):
        torch.testing.assert_close(own[0], weights, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own[1], kappa, rtol=1e-3, atol=1e-4)


# ---- bad input ----


def refused(group, what: str):
    head = head_of("arcface", 70, group, batch_size=3 if what == "too many rows" else None)
    before = head.weight.clone()
    x, _, labels = batch_of(70)
    x, labels = x[:6], labels[:6].clamp_min(0)
    if group.rank() == 1:
        if what == "label":
            labels[2] = 70
        elif what == "dtype":
            head, x = head.float(), x.float()
        elif what == "dim":
            x = x[:, :4]
    if what == "nobody":
        x, labels = x[:0], labels[:0]
    try:
        head(x, labels)
    except Exception as error:
        assert torch.equal(head.weight.double(), before)
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize(
    "what, at_fault, others",
    [
        ("label", "labels must be in [-1, 70)", "input of process 1 of the group was refused"),
        ("dim", "embeddings have size 4", "input of process 1 of the group was refused"),
        ("dtype", "the rows of different processes differ", "rows of different processes differ"),
        ("nobody", "an empty batch on every process", "an empty batch on every process"),
        ("too many rows", "made for batch_size=3", "made for batch_size=3"),
    ],
)
def test_bad_input_of_one_process_ends_the_step_of_all(what, at_fault, others):
    for rank, found in enumerate(run(3, refused, what)):
        assert found is not None, f"process {rank} went on"
        assert (at_fault if rank == 1 else others) in found[1]


class Learnable(fm.SoftmaxMargin):
    """One learnable margin for each class."""

    def __init__(self):
        super().__init__(8.0)
        self.m = torch.nn.Parameter(torch.full((70,), 0.2))

    def forward(self, cos_y, norm, labels):
        return cos_y - self.m[labels.clamp_min(0)]


def learnable(group, meshed: bool):
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2)) if meshed else group
    head = fm.MarginHead(DIM, 70, Learnable(), group=mesh).double()
    head.weight.data.mul_(100)
    x, _, labels = batch_of(70)
    rows = slice(None) if group is None else own_rows(group.size(), group.rank())
    try:
        head(x[rows], labels[rows]).backward()
    except ValueError as error:
        return str(error)
    return head.margin.m.grad


def test_parameters_of_a_margin():
    """Every shard sees all rows, so it has their whole gradient; replicas would not."""
    expected = learnable(None, False)
    assert (expected != 0).sum() > 5
    for found in run(3, learnable, False):
        torch.testing.assert_close(found, expected)
    for found in run(4, learnable, True):
        assert "shard the classes over all processes" in found


def test_batch_size_spares_the_exchange_before():
    """The same numbers, with one gathering and one sum of (B, 2), besides the metrics' maximum."""
    whole = steps(head_of("arcface", 70), slice(None))
    compare(run(2, counted, 14), whole, "arcface", 70, 2)


def counted(group, batch_size: int):
    calls = []

    def counting(name, inner):
        def outer(first, *args, **kwargs):
            calls.append((name, tuple(first.shape)))
            return inner(first, *args, **kwargs)

        return outer

    head = head_of("arcface", 70, group, batch_size=batch_size)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (collectives, "_all_gather"),
            (collectives, "_reduce_scatter"),
            (dist, "all_reduce"),
        ):
            patch.setattr(module, name, counting(name, getattr(module, name)))
        found = steps(head, own_rows(2, group.rank()))
    row_bytes = DIM * 8 + 8
    step = [
        ("_all_gather", (2 * batch_size * row_bytes,)),
        ("all_reduce", (2 * batch_size, 2)),
        ("all_reduce", (2 * batch_size,)),
        ("_reduce_scatter", (batch_size, DIM)),
    ]
    assert calls == step * 2, calls
    return found


def test_logits_too_large_for_plain_sums():
    found = run(2, too_large)
    assert all("use a smaller s" in text for text in found)


def too_large(group):
    head = fm.MarginHead(DIM, 7, fm.ArcFace(s=708.0), group=group)
    x, labels = torch.randn(3, DIM), torch.arange(3)
    try:
        head(x, labels)
    except ValueError as error:
        return str(error)
    return ""


# ---- what the processes of a group must have alike ----


def unlike(group, what: str):
    first = group.rank() == 0
    x, _, labels = batch_of(70)
    x, labels = x[:4], labels[:4].clamp_min(0)
    try:
        if what == "classes":
            fm.MarginHead(DIM, 70 if first else 72, fm.ArcFace(), group=group)
        elif what == "seed":
            fm.MarginHead(DIM, 70, fm.ArcFace(), group=group, seed=int(first))
        elif what == "margin":
            margin = fm.ArcFace(m=0.5 if first else 0.3)
            fm.MarginHead(DIM, 70, margin, group=group)
        elif what == "setting":
            margin = fm.Filtered(fm.CosFace(cos_eps=0.0 if first else 1e-4), 0.4)
            fm.MarginHead(DIM, 70, margin, group=group)
        elif what == "change":
            head = head_of("arcface", 70, group)
            try:
                head.change_margin(fm.CosFace(m=0.4 if first else 0.3))
            finally:
                assert isinstance(head.margin, fm.ArcFace)
        elif what == "requires_grad":
            head_of("arcface", 70, group)(x.requires_grad_(first), labels)
        elif what == "width":
            head_of("arcface", 70, group).predict(x if first else x[:, :3])
        elif what == "export":
            head_of("arcface", 70, group).export_centers(path="/nonexistent/folder/centers")
        elif what == "groups":
            agreement.channel(group)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    "what, first, others",
    [
        ("classes", "ValueError: num_classes is 70 on this", "ValueError: num_classes is 72 on"),
        ("seed", "ValueError: seed is 1 on this process", "ValueError: seed is 0 on this process"),
        ("margin", "ValueError: margin is ArcFace(m=0.5", "ValueError: margin is ArcFace(m=0.3"),
        ("setting", "ValueError: margin is Filtered(", None),
        ("change", "ValueError: margin is CosFace(m=0.4", "ValueError: margin is CosFace(m=0.3"),
        ("requires_grad", "ValueError: embeddings: some processes want a gradient", None),
        (
            "width",
            "ProcessError: the input of process 1 of the group",
            "ValueError: embeddings have",
        ),
        ("export", "FileNotFoundError", "ProcessError: exporting the centres to"),
        ("groups", "ValueError: process_group: its processes are in different numbers", None),
    ],
)
def test_what_differs_is_an_error_on_all(what, first, others):
    found = run(2, unlike, what)
    assert found[0].startswith(first)
    assert found[1].startswith(others or first)


def without_rows(group):
    """One process has no rows and no graph; the step goes on."""
    head = head_of("arcface", 70, group)
    x, _, labels = batch_of(70)
    if group.rank() == 0:
        x.requires_grad_()
        head(x, labels).backward()
        return x.grad, head.weight.grad
    head(x[:0].detach(), labels[:0]).backward()
    return None, head.weight.grad


def test_a_process_without_rows_needs_no_graph():
    x, weight, labels = batch_of(70)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    fm.margin_loss(x, weight, labels, fm.ArcFace()).backward()
    found = run(2, without_rows)
    torch.testing.assert_close(found[0][0], x.grad * 2)
    torch.testing.assert_close(torch.cat([own[1] for own in found]), weight.grad)


def test_world_needs_processes():
    with pytest.raises(ValueError, match="init_process_group"):
        fm.MarginHead(DIM, 70, fm.ArcFace(), group="world")


def all_backward(group, kind: str):
    head = head_of("arcface", 70, group)
    x, _, labels = batch_of(70)
    x = x[own_rows(group.size(), group.rank())].clone().requires_grad_()
    labels = labels[own_rows(group.size(), group.rank())]
    if kind == "frozen":
        head.freeze()
        head(x, labels).backward()
        return x.grad, head.weight.grad
    if kind == "half":
        head, x = head.float(), x.detach().half().requires_grad_()
        head(x, labels).backward()
        return x.grad, head.weight.grad
    loss = head(x, labels)
    loss.backward(retain_graph=True)
    loss.backward()
    return x.grad, head.weight.grad


@pytest.mark.parametrize("kind, factor", [("frozen", 1), ("half", 1), ("twice", 2)])
def test_backward_of_other_kinds(kind, factor):
    x, weight, labels = batch_of(70)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    fm.margin_loss(x, weight, labels, fm.ArcFace()).backward()
    close = {"rtol": 2e-2, "atol": 2e-3} if kind == "half" else {}
    found = run(3, all_backward, kind)
    for rank, (d_x, d_weight) in enumerate(found):
        expected = factor * 3 * x.grad[own_rows(3, rank)]
        torch.testing.assert_close(d_x.double(), expected, **close)
        if kind == "frozen":
            assert d_weight is None
        else:
            expected = factor * weight.grad[own_classes(70, 3, rank)]
            torch.testing.assert_close(d_weight.double(), expected, **close)
