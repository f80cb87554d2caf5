"""The heads of the AdaFace repository: its recorded values, its training step, what differs."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_golden import FILES, steps
from torch import nn

from fastmargin.compat import adaface as head
from fastmargin.compat.logits import StreamedLogits
from fastmargin.compat.scores import CentreScores
from fastmargin.testing import relative_error

HEADS = {
    "adaface_official": head.AdaFace,
    "arcface_adafacerepo": head.ArcFace,
    "cosface_adafacerepo": head.CosFace,
}


def recorded():
    return [name for name in sorted(FILES) if name.split("__")[0] in HEADS]


def make(name, dtype, **options):
    file = np.load(FILES[name])
    meta = json.loads(str(file["meta"][0]))
    size, classes = file["weight"].shape
    made = HEADS[meta["family"]](size, classes, **meta["hyper"], **options).to(dtype)
    with torch.no_grad():
        made.kernel.copy_(torch.from_numpy(file["weight"]))
    return made, meta, list(steps(file, meta))


def forward(made, record, dtype):
    """The logits of raw embeddings, as the repository's backbones hand them over."""
    raw = record["embeddings"].to(dtype).requires_grad_()
    norm = torch.norm(raw, 2, 1, True)
    return raw, made(raw / norm, norm, record["labels"])


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", recorded())
def test_recorded_values(name, faithful):
    made, meta, records = make(name, torch.float64, faithful=faithful)
    guard = meta.get("guard")
    special = {"near": [8, 9], "exact": [0, 1, 2, 3], None: []}[guard]
    for record in records:
        if "single_sample" in name and not faithful:
            pytest.skip("a batch of one: tested below")
        raw, logits = forward(made, record, torch.float64)
        assert isinstance(logits, StreamedLogits) != faithful
        rows = F.cross_entropy(logits, record["labels"], reduction="none")
        made.zero_grad()
        loss = F.cross_entropy(logits, record["labels"])
        loss.backward()
        keep = torch.ones(len(raw), dtype=torch.bool)
        if not faithful:  # rows on the official clamp of cosines with other classes
            keep[special] = False
        close = {"rtol": 1e-9, "atol": 1e-10, "equal_nan": faithful}
        torch.testing.assert_close(rows[keep], record["loss_per_sample"][keep], **close)
        if "logits" in record:
            dense = logits if faithful else logits.dense()
            torch.testing.assert_close(dense[keep], record["logits"][keep], **close)
        size = record["grad_embeddings"][keep].norm(dim=1)
        error = (raw.grad - record["grad_embeddings"])[keep].norm(dim=1)
        allowed = (1e-5 if guard else 1e-9) * size + 1e-10
        assert ((error <= allowed) | (size.isnan() & faithful)).all(), error / size
        if bool(keep.all()):
            torch.testing.assert_close(loss, record["loss"], **close)
            compare_centres(made.kernel.grad, record, close, guard)
        for key, value in record.items():
            if key.startswith("state_after_"):
                state = getattr(made, key.removeprefix("state_after_"))
                torch.testing.assert_close(state, value, rtol=1e-6, atol=0, equal_nan=True)


def compare_centres(grad, record, close, guard):
    if guard:
        close = {**close, "rtol": 1e-5}
    for key, options in (("grad_weight", close), ("grad_weight_f32", {"rtol": 1e-6, "atol": 1e-9})):
        if key in record:
            torch.testing.assert_close(grad, record[key].to(grad), **options)
    if "grad_weight_rows" in record:
        rows = grad.t()
        torch.testing.assert_close(
            rows[record["grad_weight_row_index"]], record["grad_weight_rows"], **close
        )
        torch.testing.assert_close(
            rows @ record["probe"], record["grad_weight_times_probe"], **close
        )


@pytest.mark.parametrize("name", recorded())
def test_recorded_values_in_float32(name):
    """Within the error of plain PyTorch in float32, which is that of ``faithful``."""
    if make(name, torch.float32)[1]["guard"] or "single" in name:
        pytest.skip("rows at the official clamps: tested in float64")
    errors = []
    for faithful in (False, True):
        made, _, records = make(name, torch.float32, faithful=faithful)
        record = records[0]
        raw, logits = forward(made, record, torch.float32)
        F.cross_entropy(logits, record["labels"]).backward()
        truth = record["grad_embeddings"]
        errors.append(float((raw.grad.double() - truth).norm() / truth.norm()))
    assert errors[0] <= 2 * errors[1] + 1e-6


