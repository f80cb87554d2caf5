"""The losses of pytorch-metric-learning: recorded values, options, and its training loop."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_golden import FILES, compare, ordinary_rows, steps
from torch import nn

from fastmargin.compat import chunked
from fastmargin.compat.chunked import ChunkedScores
from fastmargin.compat.logits import StreamedLogits
from fastmargin.compat.pytorch_metric_learning import (
    ArcFaceLoss,
    CosFaceLoss,
    NormalizedSoftmaxLoss,
    SphereFaceLoss,
    SubCenterArcFaceLoss,
)
from fastmargin.compat.scores import CentreScores
from fastmargin.testing import make_case, relative_error

CLASSES = {
    "pml_arcface": ArcFaceLoss,
    "pml_cosface": CosFaceLoss,
    "pml_normalized_softmax": NormalizedSoftmaxLoss,
    "pml_sphereface": SphereFaceLoss,
    "pml_subcenter_arcface": SubCenterArcFaceLoss,
}
ALL = list(CLASSES.values())
B, C, D = 12, 31, 10


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 9)


@pytest.fixture
def never_dense(monkeypatch):
    """Fails where all logits are computed."""

    def refuse(self):
        raise AssertionError("all logits were computed")

    monkeypatch.setattr(CentreScores, "dense", refuse)
    monkeypatch.setattr(ChunkedScores, "dense", refuse)


class DoNothingReducer(nn.Module):
    """Gives back what the reducers are given."""

    def forward(self, loss_dict, embeddings, labels):
        return loss_dict


class AboveOne(nn.Module):
    """A reducer of one sub-loss: the mean of the rows above 1."""

    def forward(self, loss_dict, embeddings, labels):
        (loss,) = loss_dict.values()
        if loss["reduction_type"] == "already_reduced":
            assert loss["indices"] is None
            return loss["losses"]
        assert torch.equal(loss["indices"], torch.arange(len(embeddings)))
        return loss["losses"][loss["losses"] > 1].mean()


def batch(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = (2 * torch.randn(B, D, generator=g)).to(dtype).requires_grad_()
    labels = torch.randint(0, C, (B,), generator=g)
    labels[0] = C - 1  # in the last chunk, which is not full
    return x, labels


def gradients(loss, x, labels, *args):
    """Loss and the gradients by the embeddings and W."""
    x = x.detach().requires_grad_()
    loss.W.grad = None
    value = loss(x, labels, *args)
    value.backward()
    return value.detach(), x.grad, loss.W.grad


def faithful_pair(kind, dtype=torch.float64, **options):
    """One that streams and one that computes as the original, with the same W."""
    kwargs = {"num_classes": C, "embedding_size": D, **options}
    loss, original = kind(**kwargs).to(dtype), kind(**kwargs, faithful=True).double()
    original.load_state_dict(loss.state_dict())
    return loss, original


# ---- recorded values ----------------------------------------------------------------------------


RECORDED = sorted(name for name in FILES if name.split("__")[0] in CLASSES)


def recorded(name, dtype, faithful=False):
    """The loss with the recorded W, the record, and what the file says of itself."""
    file = np.load(FILES[name])
    meta = json.loads(str(file["meta"][0]))
    record = next(steps(file, meta))
    size, count = record["weight"].shape
    classes = count // (meta.get("sub_centers") or 1)
    loss = CLASSES[meta["family"]](classes, size, **meta["hyper"], faithful=faithful).to(dtype)
    loss.load_state_dict({"W": record["weight"]})
    return loss, record, meta


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_values(name, dtype, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 40)
    loss, record, meta = recorded(name, dtype)
    loss.reducer = DoNothingReducer()
    x = record["embeddings"].to(dtype).requires_grad_()
    rows = loss(x, record["labels"])["loss"]["losses"]
    rows.mean().backward()
    d_weight = loss.W.grad.t()
    if dtype == torch.float64:
        compare(meta, record, SimpleNamespace(loss=rows), rows.mean(), x.grad, d_weight)
        if "logits" in record:
            plain = loss.get_logits(record["embeddings"]).dense().detach()
            plain.scatter_(1, record["labels"][:, None], 0)
            expected = record["logits"].scatter(1, record["labels"][:, None], 0)
            torch.testing.assert_close(plain, expected, rtol=1e-9, atol=1e-9)
        return
    assert torch.isfinite(x.grad).all() and torch.isfinite(d_weight).all()
    ordinary = ordinary_rows(meta, record)
    assert relative_error(rows[ordinary], record["loss_per_sample"][ordinary]) < 1e-5
    if not meta.get("guard"):  # there 1 / sin(theta) multiplies the rounding
        assert relative_error(x.grad, record["grad_embeddings"]) < 1e-4
        if "grad_weight" in record:
            assert relative_error(d_weight.t(), record["grad_weight"]) < 1e-4


@pytest.mark.parametrize("name", [name for name in RECORDED if "guard_exact" not in name])
def test_recorded_values_of_the_faithful(name):
    loss, record, meta = recorded(name, torch.float64, faithful=True)
    x = record["embeddings"].requires_grad_()
    value = loss(x, record["labels"])
    value.backward()
    bound = 1e-5 if meta.get("guard") else 1e-9
    assert relative_error(value, record["loss"]) < 1e-9
    assert relative_error(x.grad, record["grad_embeddings"]) < bound


# ---- against the originals' formulas, in plain PyTorch -------------------------------------------

OPTIONS = [
    (ArcFaceLoss, {}),
    (ArcFaceLoss, {"margin": 57.3, "scale": 10}),
    (ArcFaceLoss, {"margin": 0, "scale": 10}),
    (ArcFaceLoss, {"margin": -20, "scale": 10}),
    (CosFaceLoss, {}),
    (CosFaceLoss, {"margin": 0.6, "scale": 8}),
    (NormalizedSoftmaxLoss, {}),
    (NormalizedSoftmaxLoss, {"temperature": 0.3}),
    (SphereFaceLoss, {}),
    *((SphereFaceLoss, {"margin": m, "scale": 0.7}) for m in (1, 2, 3, 5)),
    (SubCenterArcFaceLoss, {}),
    (SubCenterArcFaceLoss, {"sub_centers": 1, "margin": 40, "scale": 9}),
    (SubCenterArcFaceLoss, {"sub_centers": 7, "scale": 9}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_any_options(kind, options, seed, never_dense):
    x, labels = batch(seed=seed)
    with torch.no_grad():
        x[3] = -x[3]
    mined = (torch.tensor([0, 1, 1]), torch.tensor([2, 2, 2]), torch.tensor([5, 7, 0]))
    loss, original = faithful_pair(kind, **options)
    with torch.no_grad():  # one row nearly opposite to its centre, past the margin's end
        x[1] = -5 * loss.W[:, labels[1] * loss.rows] + 0.3 * x[1]
    for indices in (None, mined, (*mined[:2], *mined[:1], mined[2]), tuple(i[:0] for i in mined)):
        found = gradients(loss, x, labels, indices)
        for mine, truth in zip(found, gradients(original, x, labels, indices), strict=True):
            assert relative_error(mine, truth) < 1e-9
    # rows 0 and 1 are named twice, row 2 three times, 5 and 7 once
    weights = torch.tensor([2, 2, 3, 0, 0, 1, 0, 1, 0, 0, 0, 0], dtype=torch.float64) / 3
    mean, loss.reducer = loss(x, labels, mined), DoNothingReducer()
    rows = loss(x, labels)["loss"]["losses"]
    assert relative_error(mean, (weights * rows).mean()) < 1e-12
    logits = loss.get_logits(x)
    assert isinstance(logits, StreamedLogits) and logits.shape == (B, C)
    truth = original.get_logits(x)
    assert torch.equal(logits.argmax(1), truth.argmax(1))
    assert relative_error(logits.topk(3).values, truth.topk(3).values) < 1e-9


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "regime", ["confident", "aligned", "antipodal", "one_row", "one_class", "two_classes"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_regimes(kind, regime, dtype, never_dense):
    case = make_case(regime, batch=B, classes=C, dim=D)
    classes = len(case.weight)
    loss = kind(num_classes=classes, embedding_size=D).double()
    loss.W.data.copy_(case.weight.t().repeat_interleave(loss.rows, 1))
    found = gradients(loss, case.x, case.labels)
    assert all(torch.isfinite(each).all() for each in found)
    if classes == 1:
        assert not any(each.any() for each in found)
    if dtype == torch.float64:
        if regime in ("one_row", "two_classes"):
            original = kind(num_classes=classes, embedding_size=D, faithful=True).double()
            original.load_state_dict(loss.state_dict())
            for mine, truth in zip(found, gradients(original, case.x, case.labels), strict=True):
                assert relative_error(mine, truth) < 1e-9
        return
    low = loss.float()
    low.W.grad = None
    again = gradients(low, case.x.float(), case.labels)
    assert all(torch.isfinite(each).all() for each in again)
    bound = 5e-2 if regime in ("aligned", "antipodal") else 2e-3
    assert relative_error(again[0], found[0]) < bound
    if regime != "aligned":  # where the true gradient by x is 0
        assert relative_error(again[1], found[1]) < bound


# ---- constructor and state -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_parameter(kind):
    torch.manual_seed(5)
    loss = kind(num_classes=C, embedding_size=D)
    torch.manual_seed(5)
    assert torch.equal(loss.W, torch.empty(D, C * loss.rows).normal_())
    assert list(loss.state_dict()) == ["W"]
    assert [name for name, _ in loss.named_parameters()] == ["W"]
    filled = kind(C, D, weight_init_func=lambda w: nn.init.constant_(w, 0.5))
    assert bool((filled.W == 0.5).all())
    if kind is SubCenterArcFaceLoss:  # where keyword arguments are dropped
        kept = kind(C, D, weight_init_func=lambda w: nn.init.zeros_(w), faithful=True)
        assert kept.W.any()


def test_margin_is_in_degrees_and_then_in_radians():
    assert ArcFaceLoss(C, D).margin == math.radians(28.6)
    assert SubCenterArcFaceLoss(C, D, 30).margin == math.radians(30)
    assert CosFaceLoss(C, D).margin == 0.35
    assert SphereFaceLoss(C, D, 2.0).margin == 2


@pytest.mark.parametrize("kind", ALL)
def test_w_keeps_its_type(kind):
    x, labels = batch(torch.float16)
    loss = kind(num_classes=C, embedding_size=D)
    value = loss(x, labels)
    value.backward()
    assert loss.W.dtype == loss.W.grad.dtype == value.dtype == torch.float32
    assert x.grad.dtype == torch.float16 and x.grad.any()
    wide = kind(num_classes=C, embedding_size=D)
    wide.load_state_dict(loss.state_dict())
    assert relative_error(value, wide(x.detach().float(), labels)) < 1e-6
    original = kind(num_classes=C, embedding_size=D, faithful=True)
    original.get_logits(x.detach())
    assert original.W.dtype == torch.float16


@pytest.mark.parametrize("kind", ALL)
def test_zero_embedding(kind):
    x, labels = batch()
    with torch.no_grad():
        x[2] = 0
    loss = kind(num_classes=C, embedding_size=D).double()
    _, d_x, d_weight = gradients(loss, x, labels)
    assert not d_x[2].any() or kind is SphereFaceLoss
    assert torch.isfinite(d_x).all() and torch.isfinite(d_weight).all()


# ---- reducers, regularisers, statistics ----------------------------------------------------------


def mean_square(rows):
    return rows.square().mean()


@pytest.mark.parametrize("kind", ALL)
def test_regularisers_and_reducers(kind):
    x, labels = batch()
    torch.manual_seed(0)
    plain = kind(C, D).double()
    options = {
        "weight_regularizer": mean_square,
        "weight_reg_weight": 0.3,
        "embedding_regularizer": lambda rows: rows.abs().mean(),
        "embedding_reg_weight": 0.2,
    }
    more = 0.3 * plain.W.square().mean() + 0.2 * x.abs().mean()
    rows = kind(C, D, reducer=DoNothingReducer()).double()
    rows.load_state_dict(plain.state_dict())
    losses = rows(x, labels)["loss"]["losses"]
    torch.testing.assert_close(plain(x, labels), losses.mean())
    for reducer, expected in ((None, losses.mean()), (AboveOne(), losses[losses > 1].mean())):
        alone = kind(C, D, reducer=reducer).double()
        loss = kind(C, D, reducer=reducer, **options).double()
        for each in (alone, loss):
            each.load_state_dict(plain.state_dict())
        torch.testing.assert_close(alone(x, labels), expected)
        value = loss(x, labels)
        torch.testing.assert_close(value, expected + more)
        assert alone.reducer is not reducer  # it has a copy of its own
    value.backward()
    assert torch.isfinite(loss.W.grad).all()
    parts = kind(C, D, reducer=DoNothingReducer(), **options)(x.float(), labels)
    assert set(parts) == {"loss", "weight_reg_loss", "embedding_reg_loss"}
    assert set(parts) == set(loss.sub_loss_names())
    assert parts["loss"]["reduction_type"] == "element"
    assert parts["weight_reg_loss"]["reduction_type"] == "already_reduced"


@pytest.mark.parametrize("kind", [ArcFaceLoss, CosFaceLoss, SphereFaceLoss, SubCenterArcFaceLoss])
def test_statistics(kind):
    x, labels = batch()
    loss = kind(C, D, collect_stats=True).double()
    loss(x, labels)
    cosine = F.normalize(x) @ F.normalize(loss.W, dim=0)
    cosine = cosine.unflatten(1, (C, loss.rows)).max(2).values
    expected = cosine.gather(1, labels[:, None]).acos().rad2deg().mean()
    assert math.isclose(loss.avg_angle, expected.item(), rel_tol=1e-9)
    assert loss._record_these_stats == ["avg_angle"]
    assert all(hasattr(loss, name) for name in loss._record_these)
    assert kind(C, D)._record_these_stats == []


def test_outliers():
    g = torch.Generator().manual_seed(0)
    loss = SubCenterArcFaceLoss(num_classes=5, embedding_size=D, sub_centers=3).double()
    x = torch.randn(60, D, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 4, (60,), generator=g)  # none of class 4
    with torch.no_grad():
        x[:30] += 2 * loss.W[:, labels[:30] * 3 + 1].t()
    for threshold in (75, 60):
        expected = []
        rows, centres = loss.get_outliers(x, labels, threshold, return_dominant_centers=False)
        for c in range(4):
            own = loss.W[:, 3 * c : 3 * c + 3].detach()
            members = (labels == c).nonzero().flatten()
            cosine = F.normalize(x[members]) @ F.normalize(own, dim=0)
            most = torch.bincount(cosine.argmax(1), minlength=3).argmax()
            torch.testing.assert_close(centres[:, c], own[:, most])
            far = cosine[:, most].clamp(-1, 1).acos() > math.radians(threshold)
            expected += members[far].tolist()
        assert rows.tolist() == expected and 0 < len(expected) < 60
        assert not centres[:, 4].any()


# ---- bad input -----------------------------------------------------------------------------------


class LpDistance:
    p, power, is_inverted = 2, 1, False


@pytest.mark.parametrize("kind", ALL)
def test_bad_input(kind):
    x, labels = batch(torch.float32)
    loss = kind(num_classes=C, embedding_size=D)
    for error, words, args in (
        (TypeError, "embeddings must be a tensor", ([[0.0]], labels)),
        (ValueError, r"embeddings must have shape \(B, 10\)", (x[:, :5], labels)),
        (TypeError, "embeddings.float", (x.detach().long(), labels)),
        (ValueError, "labels are required", (x,)),
        (ValueError, r"labels must have shape \(B,\)", (x, labels[:, None])),
        (ValueError, r"labels must have shape \(12,\)", (x, labels[:5])),
        (TypeError, "labels.long", (x, labels.float())),
        (ValueError, r"labels must be in \[0, 31\), found 31", (x, labels + 1)),
        (ValueError, "found -1", (x, labels.clone().fill_(-1))),
        (ValueError, "ref_emb", (x, labels, None, x.clone(), labels)),
        (ValueError, "ref_emb", (x, labels, None, x, labels.clone())),
    ):
        with pytest.raises(error, match=words):
            loss(*args)
    loss(x, labels, None, x, labels)
    with pytest.raises(ValueError, match=r"distance must be CosineSimilarity"):
        kind(C, D, distance=LpDistance())
    with pytest.raises(TypeError, match="unexpected keyword"):
        kind(C, D, margins=3)
    with pytest.raises(ValueError, match="at least 1"):
        kind(0, D)


def test_bad_numbers():
    for make, words in (
        (lambda: ArcFaceLoss(C, D, margin=200), "degrees"),
        (lambda: SphereFaceLoss(C, D, margin=0), "at least 1"),
        (lambda: CosFaceLoss(C, D, scale=0), "scale must be positive"),
        (lambda: NormalizedSoftmaxLoss(C, D, temperature=0), "temperature"),
        (lambda: SubCenterArcFaceLoss(C, D, sub_centers=0), "sub_centers"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


# ---- the training loop ---------------------------------------------------------------------------


def hardest_pairs(embeddings, labels):
    """A miner: of every row, the nearest row of another class and the farthest of its own."""
    cosine = F.normalize(embeddings) @ F.normalize(embeddings).t()
    same = labels[:, None] == labels
    anchors = torch.arange(len(labels))
    positives = torch.where(same, cosine, 2.0).argmin(1)
    return anchors, positives, anchors, torch.where(same, -2.0, cosine).argmax(1)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("mining", [None, hardest_pairs])
def test_training_loop(kind, mining, never_dense):
    """As the package's readme has it; it learns, and no (B, C) logits are computed."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    prototypes = torch.randn(6, 8, generator=g)
    loader = []
    for _ in range(60):
        labels = torch.randint(0, 6, (16,), generator=g)
        loader.append((prototypes[labels] + 0.3 * torch.randn(16, 8, generator=g), labels))
    model = nn.Linear(8, D)
    options = {"scale": 8} if "ArcFace" in kind.__name__ or kind is CosFaceLoss else {}
    loss_func = kind(num_classes=6, embedding_size=D, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    loss_optimizer = torch.optim.Adam(loss_func.parameters(), lr=0.05)
    history = []
    for data, labels in loader:
        optimizer.zero_grad()
        loss_optimizer.zero_grad()
        embeddings = model(data)
        pairs = mining(embeddings, labels) if mining else None
        loss = loss_func(embeddings, labels, pairs)
        loss.backward()
        optimizer.step()
        loss_optimizer.step()
        history.append(float(loss.detach()))
    assert sum(history[-5:]) < 0.5 * sum(history[:5])
    data, labels = loader[0]
    assert (loss_func.get_logits(model(data)).argmax(1) == labels).float().mean() > 0.9


# ---- with the package itself, where it is installed ----------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_the_package_itself(kind):
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

    x, labels = batch()
    labels = labels % 4
    given = [
        {},
        {"reducer": reducers.AvgNonZeroReducer()},
        {"reducer": reducers.ThresholdReducer(low=1.0)},
        {"reducer": reducers.MultipleReducers({"loss": reducers.MeanReducer()})},
        {"reducer": reducers.ClassWeightedReducer(torch.rand(C))},
        {"distance": distances.CosineSimilarity()},
        {
            "weight_regularizer": regularizers.RegularFaceRegularizer(),
            "embedding_regularizer": regularizers.LpRegularizer(),
            "embedding_reg_weight": 0.1,
            "reducer": reducers.MeanReducer(),
        },
    ]
    if kind is NormalizedSoftmaxLoss:
        raw = distances.DotProductSimilarity(normalize_embeddings=False)
        given.append({"distance": raw})
    for options in given[:1] if kind is SubCenterArcFaceLoss else given:
        theirs = getattr(losses, kind.__name__)(num_classes=C, embedding_size=D, **options)
        ours = kind(num_classes=C, embedding_size=D, **options)
        ours.load_state_dict(theirs.double().state_dict())
        theirs.load_state_dict(ours.double().state_dict())
        for miner in (None, miners.TripletMarginMiner(), miners.MultiSimilarityMiner()):
            pairs = miner(x, labels) if miner else None
            found = gradients(ours, x, labels, pairs)
            for mine, truth in zip(found, gradients(theirs, x, labels, pairs), strict=True):
                assert relative_error(mine, truth) < 1e-9
        assert relative_error(ours.get_logits(x).dense(), theirs.get_logits(x)) < 1e-9
