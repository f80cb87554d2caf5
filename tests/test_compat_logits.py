"""Logits that stream: every option of cross-entropy, and what needs all of them."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from processes import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastmargin.compat import logits as module
from fastmargin.compat.logits import stream
from fastmargin.compat.scores import CentreScores
from fastmargin.spec import MarginForm

ARC = MarginForm(8.0, m2=0.5, guard="mm")
PLAIN = MarginForm(8.0, grad="straight_through")


@pytest.fixture
def told_anew():
    module._warned = module._warned_of_change = False
    yield
    module._warned = module._warned_of_change = True


@pytest.fixture
def never_dense(monkeypatch):
    """Fails where all logits are computed."""

    def refuse(self):
        raise AssertionError("all logits were computed")

    monkeypatch.setattr(CentreScores, "dense", refuse)


def parts(batch=12, classes=50, dim=16, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(batch, dim, generator=g)).to(dtype).requires_grad_()
    weight = torch.randn(classes, dim, generator=g).to(dtype).requires_grad_()
    return x, weight, torch.randint(0, classes, (batch,), generator=g)


def gradients(make_loss, x, weight):
    x.grad = weight.grad = None
    loss = make_loss()
    (
        loss * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    ).sum().backward()
    return loss.detach(), x.grad, weight.grad


OPTIONS = list(
    itertools.product((None, "class"), (0.0, 0.2), ("mean", "sum", "none"), ("none", "some"))
)


@pytest.mark.parametrize(("weighted", "smoothing", "reduction", "ignored"), OPTIONS)
@pytest.mark.parametrize("target_is", ["the labels", "equal", "equal, not known", "another"])
@pytest.mark.parametrize("form", [ARC, PLAIN], ids=["margin", "plain"])
def test_cross_entropy(weighted, smoothing, reduction, ignored, target_is, form, monkeypatch):
    x, weight, labels = parts()
    target = labels
    if target_is.startswith("equal"):
        target = labels.clone()
        if "not known" in target_is:  # as on a GPU, where looking would mean to wait
            monkeypatch.setattr(CentreScores, "_is_given", lambda *_: False)
    elif target_is == "another":
        target = torch.where(torch.arange(12) % 3 == 0, labels, (labels + 7) % 50)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    if weighted:
        options["weight"] = torch.rand(50, dtype=torch.float64)
    if ignored == "some":
        options["ignore_index"] = int(target[2])

    def loss(dense):
        on = labels if form is ARC else None
        out = stream(CentreScores.of(x, weight, form, on))
        return F.cross_entropy(out.dense() if dense else out, target, **options)

    for streamed, expected in zip(
        gradients(lambda: loss(False), x, weight),
        gradients(lambda: loss(True), x, weight),
        strict=True,
    ):
        torch.testing.assert_close(streamed, expected, rtol=1e-10, atol=1e-12)


def test_the_dense_logits_are_the_formula():
    x, weight, labels = parts()
    cos = x @ F.normalize(weight).t()
    theta = cos.gather(1, labels[:, None]).acos()
    expected = 8 * cos.scatter(1, labels[:, None], torch.cos(theta + 0.5))
    dense = stream(CentreScores.of(x, weight, ARC, labels)).dense()
    torch.testing.assert_close(dense, expected)


def test_training_and_its_logs_never_hold_them(never_dense):
    x, weight, labels = parts()
    out = stream(CentreScores.of(x, weight, ARC, labels))
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(out, labels).backward()
        assert out.argmax(1).shape == out.argmax(dim=-1).shape == (12,)
        assert torch.argmax(out, 1, keepdim=True).shape == (12, 1)
        values, classes = out.topk(5, 1, True, True)
        assert values.shape == classes.shape == (12, 5)
        assert torch.max(out.data, 1).indices.shape == (12,)
        assert out.max(1, keepdim=True)[0].shape == (12, 1)
        assert not out.detach().requires_grad and out.requires_grad
        assert out.to(torch.float64) is out and out.cpu() is out and out.contiguous() is out
        assert (
            out.unsqueeze(1).shape == (12, 1, 50) and out.unsqueeze(1).squeeze(1).shape == out.shape
        )
        assert "StreamedLogits(shape=(12, 50)" in repr(out)


@pytest.mark.parametrize("with_margin", [True, False])
@pytest.mark.parametrize("k", [1, 3, 16])
def test_largest(with_margin, k):
    x, weight, labels = parts()
    out = stream(CentreScores.of(x, weight, ARC, labels if with_margin else None))
    found, expected = out.topk(k), out.dense().topk(k)
    torch.testing.assert_close(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(out.argmax(1), out.dense().argmax(1))
    streamed = gradients(lambda: out.topk(k).values, x, weight)
    for a, b in zip(
        streamed, gradients(lambda: out.dense().topk(k).values, x, weight), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_few_classes():
    for classes in (1, 2):
        x, weight, labels = parts(classes=classes)
        out = stream(CentreScores.of(x, weight, ARC, labels))
        torch.testing.assert_close(
            F.cross_entropy(out, labels), F.cross_entropy(out.dense(), labels)
        )
        torch.testing.assert_close(out.topk(classes).values, out.dense().topk(classes).values)
        assert torch.isfinite(out.topk(classes).values).all()


def test_confident_rows_keep_their_digits():
    """Where p_y -> 1 the loss and its gradient are those of float64."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 16, generator=g)
    labels = torch.arange(12)
    found = []
    for dtype in (torch.float32, torch.float64):
        w = weight.to(dtype)
        x = F.normalize(w[labels] + 0.05).requires_grad_()
        out = stream(CentreScores.of(x, w, MarginForm(64.0, m3=0.1), labels))
        loss = F.cross_entropy(out, labels, reduction="none")
        loss.sum().backward()
        found.append((loss.detach().double(), x.grad.double()))
    assert float(found[1][0].min()) < 1e-12
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=0)
    error = (found[0][1] - found[1][1]).norm() / found[1][1].norm()
    assert error < 1e-3


