"""Several processes on gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastmargin as fm

pytestmark = pytest.mark.dist


def adaface_rank(rank, ranks, store, stats, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    x, y = torch.randn(11, 4) * 20, torch.arange(11) % 5
    y[6] = -1
    mine = slice(0, 4) if rank == 0 else slice(4, 11)
    head = fm.MarginHead(4, 5, fm.AdaFace(t_alpha=0.5, stats=stats))
    for _ in range(2):
        head(x[mine], y[mine])
    results[rank] = (head.margin.batch_mean.item(), head.margin.batch_std.item())
    dist.destroy_process_group()


def kappaface_rank(rank, ranks, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.arange(40) % 5
    mine = slice(0, 15) if rank == 0 else slice(15, 40)
    head = fm.MarginHead(4, 5, fm.KappaFace())
    head(x[mine], y[mine])
    head.margin.end_epoch()
    results[rank] = head.margin.class_weights.tolist()
    dist.destroy_process_group()


def test_kappaface_epoch_over_uneven_ranks(tmp_path):
    results = mp.Manager().dict()
    mp.spawn(kappaface_rank, (2, tmp_path / "store", results), nprocs=2)
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.arange(40) % 5
    head = fm.MarginHead(4, 5, fm.KappaFace())
    head(x, y)
    head.margin.end_epoch()
    for rank in range(2):
        assert results[rank] == pytest.approx(head.margin.class_weights.tolist(), rel=1e-5)


@pytest.mark.parametrize("stats", ["global", "local"])
def test_adaface_statistics_over_uneven_ranks(stats, tmp_path):
    results = mp.Manager().dict()
    mp.spawn(adaface_rank, (2, tmp_path / "store", stats, results), nprocs=2)
    torch.manual_seed(0)
    norm = (torch.randn(11, 4) * 20).norm(dim=1).clamp(1e-3, 100)
    valid = torch.arange(11) != 6
    rows = torch.arange(11)
    for rank, own in enumerate((rows < 4, rows >= 4)):
        counted = norm[valid] if stats == "global" else norm[valid & own]
        mean, std = results[rank]
        assert mean == pytest.approx(0.75 * counted.mean().item() + 0.25 * 20, rel=1e-5)
        assert std == pytest.approx(0.75 * counted.std().item() + 0.25 * 100, rel=1e-5)


def ddp_rank(rank, ranks, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    x, y = torch.randn(12, 4), torch.arange(12) % 5
    model = WithHead()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    mine = slice(0, 6) if rank == 0 else slice(6, 12)
    wrapped(x[mine], y[mine]).backward()
    results[rank] = [p.grad.tolist() for p in model.parameters()]
    dist.destroy_process_group()


class WithHead(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.backbone = torch.nn.Linear(4, 4)
        self.head = fm.MarginHead(4, 5, fm.ArcFace(s=8))

    def forward(self, x, y):
        return self.head(self.backbone(x), y)


def test_head_inside_ddp(tmp_path):
    """All classes on every rank: DDP averages the gradients, which is the gradient of the whole."""
    results = mp.Manager().dict()
    mp.spawn(ddp_rank, (2, tmp_path / "store", results), nprocs=2)
    torch.manual_seed(0)
    x, y = torch.randn(12, 4), torch.arange(12) % 5
    model = WithHead()
    model(x, y).backward()
    for rank in range(2):
        for parameter, gradient in zip(model.parameters(), results[rank], strict=True):
            torch.testing.assert_close(torch.tensor(gradient), parameter.grad)
