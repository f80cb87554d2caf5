"""NPT-Loss as the authors' script has it: recorded values, its training loop, what streams."""

from __future__ import annotations

import warnings

import pytest
import torch
from pfc_cases import close, compare_centres, names, read
from torch import nn

import fastmargin as fm
from fastmargin.compat.logits import StreamedLogits
from fastmargin.compat.npt import Linear, NPTLoss

DTYPES = [torch.float64, torch.float32]


@pytest.fixture(autouse=True)
def no_warning():
    """Nothing here computes all cosines without being asked."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", names("npt"))
def test_recorded_values(name, faithful, dtype):
    file, meta, (record,) = read(name)
    classes, dim = file["weight"].shape
    weight = torch.from_numpy(file["weight"]).to(dtype)
    head = Linear(dim, classes, fc=weight, multi_flag=False, faithful=faithful)
    loss_f = NPTLoss(**meta["hyper"])
    x = record["embeddings"].to(dtype).requires_grad_()
    labels = record["labels"]
    dot_p = head(x, labels)
    assert isinstance(dot_p, StreamedLogits) != faithful
    loss = loss_f(dot_p.clone(), labels)
    loss.backward()
    if not faithful:
        assert dot_p._dense is None
    close(loss, record["loss"], dtype)
    close(x.grad, record["grad_embeddings"], dtype)
    compare_centres(head.weight.grad, record, dtype)
    if "cosines" in record:
        dense = dot_p if faithful else dot_p.dense()
        close(dense, record["cosines"], dtype)


@pytest.mark.parametrize("s", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [1, 3, 8, 9, 12, 17])
def test_streams_as_it_computes(top_k, s):
    """Also more negatives than classes, and more than the kernels keep."""
    x, labels = torch.randn(7, 5, dtype=torch.float64), torch.randint(0, 9, (7,))
    found = []
    for faithful in (False, True):
        torch.manual_seed(0)
        head = Linear(5, 9, multi_flag=False, faithful=faithful).double()
        rows = x.clone().requires_grad_()
        loss = NPTLoss(r=1.5, delta=0.3, top_k=top_k)(head(rows, labels, s=s), labels)
        loss.backward()
        found.append((loss.detach(), rows.grad, head.weight.grad))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_the_loss_on_a_tensor():
    """By hand: a 0 in the place of the own cosine, sorted, the first two."""
    dot_p = torch.tensor([[0.3, -0.2, -0.1, -0.4], [0.6, 0.5, 0.9, 0.8]])
    before = dot_p.clone()
    loss = NPTLoss(r=1.0, delta=0.5, top_k=2)(dot_p, torch.tensor([0, 2]))
    first = (0 - 0.3 + 0.5) + (-0.1 - 0.3 + 0.5)
    second = (0.8 - 0.9 + 0.5) + (0.6 - 0.9 + 0.5)
    torch.testing.assert_close(loss, torch.tensor((2 * first + 2 * second) / 2))
    assert torch.equal(dot_p, before)


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_the_training_loop(sparse_grad):
    """The loop of ``STrain.py``, in small: no (B, C) cosines, and the numbers of the dense one."""
    g = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(8, 10, generator=g), torch.randint(0, 20, (8,), generator=g)) for _ in range(3)
    ] * 2
    found = []
    for faithful in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(10, 6)
        sparse = {"sparse_grad": sparse_grad and not faithful}
        head = Linear(6, 20, multi_flag=False, device_id=[], faithful=faithful, **sparse)
        loss_f = NPTLoss(r=1.0, delta=0.5, top_k=1.0)
        settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
        parameters = [*model.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(parameters, **settings)
        if sparse["sparse_grad"]:
            optimizer = fm.optim.RowSGD(parameters, **settings)
        loop_loss, accuracy = [], []
        for data, target in batches:
            feats = model(data)
            dot_p = head(feats, target)
            loss = loss_f(dot_p.clone(), target)
            loop_loss.append(loss.data.item())
            accuracy.append((dot_p.data.max(1)[1] == target.data).sum().item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert faithful or dot_p._dense is None
        assert head.weight.grad.is_sparse == sparse["sparse_grad"]
        found.append((loop_loss, accuracy, head.state_dict(), model.state_dict()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_state_dict_and_start():
    torch.manual_seed(3)
    head = Linear(8, 30)
    torch.manual_seed(3)
    assert torch.equal(head.weight, nn.init.xavier_uniform_(torch.empty(30, 8)))
    assert list(head.state_dict()) == ["weight"] and not NPTLoss().state_dict()
    again = Linear(8, 30, fc=head.weight, eval_flag=True)
    assert torch.equal(again.weight, head.weight) and not again.weight.requires_grad
    loss = NPTLoss()
    assert (loss.r, loss.delta, loss.top_k) == (1.0, 0.5, 2)
    loss.delta = 0.7
    x, labels = torch.randn(3, 8), torch.tensor([1, 2, 3])
    expected = fm.margin_loss(x, head.weight, labels, fm.NPT(0.7, 2, zero_slot=True))
    torch.testing.assert_close(loss(head(x, labels), labels), expected)


def test_not_normalised():
    head = Linear(8, 30, normalised=False)
    x = torch.randn(3, 8)
    assert torch.equal(head(x, torch.arange(3), s=2.0), x @ head.weight.t() * 2)


def test_a_target_of_minus_one():
    """Ignored where it streams; on a tensor, and with faithful, it is the last class."""
    head = Linear(8, 12, multi_flag=False)
    x, labels = torch.randn(4, 8), torch.tensor([2, -1, 5, 0])
    keep = labels >= 0
    streamed = NPTLoss()(head(x, labels), labels)
    torch.testing.assert_close(streamed, NPTLoss()(head(x[keep], labels[keep]), labels[keep]))
    dense = head(x, labels).dense()
    last = torch.where(keep, labels, 11)
    torch.testing.assert_close(NPTLoss()(dense, labels), NPTLoss()(dense, last))


def test_a_row_of_zeros():
    x = torch.randn(4, 8)
    x[1] = 0
    labels = torch.arange(4)
    for faithful in (False, True):
        torch.manual_seed(0)
        rows = x.clone().requires_grad_()
        head = Linear(8, 12, multi_flag=False, faithful=faithful)
        NPTLoss()(head(rows, labels), labels).backward()
        assert (rows.grad[1].norm() > 1e6) if faithful else (rows.grad[1] == 0).all()


def test_misuse():
    for make, message in [
        (lambda: Linear(0, 4), "in_features and out_features"),
        (lambda: Linear(4, 8, device_id=[0, 1]), "multi_flag=False"),
        (lambda: Linear(4, 8, fc=torch.zeros(4, 8)), r"expected \(8, 4\)"),
        (lambda: Linear(4, 8, faithful=True, sparse_grad=True), "sparse_grad goes with neither"),
        (lambda: NPTLoss(top_k=0), "top_k must be at least 1"),
        (lambda: NPTLoss(r=0), "r must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    head, loss = Linear(4, 8), NPTLoss()
    x, labels = torch.randn(2, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="embedding size"):
        head(torch.randn(2, 5), labels)
    with pytest.raises(TypeError, match="int64"):
        loss(head(x, labels), labels.float())
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        loss(head(x, labels), labels[:1])
    with pytest.raises(ValueError, match=r"target must be in \[0, 8\), found 8"):
        loss(head(x, labels), labels + 7)