def test_all_rows_ignored_is_what_torch_says():
    x, weight, labels = parts()
    out = stream(CentreScores.of(x, weight, ARC, labels))
    target = torch.full_like(labels, -100)
    assert torch.isnan(F.cross_entropy(out, target))
    assert float(F.cross_entropy(out, target, reduction="sum").detach()) == 0
    F.cross_entropy(out, target, reduction="sum").backward()
    assert float(x.grad.abs().max()) == 0 and float(weight.grad.abs().max()) == 0


def test_an_ignored_row_may_hold_nan():
    x, weight, labels = parts()
    with torch.no_grad():
        x[4] = torch.nan
    target = labels.clone()
    target[4] = -100
    out = stream(CentreScores.of(x, weight, ARC, labels))
    F.cross_entropy(out, target).backward()
    assert torch.isfinite(weight.grad).all() and torch.isfinite(x.grad).all()


def test_labels_written_into_afterwards():
    """The trainers of some heads mark rows to ignore in the tensor that the head was given."""
    x, weight, labels = parts()
    before = labels.clone()
    out = stream(CentreScores.of(x, weight, ARC, labels))
    expected = F.cross_entropy(out.dense(), before.masked_fill(torch.arange(12) == 3, -100))
    labels[3] = -100
    torch.testing.assert_close(F.cross_entropy(out, labels), expected)


def test_a_target_out_of_range():
    x, weight, labels = parts()
    out = stream(CentreScores.of(x, weight, ARC, labels))
    target = labels.clone()
    target[0] = 50
    with pytest.raises(IndexError, match="Target 50 is out of bounds"):
        F.cross_entropy(out, target)


def test_labels_out_of_range_that_nobody_looked_at():
    """As on a GPU: the other rows are right, and nothing is read out of bounds."""
    x, weight, labels = parts()
    wrong = labels.clone()
    wrong[3] = 50 + 10**6
    scores = CentreScores.of(x, weight, ARC, wrong)
    loss, logit = scores.rows(wrong, torch.ones(12, dtype=torch.bool))
    total = scores.total(torch.rand(50, dtype=torch.float64)), scores.total(None)
    right = CentreScores.of(x, weight, ARC, labels)
    expected, _ = right.rows(labels, torch.ones(12, dtype=torch.bool))
    others = torch.arange(12) != 3
    torch.testing.assert_close(loss[others], expected[others])
    assert float(loss[3].detach()) == float(logit[3].detach()) == 0  # cross_entropy makes it NaN
    torch.testing.assert_close(total[1][others], right.total(None)[others])
    assert torch.isfinite(total[0]).all()


