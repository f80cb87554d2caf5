"""insightface's classifier before March 2022, with forward_backward: its loop and its files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pfc_cases import (
    Recorded,
    place,
)
from processes import run_world
from torch import nn

from fastmargin.compat.insightface import (
    CosFace,
    PartialFC,
)


def first_loop(group, rate, faithful, folder, resume=False, steps=3):
    """The loop of the first ``train.py``, in small, after which centres and momentum are saved."""
    rank, ranks = place()
    torch.manual_seed(0)
    backbone = nn.Linear(10, 8).double()
    if ranks > 1:
        backbone = nn.parallel.DistributedDataParallel(backbone)
    original = type("ArcFace", (nn.Module,), {"forward": old_arcface})()
    original.s, original.m = 16.0, 0.4
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(1 + rank)
        module_partial_fc = PartialFC(
            rank=rank,
            local_rank=rank,
            world_size=ranks,
            resume=resume,
            batch_size=6,
            margin_softmax=original,
            num_classes=23,
            sample_rate=rate,
            embedding_size=8,
            prefix=folder,
            faithful=faithful,
            device="cpu",
        )
    finally:
        torch.set_default_dtype(torch.float32)
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    opt_backbone = torch.optim.SGD(backbone.parameters(), **settings)
    opt_pfc = torch.optim.SGD([{"params": module_partial_fc.parameters()}], **settings)
    found = []
    for step in range(steps):
        g = torch.Generator().manual_seed(10 * step + rank)
        img = torch.randn(6, 10, generator=g, dtype=torch.float64)
        label = torch.randint(0, 23, (6,), generator=g)
        if rate < 1:
            index = torch.arange(23)[torch.randint(0, 2, (23,), generator=g) > 0]
            labels = torch.cat([
                torch.randint(0, 23, (6,), generator=skip(10 * step + r)) for r in range(ranks)
            ])  # fmt: skip
            index = torch.cat([index, labels]).unique()
            start, count = module_partial_fc.class_start, module_partial_fc.num_local
            module_partial_fc._sampler = Recorded(index, start, count)
        features = F.normalize(backbone(img))
        x_grad, loss = module_partial_fc.forward_backward(label, features, opt_pfc)
        features.backward(x_grad)
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), max_norm=5, norm_type=2)
        opt_backbone.step()
        opt_pfc.step()
        module_partial_fc.update()
        opt_backbone.zero_grad()
        opt_pfc.zero_grad()
        found.append(loss.item())
    module_partial_fc.save_params()
    kept = [parameter.detach() for parameter in backbone.parameters()]
    return found, kept, module_partial_fc.weight, module_partial_fc.weight_mom


def skip(seed: int) -> torch.Generator:
    """The generator of a step after its images."""
    g = torch.Generator().manual_seed(seed)
    torch.randn(6, 10, generator=g, dtype=torch.float64)
    return g


def old_arcface(self, cosine, label):
    """What the first ``losses.ArcFace`` computes, with its exact gradient."""
    (row,) = torch.where(label != -1)
    added = torch.zeros_like(cosine)
    added[row, label[row]] = self.m
    return self.s * (cosine.acos() + added).cos()


@pytest.mark.dist
@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_first_training_loop(ranks, rate, tmp_path):
    both = []
    for faithful in (False, True):
        args = (rate, faithful, str(tmp_path))
        both.append(
            [first_loop(None, *args)] if ranks == 1 else run_world(ranks, first_loop, *args)
        )
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-11)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        f"rank_{rank}_softmax_weight{kind}.pt" for rank in range(ranks) for kind in ("", "_mom")
    }
    assert torch.equal(torch.load(tmp_path / "rank_0_softmax_weight.pt"), both[1][0][2])
    assert both[1][0][3].abs().sum() > 0


def test_resuming_takes_the_files(tmp_path):
    saved = first_loop(None, 1.0, False, str(tmp_path))
    again = first_loop(None, 1.0, False, str(tmp_path), True, 0)
    torch.testing.assert_close(saved[2:], again[2:])
    torch.save(torch.zeros(3, 8), tmp_path / "rank_0_softmax_weight.pt")
    anew = first_loop(None, 1.0, False, str(tmp_path), True, 0)
    assert anew[2].shape == (23, 8) and (anew[3] == 0).all()


def test_the_first_one_draws_all_positives(tmp_path):
    module = PartialFC(0, 0, 1, 5, False, CosFace(), 40, 0.25, 8, device="cpu")
    assert list(module.state_dict()) == ["sub_weight"]
    optimiser = torch.optim.SGD(module.parameters(), 0.1, 0.9)
    before = module.weight.clone()
    label = torch.tensor([1, 30, 30, 7, 0])
    module.forward_backward(label, F.normalize(torch.randn(5, 8)), optimiser)
    assert len(module.index) == 10 and set(label.tolist()) <= set(module.index.tolist())
    optimiser.step()
    assert torch.equal(module.weight, before)
    module.update()
    moved = (module.weight != before).any(1)
    assert set(moved.nonzero().flatten().tolist()) <= set(module.index.tolist())
    assert moved[label].all()


def test_the_first_one_refuses():
    module = PartialFC(0, 0, 1, 4, False, CosFace(), 10, 0.5, 8, device="cpu")
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    x, label = F.normalize(torch.randn(4, 8)), torch.tensor([1, 2, 3, 4])
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    for args, message in [
        ((label[:3], x[:3], optimiser), "batch_size=4"),
        ((label, x, other), "last group of parameters"),
        ((label + 8, x, optimiser), "labels must be in"),
    ]:
        with pytest.raises(ValueError, match=message):
            module.forward_backward(*args)
    assert module.index is None and module.sub_weight.shape == (0, 0)
