"""Every head whose rows processes share out, with what has to know: checkpoints, norms, DDP."""

from __future__ import annotations

import io

import pytest
import torch
import torch.distributed as dist
from pfc_cases import place
from processes import run_world
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastmargin as fm
from fastmargin.compat import cvlface, insightface, kappaface
from fastmargin.distributed.agreement import ProcessError
from fastmargin.distributed.shard import shards_in

C, D, B = 21, 8, 6

pytestmark = pytest.mark.dist


def head_of(kind: str, classes: int = C):
    rank, ranks = place()
    if kind == "margin":
        return fm.MarginHead(D, classes, fm.CosFace(), group=None if ranks == 1 else "world")
    if kind in ("insightface", "faithful"):
        faithful = kind == "faithful"
        return insightface.PartialFC_V2(insightface.CosFace(), D, classes, faithful=faithful)
    return cvlface.PartialFC_V2(rank, ranks, cvlface.CombinedMarginLoss(64, 1, 0, 0.4), D, classes)


KINDS = ("margin", "insightface", "cvlface")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of this process, of a batch that is the same for any number of them."""
    rank, ranks = place()
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(B, D, generator=g), torch.randint(0, C, (B,), generator=g)
    return x[rank::ranks], labels[rank::ranks]


def all_rows(head, rows: torch.Tensor) -> torch.Tensor:
    """(C, D) of all processes."""
    shards = shards_in(head)
    return shards["weight"].gather_classes(rows)[:C] if shards else rows[:C]


def trained(kind: str):
    """A head after two steps, and its optimiser, which has momentum."""
    head = head_of(kind)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    x, labels = batch()
    for _ in range(2):
        optimiser.zero_grad()
        head(x.requires_grad_(), labels).backward()
        optimiser.step()
    return head, optimiser


def saved(group, kind, path):
    head, optimiser = trained(kind)
    fm.checkpoint.save(path, {"head": head, "optimiser": optimiser})
    momentum = optimiser.state[head.weight]["momentum_buffer"]
    return all_rows(head, head.weight.detach()), all_rows(head, momentum)


def loaded(group, kind, path):
    head = head_of(kind)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    fm.checkpoint.load(path, {"head": head, "optimiser": optimiser})
    momentum = optimiser.state[head.weight]["momentum_buffer"]
    return all_rows(head, head.weight.detach()), all_rows(head, momentum)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_the_rows_of_all(kind, tmp_path):
    expected = run_world(2, saved, kind, tmp_path)[0]
    assert expected[1].abs().sum(1).min() > 0  # every row has a momentum
    # CVLface's number of rows is a multiple of the number of processes
    for n in (2,) if kind == "cvlface" else (2, 3, 1):
        found = run_world(n, loaded, kind, tmp_path) if n > 1 else [loaded(None, kind, tmp_path)]
        for rows, momentum in found:
            assert torch.equal(rows, expected[0]) and torch.equal(momentum, expected[1])


def norm_of(group, kind):
    torch.manual_seed(3)
    backbone = nn.Linear(D, D)
    if place()[1] > 1:
        backbone = DistributedDataParallel(backbone)
    head = head_of(kind)
    shard = shards_in(head).get("weight")
    rows = torch.randn(C + 1, D, generator=torch.Generator().manual_seed(4))
    start = 0 if shard is None else shard.start
    head.weight.data.copy_(rows[start : start + len(head.weight)])
    x, labels = batch()
    head(backbone(x), labels).backward()
    return fm.total_norm(backbone, head).item()


@pytest.mark.parametrize("kind", KINDS)
def test_total_norm_is_that_of_one_process(kind):
    # without C % 2, CVLface has a row more on two processes, which gets no gradient
    first, second = run_world(2, norm_of, kind)
    assert first == second == pytest.approx(norm_of(None, kind), rel=1e-5)


def old_head(kind: str):
    rank, ranks = place()
    make = {"insightface": insightface.PartialFC, "kappaface": kappaface.PartialFC}[kind]
    return make(rank, 0, ranks, B, False, insightface.CosFace(), C, embedding_size=D)


@pytest.mark.parametrize("kind", ["insightface", "kappaface"])
def test_what_state_dict_leaves_out_is_not_saved_in_silence(kind, tmp_path):
    with pytest.raises(ValueError, match=r"objects\.head: .* PartialFC leaves out its momentum"):
        fm.checkpoint.save(tmp_path, {"objects": nn.ModuleDict({"head": old_head(kind)})})
    assert not any(tmp_path.iterdir())


class Whole(nn.Module):
    """Backbone and head in one module, as DDP would like it."""

    def __init__(self, head) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(D, D), head

    def forward(self, x, labels):
        return self.head(self.backbone(x), labels)


def wrapped(group, kind, path):
    x, labels = batch()
    alone = DistributedDataParallel(head_of(kind, 20))
    with pytest.raises(ValueError, match="leave it outside"):
        alone(x, labels)
    with pytest.raises((ValueError, ProcessError), match="overwritten"):
        fm.checkpoint.save(path, {"head": alone})
    inside = DistributedDataParallel(Whole(head_of(kind, 20)))
    with pytest.raises(ValueError, match="leave it outside"):
        inside(x, labels)
    # told to leave the head alone, DDP does
    whole = Whole(head_of(kind, 20))
    rows = whole.head.weight.detach().clone()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(whole, ["head.weight"])
    whole = DistributedDataParallel(whole)
    whole(x, labels).backward()
    assert torch.equal(whole.module.head.weight, rows)
    fm.checkpoint.save(path, {"whole": whole})


@pytest.mark.parametrize("kind", [*KINDS, "faithful"])
def test_ddp_around_shared_out_rows(kind, tmp_path):
    run_world(2, wrapped, kind, tmp_path)


def replicated(group):
    """DDP over processes that hold the same classes is what it is for."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("rows", "classes"))
    whole = DistributedDataParallel(
        Whole(fm.MarginHead(D, C, fm.CosFace(), group=mesh.get_group("classes"))),
        process_group=mesh.get_group("rows"),
    )
    whole(*batch()).backward()
    return whole.module.head.weight.grad


def test_ddp_over_replicas():
    first, second = run_world(2, replicated)
    assert torch.equal(first, second)


def pickled(group, rank0):
    """What another process saved, loaded as one's own."""
    head = fm.MarginHead(D, 20, fm.CosFace(), group="world")
    rows = head.weight.detach().clone()
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    files = [None] * place()[1]
    dist.all_gather_object(files, file.getvalue())
    head.reset_parameters()
    own = torch.load(io.BytesIO(files[0 if rank0 else place()[0]]), weights_only=True)
    if rank0 and place()[0]:
        with pytest.raises(ValueError, match="those of another process"):
            head.load_state_dict(own)
        return
    head.load_state_dict(own)
    assert torch.equal(head.weight, rows)


@pytest.mark.parametrize("rank0", [False, True])
def test_a_file_of_another_process(rank0):
    run_world(2, pickled, rank0)


def compiled(group, kind):
    torch._dynamo.reset()
    head = head_of(kind)
    x, labels = batch()
    found = torch.compile(head, backend="aot_eager")(x.requires_grad_(), labels)
    assert found.item() == pytest.approx(head(x, labels).item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_before_the_first_step(kind):
    run_world(2, compiled, kind)