@pytest.mark.parametrize(
    "use",
    [
        lambda out, y: out.softmax(1),
        lambda out, y: torch.cat([out, out]),
        lambda out, y: out[:, :3],
        lambda out, y: out + 1,
        lambda out, y: out.topk(17),
        lambda out, y: out.argmax(),
        lambda out, y: out.max(),
        lambda out, y: out.half(),
        lambda out, y: F.nll_loss(F.log_softmax(out, 1), y),
        lambda out, y: F.cross_entropy(out, F.one_hot(y, 50).double()),
        lambda out, y: F.cross_entropy(input=out, target=F.one_hot(y, 50).double()),
        lambda out, y: out.clone().mul_(2),
    ],
)
def test_anything_else_computes_them_and_says_so_once(use, told_anew):
    x, weight, labels = parts()
    out = stream(CentreScores.of(x, weight, ARC, labels))
    with pytest.warns(UserWarning, match=r"needs all \(B, C\) logits") as said:
        result = use(out, labels)
    assert len(said) == 1 and said[0].filename == __file__
    expected = use(out.dense(), labels)
    for a, b in zip(tensors(result), tensors(expected), strict=True):
        assert type(a) is torch.Tensor and torch.equal(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(out, labels)


def tensors(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("form", [ARC, None])
def test_all_of_them_in_autocast(form):
    """Products in the type of the embeddings, as the passes have them."""
    x, weight, labels = parts(dtype=torch.float32)
    logits = stream(CentreScores.of(x, weight, form or PLAIN, labels if form else None))
    soft = F.one_hot(labels, 50).float()
    uses = (
        lambda: logits.dense(),
        lambda: logits.softmax(1),
        lambda: F.cross_entropy(logits, soft),
        lambda: F.cross_entropy(logits, labels, label_smoothing=0.1),
    )
    expected = [use() for use in uses]
    logits = stream(CentreScores.of(x, weight, form or PLAIN, labels if form else None))
    with torch.autocast("cpu", torch.bfloat16):
        found = [use() for use in uses]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_named_arguments():
    x, weight, labels = parts()
    out = stream(CentreScores.of(x, weight, ARC, labels))
    expected = F.cross_entropy(out.dense(), labels)
    torch.testing.assert_close(F.cross_entropy(target=labels, input=out), expected)


def test_writing_into_them(told_anew):
    x, weight, labels = parts()
    out = stream(CentreScores.of(x, weight, ARC, labels))
    with pytest.warns(UserWarning):
        out[:, 7] = -100.0
    expected = out.dense()
    assert float(expected[:, 7].detach().max()) == -100
    torch.testing.assert_close(F.cross_entropy(out, labels), F.cross_entropy(expected, labels))


def test_whoever_goes_past_it_gets_an_error():
    x, weight, labels = parts()
    out = stream(CentreScores.of(x, weight, ARC, labels))
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="dense"):
        out.sum()


def test_copies_are_plain_numbers():
    x, weight, labels = parts()
    out = stream(CentreScores.of(x, weight, ARC, labels))
    again = pickle.loads(pickle.dumps(out))
    assert type(again) is torch.Tensor and torch.equal(again, out.dense().detach())
    assert torch.equal(copy.deepcopy(out.detach()).softmax(1), out.dense().detach().softmax(1))


def test_two_losses_of_the_same_logits():
    x, weight, labels = parts()
    out = stream(CentreScores.of(x, weight, ARC, labels))
    loss = F.cross_entropy(out, labels) + 0.5 * F.cross_entropy(out, labels, label_smoothing=0.1)
    found = torch.autograd.grad(loss, (x, weight))
    dense = out.dense()
    loss = F.cross_entropy(dense, labels) + 0.5 * F.cross_entropy(
        dense, labels, label_smoothing=0.1
    )
    for a, b in zip(found, torch.autograd.grad(loss, (x, weight)), strict=True):
        torch.testing.assert_close(a, b)


# ---- their place in the graph ----


class _Twice(torch.autograd.Function):
    """A loss of somebody else, who takes logits as a tensor and writes its own backward."""

    @staticmethod
    def forward(ctx, logits):
        return logits.square().sum(1)

    @staticmethod
    def backward(ctx, grad):
        return (grad[:, None] * torch.linspace(-1, 1, 50, dtype=grad.dtype)).contiguous()


PASSES = {
    "an autograd.Function": lambda out, labels: _Twice.apply(out).sum(),
    "an axis more and less": lambda out, labels: F.cross_entropy(
        out.unsqueeze(1).clone().squeeze(1), labels
    ),
    "a hook": lambda out, labels: (
        out.register_hook(lambda grad: 3 * grad) and F.cross_entropy(out, labels)
    ),
}


@pytest.mark.parametrize("how", PASSES)
def test_gradients_through_them(how):
    x, weight, labels = parts()
    found, expected = (
        torch.autograd.grad(PASSES[how](out, labels), (x, weight))
        for out in (
            stream(CentreScores.of(x, weight, ARC, labels)),
            CentreScores.of(x, weight, ARC, labels).dense(),
        )
    )
    for a, b in zip(found, expected, strict=True):
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "derive", [lambda out: out, lambda out: out.detach(), lambda out: out.unsqueeze(1)]
)
def test_asked_after_the_step(derive, told_anew):
    x, weight, labels = parts()
    out = stream(CentreScores.of(x, weight, ARC, labels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        derive(out).argmax(-1)
    with torch.no_grad():
        weight.mul_(-1)
    assert out.shape[-1] == 50  # costs nothing, and says nothing
    with pytest.warns(UserWarning, match=r"before optimizer\.step") as told:
        derive(out).argmax(-1)
        derive(out).argmax(-1)
    assert len(told) == 1 and told[0].filename == __file__


def test_computed_before_the_step(told_anew):
    x, weight, labels = parts()
    out = stream(CentreScores.of(x, weight, ARC, labels))
    before = out.dense().detach().clone()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        weight.mul_(-1)
        assert torch.equal(out.dense(), before)


def test_without_gradient_for_good():
    x, weight, labels = parts()
    with torch.no_grad():
        out = stream(CentreScores.of(x, weight, ARC, labels))
    assert not out.requires_grad and out.grad_fn is None
    assert not F.cross_entropy(out, labels).requires_grad
    assert not out.dense().requires_grad and not out.topk(2).values.requires_grad


def test_a_look_at_them_costs_no_gradient():
    x, weight, labels = parts()
    out = stream(CentreScores.of(x, weight, ARC, labels))
    with torch.no_grad():
        out.softmax(1)
    assert out.softmax(1).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_head(reentrant):
    x, weight, labels = parts()

    def head(x):
        return stream(CentreScores.of(x, weight, ARC, labels))

    loss = F.cross_entropy(checkpoint(head, x, use_reentrant=reentrant), labels)
    loss.backward()
    for grad, expected in zip(
        (x.grad, weight.grad),
        torch.autograd.grad(F.cross_entropy(head(x), labels), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected)


class _Head(nn.Module):
    def __init__(self, weight, dense, middle):
        super().__init__()
        self.weight, self.dense, self.middle = nn.Parameter(weight), dense, middle

    def forward(self, x, labels):
        scores = CentreScores.of(x, self.weight, ARC, labels)
        out = scores.dense() if self.dense else stream(scores)
        return out.unsqueeze(1) if self.middle else out


def _in_ddp(group, options, middle):
    """Gradients of the centres after each of three steps, of dense and of streamed logits."""
    _, weight, _ = parts()
    found = []
    for dense in (True, False):
        head = DistributedDataParallel(
            _Head(weight.detach().clone(), dense, middle), process_group=group, **options
        )
        for seed in range(3):
            x, _, labels = parts(seed=10 * seed + group.rank() + 1)
            head.zero_grad()
            logits = head(x, labels)
            loss = F.cross_entropy(logits.squeeze(1) if middle else logits, labels)
            loss.backward()
            found.append(head.module.weight.grad.clone())
    return found


@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("option", [None, "find_unused_parameters", "static_graph"])
def test_head_in_ddp(option, middle):
    for found in run(2, _in_ddp, {} if option is None else {option: True}, middle):
        for dense, streamed in zip(found[:3], found[3:], strict=True):
            torch.testing.assert_close(streamed, dense)
