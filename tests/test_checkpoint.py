"""Checkpoints: nothing is lost between any numbers of processes, and misfits are refused."""

from __future__ import annotations

import re
from collections import OrderedDict

import checkpoint_cases
import pytest
import torch
from checkpoint_cases import (
    BATCH,
    DIM,
    Training,
    adamw,
    assert_same,
    fresh,
    sgd,
    small,
    small_chunks,
    snapshot,
    stepped,
)
from fresh_processes import run_fresh
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fastmargin as fm
from fastmargin.checkpoint import folder
from fastmargin.distributed import collectives

# fixtures
chunks = checkpoint_cases.chunks

pytestmark = pytest.mark.dist


# ---- any number of processes ----


def pass_on(group, source, target, seed):
    """Loads into something made otherwise and saves; the state and where its rows are."""
    small_chunks()
    torch.manual_seed(seed)
    training = Training(group)
    if seed % 2:
        training.trained(1)  # optimisers have other state
    values = fm.checkpoint.load(source, training.objects)
    fm.checkpoint.save(target, {**training.objects, **values})
    return training.state(), values, training.rows()


def test_from_one_process_to_three_to_eight_to_two_to_one(tmp_path):
    training = Training().trained()
    values = {"epoch": 3, "note": ["a", {"b": 1.5}], "rng": torch.get_rng_state()}
    fm.checkpoint.save(tmp_path / "1", {**training.objects, **values})
    expected = training.state()
    assert {name.split(".")[0] for name in expected} == training.objects.keys()

    found = []
    for seed, (before, n) in enumerate([(1, 3), (3, 8), (8, 2)]):
        found += fresh(n, pass_on, tmp_path / str(before), tmp_path / str(n), seed, seconds=60)
    for state, loaded, rows in found:
        assert_same(state, expected, rows)
        assert loaded.keys() == values.keys() and loaded["note"] == values["note"]
        assert loaded["rng"].equal(values["rng"])
    # empty shards were among them
    assert {rows["kappaface"] for *_, rows in found} >= {(0, 1), (5, 5), (4, 5), (0, 3)}

    again = Training()
    assert fm.checkpoint.load(tmp_path / "2", again.objects)["epoch"] == 3
    assert_same(again.state(), expected)
    again.step(3), training.step(3)
    assert_same(again.state(), training.state())


def next_steps(group, path):
    rows = slice(0, 7) if group.rank() == 0 else slice(7, BATCH)
    training = Training(group).trained(3, rows)
    fm.checkpoint.save(path, training.objects)
    torch.manual_seed(5)
    again = Training(group)
    fm.checkpoint.load(path, again.objects)
    assert_same(again.state(), training.state())
    for number in (3, 4):
        training.step(number, rows), again.step(number, rows)
    assert_same(again.state(), training.state())


def test_the_next_steps_of_two_processes_are_the_same(tmp_path):
    fresh(2, next_steps, tmp_path)


def test_rows_take_what_they_are_owed_first(tmp_path):
    """Of any module, with its optimiser or without."""

    def made():
        table = nn.Embedding(20, 4, sparse=True)
        optimiser = fm.optim.RowSGD(table.parameters(), lr=0.1, momentum=0.9)
        return {"table": table, "optimiser": optimiser}

    def step(table, optimiser, rows):
        optimiser.zero_grad()
        table(torch.tensor(rows)).square().sum().backward()
        optimiser.step()

    saved, loaded = made(), made()
    step(**saved, rows=[1, 2])
    step(**saved, rows=[3])
    fm.checkpoint.save(tmp_path / "alone", {"table": saved["table"]})
    fm.checkpoint.load(tmp_path / "alone", {"table": loaded["table"]})
    fm.checkpoint.save(tmp_path / "both", saved)
    assert loaded["table"].weight.equal(saved["table"].weight)
    fm.checkpoint.load(tmp_path / "both", loaded)
    for objects in (saved, loaded):
        step(**objects, rows=[2, 4])
    assert_same(snapshot(loaded), snapshot(saved))