@pytest.mark.parametrize("kind", HEADS.values())
@pytest.mark.parametrize(("batch", "size", "classes", "s"), [(7, 24, 130, 30.0), (40, 8, 9, 64.0)])
def test_other_shapes_against_the_original(kind, batch, size, classes, s):
    """Three steps of SGD side by side with ``faithful``, the state included."""
    fused = kind(size, classes, s=s, m=0.35).double()
    plain = kind(size, classes, s=s, m=0.35, faithful=True).double()
    plain.load_state_dict(fused.state_dict())
    sgd = [torch.optim.SGD(h.parameters(), lr=0.5, momentum=0.9) for h in (fused, plain)]
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        raw = torch.randn(batch, size, generator=g, dtype=torch.float64) * 5
        label = torch.randint(0, classes, (batch,), generator=g)
        norm = raw.norm(dim=1, keepdim=True)
        losses = []
        for made, optimiser in zip((fused, plain), sgd, strict=True):
            loss = F.cross_entropy(made(raw / norm, norm, label), label)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-6, atol=1e-8)


# ---- the training script, its import changed ----------------------------------------------------


class Backbone(nn.Module):
    """Returns unit embeddings and their lengths, as ``net.py`` there does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.PReLU(), nn.Linear(32, 16))

    def forward(self, images):
        embedding = self.layers(images)
        norm = torch.norm(embedding, 2, 1, True)
        return embedding / norm, norm


class Trainer(nn.Module):
    """The step of ``train_val.py``, with what Lightning does around it."""

    def __init__(self, **options):
        super().__init__()
        self.model = Backbone()
        self.head = head.build_head(
            head_type="adaface",
            embedding_size=16,
            class_num=40,
            m=0.4,
            h=0.333,
            t_alpha=0.01,
            s=64.0,
            **options,
        )
        self.cross_entropy_loss = nn.CrossEntropyLoss()

    def forward(self, images, labels):
        embeddings, norms = self.model(images)
        cos_thetas = self.head(embeddings, norms, labels)
        if isinstance(cos_thetas, tuple):
            cos_thetas, bad = cos_thetas
            labels[bad.squeeze(-1)] = -100
        return cos_thetas, norms, embeddings, labels

    def training_step(self, batch):
        images, labels = batch
        cos_thetas, _, _, labels = self.forward(images, labels)
        return self.cross_entropy_loss(cos_thetas, labels)


def train(trainer, steps=8):
    optimiser = torch.optim.SGD(
        [
            {"params": list(trainer.model.parameters()), "weight_decay": 5e-4},
            {"params": [trainer.head.kernel], "weight_decay": 5e-4},
        ],
        lr=0.1,
        momentum=0.9,
    )
    losses = []
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        batch = torch.randn(24, 3, 4, 4, generator=g), torch.randint(0, 40, (24,), generator=g)
        loss = trainer.training_step(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def test_the_training_step(monkeypatch):
    torch.manual_seed(3)
    plain = Trainer(faithful=True)
    fused = Trainer()
    fused.load_state_dict(plain.state_dict())
    expected = train(plain)

    def refuse(self):
        raise AssertionError("all logits were computed")

    monkeypatch.setattr(CentreScores, "dense", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = train(fused)
    assert found == pytest.approx(expected, rel=1e-3)
    # of all centres: eight steps amplify the rounding of single entries
    assert relative_error(fused.head.kernel.detach(), plain.head.kernel.detach()) < 1e-3
    assert set(fused.state_dict()) == set(plain.state_dict())


def test_names_and_shapes():
    made = head.AdaFace(embedding_size=16, classnum=40)
    assert {k: tuple(v.shape) for k, v in made.state_dict().items()} == {
        "kernel": (16, 40),
        "t": (1,),
        "batch_mean": (1,),
        "batch_std": (1,),
    }
    assert float(made.batch_mean) == 20 and float(made.batch_std) == 100
    torch.testing.assert_close(made.kernel.norm(dim=0), torch.ones(40))
    assert (made.m, made.h, made.s, made.t_alpha) == (0.4, 0.333, 64.0, 1.0)
    for kind in (head.ArcFace, head.CosFace):
        made = kind(16, 40)
        assert {k: tuple(v.shape) for k, v in made.state_dict().items()} == {"kernel": (16, 40)}
        torch.testing.assert_close(made.kernel.norm(dim=0), torch.ones(40))
    assert isinstance(head.build_head("cosface", 16, 40, 0.3, 1.0, 0.3, 32.0), head.CosFace)


# ---- what differs by default --------------------------------------------------------------------


def step_of(made, batch=6, seed=0, labels=None):
    g = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(batch, 16, generator=g))
    norms = torch.rand(batch, 1, generator=g) * 20
    labels = torch.randint(0, 40, (batch,), generator=g) if labels is None else labels
    return F.cross_entropy(made(x, norms, labels), labels)


def test_a_batch_of_one():
    fused, plain = head.AdaFace(16, 40), head.AdaFace(16, 40, faithful=True)
    assert torch.isfinite(step_of(fused, 1)) and float(fused.batch_std) == 100
    assert torch.isnan(step_of(plain, 1)) and torch.isnan(plain.batch_std)


def test_eval_leaves_the_statistics():
    fused, plain = head.AdaFace(16, 40).eval(), head.AdaFace(16, 40, faithful=True).eval()
    step_of(fused), step_of(plain)
    assert float(fused.batch_mean) == 20 and float(plain.batch_mean) != 20


def test_gradients_where_cosines_are_one():
    """Another class at cosine 1 repels here; there the clamp takes its gradient away."""
    found = []
    for faithful in (False, True):
        made = head.CosFace(4, 3, s=8.0, m=0.1, faithful=faithful)
        with torch.no_grad():
            made.kernel.copy_(torch.eye(4)[:, :3])
        x = torch.tensor([[0.0, 1.0, 0.0, 0.0]], requires_grad=True)
        label = torch.tensor([0])
        F.cross_entropy(made(x, x.new_ones(1, 1), label), label).backward()
        found.append(float(x.grad[0, 1]))
    assert found[0] > 1 and found[1] == 0


def test_a_column_of_zeros():
    for faithful in (False, True):
        made = head.ArcFace(16, 40, faithful=faithful)
        with torch.no_grad():
            made.kernel[:, 5] = 0
        loss = step_of(made)
        loss.backward()
        assert bool(torch.isfinite(loss)) != faithful
        assert bool(torch.isfinite(made.kernel.grad).all()) != faithful


def test_rows_longer_than_one():
    made = head.AdaFace(16, 40)
    x, norms, labels = torch.randn(6, 16), torch.ones(6, 1), torch.arange(6)
    made.eval()
    torch.testing.assert_close(
        made(20 * x, norms, labels).dense(), made(F.normalize(x), norms, labels).dense()
    )


def test_the_logits_keep_the_statistics_they_were_made_with():
    """Two forwards before the losses, as gradient accumulation by hand may have it."""
    made = head.AdaFace(16, 40, t_alpha=1.0)
    x, labels = F.normalize(torch.randn(6, 16)), torch.arange(6)
    first = made(x, torch.rand(6, 1) * 20, labels)
    expected = F.cross_entropy(copy_of(first), labels)
    made(x, torch.rand(6, 1) * 50, labels)
    torch.testing.assert_close(F.cross_entropy(first, labels), expected)


def copy_of(logits):
    return logits.dense().detach().clone()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"label": torch.zeros(6)}, TypeError, "label must be int64"),
        ({"label": torch.full((6,), 40)}, ValueError, r"label must be in \[0, 40\), found 40"),
        ({"label": torch.full((6,), -1)}, ValueError, r"found -1"),
        ({"label": torch.zeros(5, dtype=torch.int64)}, ValueError, r"label must have shape \(6,\)"),
        ({"embbedings": torch.randn(6, 15)}, ValueError, r"embbedings must have shape \(B, 16\)"),
        ({"norms": torch.ones(5, 1)}, ValueError, r"norms must be a tensor of shape \(6, 1\)"),
    ],
)
@pytest.mark.parametrize("faithful", [False, True])
def test_misuse_changes_nothing(change, error, match, faithful):
    made = head.AdaFace(16, 40, faithful=faithful)
    arguments = {
        "embbedings": F.normalize(torch.randn(6, 16)),
        "norms": torch.rand(6, 1),
        "label": torch.arange(6),
    }
    with pytest.raises(error, match=match):
        made(**{**arguments, **change})
    assert float(made.batch_mean) == 20


def test_wrong_sizes_and_names():
    with pytest.raises(ValueError, match="embedding_size and classnum must be at least 1"):
        head.AdaFace(0, 40)
    with pytest.raises(ValueError, match="head_type must be"):
        head.build_head("magface", 16, 40, 0.4, 1.0, 0.333, 64.0)


def test_compiled():
    made = head.AdaFace(16, 40)
    x, labels = F.normalize(torch.randn(6, 16)), torch.arange(6)
    made.eval()
    eager = F.cross_entropy(made(x, torch.ones(6, 1), labels), labels)

    @torch.compile(backend="eager")
    def step(x, norms, labels):
        return F.cross_entropy(made(x, norms, labels), labels)

    torch.testing.assert_close(step(x, torch.ones(6, 1), labels), eager)


def test_autocast():
    made = head.AdaFace(16, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = step_of(made)
    assert loss.dtype == torch.float32
    loss.backward()
    assert made.kernel.grad.dtype == torch.float32
