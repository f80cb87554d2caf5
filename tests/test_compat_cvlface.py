"""CVLface's classifiers: recorded values, statistics of norms, rows that pad the classes."""

from __future__ import annotations

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
from fastmargin.compat.cvlface import FC, AdaFaceLoss, CombinedMarginLoss, CosFace, PartialFC_V2

DTYPES = [torch.float64, torch.float32]
SHARDED = names("cvlface_pfc_adaface", "cvlface_pfc_margin")
WHOLE = names("cvlface_adaface_fc")


def margin_loss(hyper):
    if "m3" in hyper:
        return CombinedMarginLoss(*(hyper[k] for k in ("s", "m1", "m2", "m3")), faithful=True)
    return AdaFaceLoss(*(hyper[k] for k in ("s", "m", "h", "t_alpha")))


def state_of(head) -> dict:
    return {name: value.clone() for name, value in head.state_dict().items() if name != "weight"}


def recorded_steps(group, name, faithful, dtype):
    file, meta, records = read(name)
    hyper, dim = meta["hyper"], file["weight"].shape[1]
    head = PartialFC_V2(
        *place(),
        margin_loss(hyper),
        dim,
        meta["num_classes"],
        hyper["sample_rate"],
        faithful=faithful,
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
        found.append({
            "loss": loss.detach(),
            "d_x": x.grad,
            "d_weight": head.weight.grad,
            "state": state_of(head),
        })  # fmt: skip
    return found


def has_padding(name) -> bool:
    _, meta, records = read(name)
    return meta["num_classes"] % meta["world_size"] > 0 and "class_index" not in records[0]


@pytest.mark.dist
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", SHARDED)
def test_recorded_values(name, faithful, dtype):
    if not faithful and has_padding(name):
        pytest.skip("rows that pad the classes are no negatives here: tested below")
    _, _, records = read(name)
    for found, record in zip(
        merged(everywhere(name, recorded_steps, faithful, dtype)), records, strict=True
    ):
        if not faithful and bool((record["loss_per_sample"] > LIMIT).any()):
            assert found["loss"] > record["loss"]
            found["loss"] = record["loss"]
        compare(found, record, dtype)


@pytest.mark.dist
@pytest.mark.parametrize("name", [name for name in SHARDED if has_padding(name)])
def test_padding_takes_no_part(name):
    """On several processes as on one, with the classes that there are."""
    file, meta, records = read(name)
    classes = meta["num_classes"]
    alone = FC(margin_loss(meta["hyper"]), file["weight"].shape[1], classes).double()
    alone.weight.data.copy_(torch.from_numpy(file["weight"][:classes]))
    for found, record in zip(
        merged(everywhere(name, recorded_steps, False, torch.float64)), records, strict=True
    ):
        x = record["embeddings"].requires_grad_()
        loss = alone(x, record["labels"])
        alone.weight.grad = None
        loss.backward()
        close(found["loss"], loss.detach(), torch.float64)
        close(found["d_x"], x.grad, torch.float64)
        close(found["d_weight"][:classes], alone.weight.grad, torch.float64)
        assert (found["d_weight"][classes:] == 0).all() and len(found["d_weight"]) > classes
        for key, value in state_of(alone).items():
            close(found["state"][key], value, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_recorded_values_of_fc(name, faithful, dtype):
    file, meta, records = read(name)
    classes, dim = file["weight"].shape
    head = FC(margin_loss(meta["hyper"]), dim, classes, faithful=faithful).to(dtype)
    head.weight.data.copy_(torch.from_numpy(file["weight"]))
    exact = meta.get("guard") == "exact"
    if exact and dtype == torch.float32:
        pytest.skip("whether a cosine of 1 is above 1 is decided by rounding")
    for record in records:
        x = record["embeddings"].to(dtype).requires_grad_()
        loss = head(x, record["labels"])
        head.weight.grad = None
        loss.backward()
        for key, value in state_of(head).items():
            close(value, record[f"state_after_{key}"], dtype)
        close(loss, record["loss"], dtype)
        if exact and not faithful:  # a cosine above 1 by rounding has no gradient there
            close(x.grad[4:], record["grad_embeddings"][4:], dtype)
            continue
        close(x.grad, record["grad_embeddings"], dtype)
        compare_centres(head.weight.grad, record, dtype)


@pytest.mark.parametrize("threshold", [0, 0.2])
def test_adaface_module_on_dense_cosines(threshold):
    """The numbers of the formula, and the statistics handed back."""
    margin = AdaFaceLoss(30.0, 0.4, 0.333, 0.25, threshold)
    cosine = torch.rand(5, 7, dtype=torch.float64) * 1.8 - 0.9
    norms = torch.rand(5, 1, dtype=torch.float64) * 40
    labels = torch.tensor([3, -1, 0, 1, 6])
    mean, std = torch.tensor([20.0]).double(), torch.tensor([100.0]).double()
    logits, new_mean, new_std = margin(cosine.clone(), labels, norms, mean, std)
    torch.testing.assert_close(new_mean, 0.25 * norms.mean() + 0.75 * mean)
    torch.testing.assert_close(new_std, 0.25 * norms.std() + 0.75 * std)
    expected = torch.where(cosine > threshold, 0.0, cosine) if threshold else cosine.clone()
    for row, label in enumerate(labels.tolist()):
        if label >= 0:
            z = ((norms[row] - new_mean) / (new_std + 1e-3) * 0.333).clip(-1, 1)
            own = cosine[row, label]
            expected[row, label] = (own.acos() - 0.4 * z).cos() - 0.4 - 0.4 * z
    torch.testing.assert_close(logits, 30 * expected)


LOSSES = {
    "adaface": lambda: AdaFaceLoss(20.0, 0.4, 0.333, 0.5),
    "adaface_filter": lambda: AdaFaceLoss(20.0, 0.3, 0.5, 0.1, 0.15),
    "combined_filter": lambda: CombinedMarginLoss(16.0, 1.0, 0.4, 0.0, 0.15),
}


def two_steps(group, loss, classes, rate, faithful):
    rank, ranks = place()
    head = PartialFC_V2(rank, ranks, LOSSES[loss](), 6, classes, rate, faithful=faithful).double()
    g = torch.Generator().manual_seed(3)
    whole = torch.randn(head.num_classes, 6, generator=g, dtype=torch.float64)
    start = head.class_start
    head.weight.data.copy_(whole[start : start + head.num_local])
    found = []
    for _ in range(2):
        if rate < 1:
            index = torch.randperm(classes, generator=g)[: classes // 2]
            index = torch.cat([index, torch.arange(classes)[::3]]).unique()
            head._placed().sampler = Recorded(index, start, head.num_local)
        x = 9 * torch.randn(5 * ranks, 6, generator=g, dtype=torch.float64)
        labels = torch.randint(0, (classes + 2) // 3, (5 * ranks,), generator=g) * 3
        x, labels = own_rows(x).requires_grad_(), own_rows(labels)
        value = head(x, labels)
        value.backward()
        found.append((value.detach(), x.grad, head.weight.grad.clone(), state_of(head)))
        head.weight.data.sub_(0.5 * head.weight.grad)
        head.weight.grad = None
    return found


@pytest.mark.dist
@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_fused_equals_plain(loss, ranks, rate):
    classes = 24  # without padding
    both = [
        [two_steps(None, loss, classes, rate, faithful)]
        if ranks == 1
        else run_world(ranks, two_steps, loss, classes, rate, faithful)
        for faithful in (False, True)
    ]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-11)


def test_a_filter_in_fc():
    """There it is an error with labels of one dimension."""
    head = FC(AdaFaceLoss(20.0, 0.4, 0.333, 0.5, 0.1), 8, 12).double()
    plain = FC(AdaFaceLoss(20.0, 0.4, 0.333, 0.5, 0.1), 8, 12, faithful=True).double()
    plain.load_state_dict(head.state_dict())
    x, labels = torch.randn(6, 8, dtype=torch.float64), torch.randint(0, 12, (6,))
    torch.testing.assert_close(head(x, labels), plain(x, labels), rtol=1e-9, atol=1e-11)
    unfiltered = FC(AdaFaceLoss(20.0, 0.4, 0.333, 0.5), 8, 12).double()
    unfiltered.load_state_dict(plain.state_dict())
    assert not torch.allclose(unfiltered(x, labels), plain(x, labels))


def fc_in_ddp(group):
    """Statistics of the own rows, as in the original: they differ between processes."""
    rank, _ = place()
    found = []
    for faithful in (False, True):
        torch.manual_seed(0)
        head = nn.parallel.DistributedDataParallel(
            FC(AdaFaceLoss(20.0, 0.4, 0.333, 1.0), 8, 12, faithful=faithful).double()
        )
        g = torch.Generator().manual_seed(rank)
        x = torch.randn(6, 8, generator=g, dtype=torch.float64) * (1 + rank)
        labels = torch.arange(6)
        loss = head(x.requires_grad_(), labels)
        loss.backward()
        found.append((loss.detach(), x.grad, head.module.weight.grad, state_of(head.module)))
    torch.testing.assert_close(*found)
    return found[0][3]["batch_mean"].item()


@pytest.mark.dist
def test_fc_in_ddp():
    first, second = run_world(2, fc_in_ddp)
    assert first != second


@pytest.mark.parametrize("make", [FC, lambda *args: PartialFC_V2(0, 1, *args)])
def test_state_dict(make):
    head = make(AdaFaceLoss(64, 0.4, 0.333, 0.01), 16, 50)
    assert list(head.state_dict()) == ["weight", "batch_mean", "batch_std"]
    assert head.batch_mean.shape == head.batch_std.shape == (1,)
    assert (head.batch_mean.item(), head.batch_std.item()) == (20, 100)
    assert list(make(CosFace(), 16, 50).state_dict()) == ["weight"]
    saved = {"batch_mean": torch.tensor([7.0]), "batch_std": torch.tensor([2.0])}
    head.load_state_dict({"weight": torch.ones(50, 16), **saved})
    x = torch.randn(4, 16)
    head.eval()
    head(x, torch.arange(4))
    torch.testing.assert_close(state_of(head), saved)  # no step
    head(x.requires_grad_(), torch.arange(4))  # a frozen classifier stays in eval()
    mean = 0.01 * x.detach().norm(dim=1).mean() + 0.99 * 7
    torch.testing.assert_close(head.batch_mean, mean[None])


def padded_shapes(group):
    head = PartialFC_V2(*place(), CosFace(), 4, 7)
    assert head.num_classes == 8 and head.weight.shape == (4, 4)
    head(torch.randn(3, 4), torch.tensor([0, 6, 3])).backward()
    full = head.weight.grad.abs().sum(1) > 0
    sampled = PartialFC_V2(*place(), CosFace(), 4, 7, 0.5)
    for _ in range(4):
        sampled(torch.randn(3, 4), torch.tensor([0, 6, 3])).backward()
    return full, sampled.weight.grad.abs().sum(1) > 0


@pytest.mark.dist
def test_padding_is_never_drawn():
    for found in zip(*run_world(2, padded_shapes), strict=True):
        assert torch.cat(found).tolist()[-1] is False
    assert torch.cat([full for full, _ in run_world(2, padded_shapes)])[:7].all()


def test_a_batch_of_one():
    """The deviation stays as it was; there it is NaN from then on."""
    x, labels = torch.randn(1, 8), torch.tensor([3])
    head = FC(AdaFaceLoss(64, 0.4, 0.333, 0.01), 8, 12)
    assert head(x, labels).isfinite() and head.batch_std.item() == 100
    head = FC(AdaFaceLoss(64, 0.4, 0.333, 0.01), 8, 12, faithful=True)
    with pytest.warns(UserWarning, match="degrees of freedom"):
        head(x, labels)
    assert head.batch_std.isnan()


def test_misuse():
    loss = AdaFaceLoss(64, 0.4, 0.333, 0.01)
    with pytest.raises(ValueError, match="rank=1 and world_size=2"):
        PartialFC_V2(1, 2, loss, 8, 10)
    with pytest.raises(TypeError, match="got Identity"):
        FC(nn.Identity(), 8, 10)
    with pytest.raises(ValueError, match="faithful=True"):
        FC(fm.AdaFace(), 8, 10, faithful=True)
    with pytest.raises(ValueError, match="num_classes"):
        FC(loss, 8, 0)
    head = FC(loss, 8, 10)
    with pytest.raises(ValueError, match="labels must be in"):
        head(torch.randn(2, 8), torch.tensor([0, 10]))
    assert head.batch_mean.item() == 20


def test_rows_of_zeros_have_no_gradient():
    x = torch.randn(4, 8, dtype=torch.float64)
    x[1] = 0
    labels = torch.arange(4)
    gradients = []
    for faithful in (False, True):
        torch.manual_seed(0)
        head = FC(CombinedMarginLoss(16, 1.0, 0.0, 0.3), 8, 12, faithful=faithful).double()
        rows = x.clone().requires_grad_()
        head(rows, labels).backward()
        gradients.append(rows.grad)
    assert (gradients[0][1] == 0).all() and gradients[1][1].norm() > 1e4
    keep = [0, 2, 3]
    torch.testing.assert_close(gradients[0][keep], gradients[1][keep])
    assert F.normalize(x)[1].norm() == 0