def half_an_epoch(group, replicas, path):
    """Sums over an epoch of processes with other rows, and what a checkpoint makes of them."""
    rank, n = group.rank(), group.size()
    mesh = init_device_mesh("cpu", (n // 2, 2)) if replicas else None
    x, labels = torch.randn(n, 5, DIM)[rank], torch.randint(5, (n, 5))[rank]
    head = fm.MarginHead(DIM, 5, fm.KappaFace(), group=mesh)
    head(x, labels)
    before = head.margin.class_sums.clone()
    fm.checkpoint.save(path, {"model": nn.ModuleDict({"head": head})})
    again = fm.MarginHead(DIM, 5, fm.KappaFace(), group=mesh)
    fm.checkpoint.load(path, {"model": nn.ModuleDict({"head": again})})
    for each in (head, again):
        each(x.flip(0), labels)
        each.margin.end_epoch()
    torch.testing.assert_close(again.margin.class_weights, head.margin.class_weights)
    return before, labels


@pytest.mark.parametrize("n, replicas", [(4, True), (2, False)])
def test_sums_of_replicas_are_added_up(n, replicas, tmp_path):
    found = fresh(n, half_an_epoch, replicas, tmp_path)
    head = fm.MarginHead(DIM, 5, fm.KappaFace())
    fm.checkpoint.load(tmp_path, {"model": nn.ModuleDict({"head": head})})
    labels = torch.cat([labels for _, labels in found])
    assert head.margin.class_seen.equal(labels.bincount(minlength=5))
    sums = [sums for sums, _ in found]
    if replicas:
        sums = [torch.cat(sums[:2]), torch.cat(sums[2:])]
    torch.testing.assert_close(head.margin.class_sums, sum(sums))


def fully_sharded(group, source, target):
    from torch.distributed.fsdp import fully_shard

    net = nn.Linear(6, 5)
    fully_shard(net, mesh=init_device_mesh("cpu", (group.size(),)))
    optimiser = adamw(net.parameters())
    fm.checkpoint.load(source, {"net": net, "optimiser": optimiser})
    fm.checkpoint.save(target, {"net": net, "optimiser": optimiser})
    return type(optimiser.state[net.weight]["exp_avg"]).__name__


def test_a_fully_sharded_backbone(tmp_path):
    def made():
        net = nn.Linear(6, 5)
        return {"net": net, "optimiser": adamw(net.parameters())}

    saved, loaded = made(), made()
    saved["net"](torch.randn(3, 6)).square().sum().backward()
    saved["optimiser"].step()
    fm.checkpoint.save(tmp_path / "1", saved)
    assert fresh(2, fully_sharded, tmp_path / "1", tmp_path / "2") == ["DTensor", "DTensor"]
    fm.checkpoint.load(tmp_path / "2", loaded)
    assert loaded["net"].weight.equal(saved["net"].weight)
    for one, other in zip(*(x["optimiser"].state.values() for x in (saved, loaded)), strict=True):
        assert one.keys() == other.keys() and all(other[key].equal(one[key]) for key in one)


# ---- what does not fit ----


class Refuses:
    """Has a state that it does not take."""

    def __init__(self, refuses=True):
        self.refuses, self.count = refuses, 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]
        if self.refuses and self.count == 2:
            raise ValueError("no")


MISFITS = {
    "rows": (
        lambda: dict(reversed(small(21).items())),
        "head.weight has 20 rows in the checkpoint.*21 classes.*extend_cl",
    ),
    "embedding size": (lambda: small(dim=9), r"head.weight: \(20, 8\).*\(20, 9\)"),
    "dtype": (lambda: {**small(), "head": small()["head"].double()}, "float32.*float64"),
    "margin": (lambda: small(margin=fm.KappaFace), "batch_mean.*class_sums.*same margin"),
    "sampling": (lambda: small(sample_rate=0.5), "head.sampler.seed"),
    "absent": (lambda: {"head": small()["head"]}, "only in the checkpoint: optimiser"),
    "extra": (lambda: {**small(), "more": nn.Linear(1, 1)}, "only here: more"),
    "kind": (lambda: {**small(), "optimiser": nn.Linear(1, 1)}, "optimiser: a AdamW was saved"),
    "optimiser": (lambda: small(optimiser=sgd), "AdamW was saved, which has no .*momentum"),
    "groups": (
        lambda: small(optimiser=lambda p: adamw([*p, torch.zeros(2, requires_grad=True)])),
        r"optimiser: parameter 1 of group 0 has shape None in the checkpoint and \(2,\) here",
    ),
    "scheduler": (
        lambda: {**small(), "other": torch.optim.lr_scheduler.StepLR(small()["optimiser"], 1)},
        "other: a Refuses was saved .* StepLR",
    ),
    "refused": (lambda: {**small(), "other": Refuses()}, "^no$"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_changes_nothing(misfit, tmp_path):
    saved = stepped(small())
    if misfit in ("scheduler", "refused"):
        saved["other"] = Refuses()
        saved["other"].count = 2
    fm.checkpoint.save(tmp_path, saved)
    make, error = MISFITS[misfit]
    objects = make()
    if misfit == "optimiser" or misfit == "refused":
        stepped(objects, 1)  # what must come back has something in it
    before = snapshot(objects)
    with pytest.raises(ValueError, match=error):
        fm.checkpoint.load(tmp_path, objects)
    assert_same(snapshot(objects), before)


def test_objects_have_names(tmp_path):
    with pytest.raises(TypeError, match="by name, such as"):
        fm.checkpoint.save(tmp_path, [small()["head"]])
    fm.checkpoint.save(tmp_path, small())
    with pytest.raises(TypeError, match="by name, such as"):
        fm.checkpoint.load(tmp_path, [small()["head"]])


def test_some_of_what_was_saved(tmp_path):
    saved = {**stepped(small()), "backbone": nn.Linear(3, 2)}
    fm.checkpoint.save(tmp_path, {**saved, "epoch": 7})
    assert fm.checkpoint.load(tmp_path, {}, strict=False) == {"epoch": 7}
    backbone = nn.Linear(3, 2)
    assert fm.checkpoint.load(tmp_path, {"backbone": backbone}, strict=False) == {"epoch": 7}
    assert torch.equal(backbone.weight, saved["backbone"].weight)
    fresh_start = small()
    fm.checkpoint.load(tmp_path, {"head": fresh_start["head"]}, strict=False)
    assert torch.equal(fresh_start["head"].weight, saved["head"].weight)
    assert not fresh_start["optimiser"].state
    with pytest.raises(ValueError, match=r"only here: net: .* strict=False"):
        fm.checkpoint.load(tmp_path, {"net": backbone}, strict=False)
    with pytest.raises(ValueError, match=r"only in the checkpoint: head, optimiser;"):
        fm.checkpoint.load(tmp_path, {"backbone": backbone})


def one_refuses(group, path):
    objects = stepped(small(group=group), group.rank())
    objects["other"] = Refuses(group.rank() == 1)
    before = snapshot(objects)
    fm.checkpoint.save(path / "good", objects)
    objects["other"].count = 2
    fm.checkpoint.save(path / "refused", stepped(objects, 3))
    fm.checkpoint.load(path / "good", objects)
    assert_same(snapshot(objects), before)
    try:
        fm.checkpoint.load(path / "refused", objects)
    except (ValueError, collectives.ProcessError) as error:
        assert_same(snapshot(objects), before)
        return str(error)


def test_what_one_process_refuses_changes_nothing_on_the_others(tmp_path):
    other, refusing = fresh(2, one_refuses, tmp_path)
    assert refusing == "no"
    assert "(optimisers) failed on process 1 of 2: ValueError: no" in other


def differently(group, path, case):
    objects = small(group=group)
    if case == "names" and group.rank() == 1:
        objects["more"] = nn.Linear(1, 1)
    if case == "head missing":
        del objects["head"]
    if case == "state":
        objects["optimiser"].state[objects["head"].weight]["odd"] = torch.zeros(3)
    fm.checkpoint.save(path, objects)


@pytest.mark.parametrize(
    "case, error",
    [
        ("names", "'more' differs between processes: 0: none, 1: module"),
        ("head missing", "optimiser: its parameter 0.* is of no module in objects: add"),
        ("state", r"optimiser.state.0.odd has shape \(3,\) and its parameter \(10, 8\)"),
    ],
)
def test_what_cannot_be_saved_is_refused(case, error, tmp_path):
    for outcome in run_fresh(2, differently, tmp_path, case):
        assert re.search(error, outcome.error)
    assert folder.current_version(tmp_path) is None


def test_no_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
            fm.checkpoint.load(path, small())
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        fm.checkpoint.load(tmp_path / "file", small())


def test_odd_tensors_and_names_are_refused(tmp_path):
    with pytest.raises(TypeError, match="process_group must be None or a ProcessGroup, got str"):
        fm.checkpoint.save(tmp_path, {"a": 1}, process_group="all")
    with pytest.raises(TypeError, match="a is a Tensor of layout"):
        fm.checkpoint.save(tmp_path, {"a": torch.eye(2).to_sparse()})
    with pytest.raises(ValueError, match="two tensors would be stored as"):
        fm.checkpoint.save(tmp_path, {"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)})


def test_a_state_of_odd_tensors(tmp_path):
    """Empty ones, without dimension, of other dtypes and strides, in nested containers."""
    base = torch.arange(24).view(4, 6)
    values = {
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(2.5, dtype=torch.float64),
        "half": torch.randn(300, 3).bfloat16(),
        "views": [base.t(), base[:, ::2], (base[1:3] > 9,)],
        "ordered": OrderedDict(a=torch.ones(1)),
    }
    values["ordered"]._metadata = {"": {"version": 2}}  # as a module's state_dict has it
    fm.checkpoint.save(tmp_path, {"values": values})
    loaded = fm.checkpoint.load(tmp_path, {})["values"]
    expected, found = Training(cases={}), Training(cases={})
    expected.objects, found.objects = {"v": StateOf(values)}, {"v": StateOf(loaded)}
    assert_same(found.state(), expected.state())
    assert isinstance(loaded["views"][2], tuple)
    assert loaded["ordered"]._metadata == {"": {"version": 2}}


class StateOf:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state
