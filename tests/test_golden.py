"""Values recorded from the official implementations, in float64.

``tests/golden`` holds a small set; ``FASTMARGIN_GOLDEN`` (default: ``shared/golden`` beside the
checkout) may name a folder with more.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ON_CPU, device_for

from fastmargin.functional import loss_and_rows, margin_loss
from fastmargin.margins import (
    NPT,
    AdaFace,
    ArcFace,
    CosFace,
    CurricularFace,
    Filtered,
    KappaFace,
    MagFace,
    SoftmaxMargin,
)
from fastmargin.margins.guards import add_angle

HERE = Path(__file__).parent
MORE = Path(os.environ.get("FASTMARGIN_GOLDEN", HERE.parents[1] / "shared" / "golden"))
FILES = {path.stem: path for folder in (MORE, HERE / "golden") for path in folder.glob("*.npz")}


class Elastic(SoftmaxMargin):
    """ElasticFace, each row with the margin it drew."""

    def __init__(self, s, drawn, angular):
        super().__init__(s)
        self.drawn, self.angular = torch.from_numpy(drawn), angular

    def forward(self, cos_y, norm, labels):
        if self.angular:
            return add_angle(cos_y, self.drawn, "none", "exact")
        return cos_y - self.drawn


def filtered(margin, hyper):
    """The margin under insightface's inter-class filter, where that is on."""
    threshold = hyper.get("interclass_filtering_threshold", 0)
    return Filtered(margin, threshold) if threshold else margin


def build(family, hyper, file):
    """The margin that a family's recorded numbers belong to, or None if there is none."""
    s = hyper.get("s", hyper.get("scale", 64.0))
    if family == "adaface_official":
        return AdaFace(**hyper)
    if family == "cvlface_adaface_fc" or (family == "cvlface_pfc_adaface"):
        hyper = {k: hyper[k] for k in ("m", "h", "s", "t_alpha")}
        return AdaFace(**hyper, guard="none", grad="straight_through", cos_eps=0.0)
    if family == "arcface_adafacerepo":
        return ArcFace(hyper["m"], s, guard="clip", cos_eps=1e-4, angle_eps=1e-4)
    if family == "arcface_curricularrepo":
        return ArcFace(hyper["m"], s, guard="mm")
    if family == "arcface_elasticrepo":
        return ArcFace(hyper["m"], s, guard="none")
    if family == "pml_arcface":
        return ArcFace(math.radians(hyper["margin"]), s, guard="mm")
    if family in ("insightface_arcface", "insightface_combined_arc", "insightface_pfc_arc"):
        kwargs = {
            "m": hyper.get("m2", hyper.get("m")),
            "s": s,
            "guard": "none",
            "grad": "straight_through",
        }
        return filtered(ArcFace(**kwargs), hyper)
    if family in ("insightface_pfc_cos", "insightface_combined_cos"):
        return filtered(CosFace(hyper["m3"], s), hyper)
    if family == "cosface_adafacerepo":
        return CosFace(hyper["m"], s, cos_eps=1e-4)
    if family in ("cosface_elasticrepo", "insightface_cosface"):
        return CosFace(hyper["m"], s)
    if family == "pml_cosface":
        return CosFace(hyper["margin"], s)
    if family == "pml_normalized_softmax":
        return CosFace(0.0, 1 / hyper["temperature"])
    if family == "kappaface_loss":
        return KappaFace(m=hyper["m"], s=s, guard="none")
    if family == "npt":
        return NPT(hyper["delta"], hyper["top_k"], hyper["r"], zero_slot=True)
    if family == "curricularface":
        margin = CurricularFace(hyper["m"], s).double()
        margin.t.fill_(file["state_before_t"].ravel()[0].item())
        return margin
    if family == "magface":
        guard = "easy" if hyper.pop("easy_margin") else "mm"
        return MagFace(**hyper, guard=guard)
    if family in ("elastic_arcface", "elastic_cosface"):
        return Elastic(s, file["margin"], family == "elastic_arcface")
    return None


SKIP = {
    "rate": "sampled classes: this test has all of them",
    "only_positives": "sampled classes: this test has all of them",
    "label_minus1": "-1 is a row to ignore here, a row that repels every class there",
    "zero_embedding": "a zero row has zero gradient here, 1e12 times the upstream one there",
    "single_sample": "a batch of one poisons the statistics there and not here",
}


def case_names():
    families = "adaface cvlface arcface cosface elasticrepo insightface pml_ kappaface_loss npt"
    families = (*families.split(), "curricular", "magface")
    for name in sorted(FILES):
        family = name.split("__")[0]
        if not any(part in family for part in families):
            continue
        if "sphere" in family or "subcenter" in family or "pfc_margin" in family:
            continue
        skip = next((k for k in SKIP if k in name.replace("rate1", "")), None)
        if skip is None:
            yield name


def steps(file, meta):
    """Every recorded step as a dict of tensors, ranks of a sharded case merged into one batch."""
    per_run = {"weight", "class_start", "num_local", "meta"}
    arrays = {k: file[k] for k in file.files if k != "meta"}
    count = len(arrays["loss"]) if meta.get("step_axis") else 1
    for i in range(count):
        take = {
            k: torch.from_numpy(np.array(v[i] if meta.get("step_axis") and k not in per_run else v))
            for k, v in arrays.items()
        }
        if "class_start" in take:
            ranks = take["loss"].numel()
            take["embeddings"] = take["embeddings"].flatten(0, 1)
            take["labels"] = take["labels"].flatten()
            take["grad_embeddings"] = take["grad_embeddings"].flatten(0, 1) / ranks
            take["loss"] = take["loss"].flatten()[0]
        yield take


def ordinary_rows(meta, record):
    """Rows to compare: finite there, not exactly at +-1, no wrong class at the official clamps."""
    mask = torch.isfinite(record["grad_embeddings"]).all(1)
    if meta.get("guard"):
        mask[{"near": [8, 9], "exact": [0, 1, 2, 3]}[meta["guard"]]] = False
    return mask


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", case_names())
def test_official_values(name, backend):
    device_for(backend)
    file = np.load(FILES[name])
    meta = json.loads(str(file["meta"][0]))
    weight = torch.from_numpy(file["weight"])
    if meta["weight_layout"] == "DC":
        weight = weight.t()  # strided, as the official code keeps it
    margin = build(meta["family"], meta["hyper"], file)
    margin.bind(*weight.shape)
    margin.double()
    if "class_weights" in file.files:
        margin.class_weights.copy_(torch.from_numpy(file["class_weights"]))
    for record in steps(file, meta):
        x = record["embeddings"].requires_grad_()
        w = weight.detach().requires_grad_()
        if hasattr(margin, "batch_mean"):
            torch.testing.assert_close(margin.batch_mean, record["state_before_batch_mean"])
        loss, rows = loss_and_rows(x, w, record["labels"], margin, "mean", backend)
        loss.backward()
        compare(meta, record, rows, loss, x.grad, w.grad)
        for key, value in record.items():
            if key.startswith("state_after_"):
                state = getattr(margin, key.removeprefix("state_after_"))
                torch.testing.assert_close(state, value, rtol=1e-12, atol=1e-12)


def compare(meta, record, rows, loss, dx, dw):
    ordinary = ordinary_rows(meta, record)
    per_row = record["loss_per_sample"]
    capped = rows.loss.clamp_max(-math.log(1e-30)) if "pfc" in meta["family"] else rows.loss
    if meta["family"] == "magface":
        per_row = None
    close = {"rtol": 1e-9, "atol": 1e-11}
    if per_row is not None:
        torch.testing.assert_close(capped[ordinary], per_row[ordinary], **close)
    # near +-1 the rounding of cos_y is multiplied by 1 / sin(theta)^2 = 5e8, in the record too
    size = record["grad_embeddings"][ordinary].norm(dim=1)
    error = (dx - record["grad_embeddings"])[ordinary].norm(dim=1)
    assert (error <= (1e-5 if meta.get("guard") else 1e-9) * size + 1e-11).all(), error / size
    assert torch.isfinite(dx).all() and torch.isfinite(dw).all()
    if not bool(ordinary.all()):
        return  # the other rows are part of the mean and of the weights' gradient
    if bool((rows.loss < 69).all()):
        torch.testing.assert_close(loss, record["loss"], **close)
    dw = dw.detach()
    if "grad_weight" in record or "grad_weight_f32" in record:
        exact = "grad_weight" in record
        expected = record["grad_weight" if exact else "grad_weight_f32"].double()
        expected = expected.t() if meta["weight_layout"] == "DC" else expected
        torch.testing.assert_close(
            dw, expected, **(close if exact else {"rtol": 1e-6, "atol": 1e-9})
        )
    else:
        index = record["grad_weight_row_index"]
        torch.testing.assert_close(dw[index], record["grad_weight_rows"], **close)
        torch.testing.assert_close(dw @ record["probe"], record["grad_weight_times_probe"], **close)


def kappa_names(*tags):
    return [n for n in sorted(FILES) if n.startswith(tags)]


@pytest.mark.parametrize("name", kappa_names("kappaface_memory", "kappaface_momentumhead"))
def test_kappaface_epochs(name):
    """Class sums, concentration and weights of two epochs, with and without memory bank."""
    file = np.load(FILES[name])
    meta = json.loads(str(file["meta"][0]))
    counts = torch.from_numpy(file["class_counts"])
    labels = torch.from_numpy(file["labels"])
    memory = "memory_initial" in file.files
    margin = KappaFace(
        temperature=meta["hyper"]["T"],
        gamma=meta["hyper"]["gamma"],
        class_counts=counts,
        features="memory" if memory else "momentum",
        num_samples=len(labels) if memory else None,
        memory_momentum=meta["hyper"].get("momentum", 0.9),
    )
    margin.bind(len(counts), file["ep0_features"].shape[1])
    margin.double()
    if memory:
        margin.memory.copy_(torch.from_numpy(file["memory_initial"]))
        margin.memory_filled.fill_(True)
    for epoch in ("ep0", "ep1"):
        features = torch.from_numpy(file[f"{epoch}_features"])
        for index in torch.from_numpy(file[f"{epoch}_order"]).split(meta["batch_size"]):
            margin.accumulate(features[index], labels[index], index if memory else None)
        torch.testing.assert_close(margin.class_sums, torch.from_numpy(file[f"{epoch}_class_sums"]))
        if memory:
            torch.testing.assert_close(
                margin.memory, torch.from_numpy(file[f"{epoch}_memory_after"])
            )
        margin.end_epoch()
        kappa = torch.from_numpy(file[f"{epoch}_kappa"])
        weights = torch.from_numpy(file[f"{epoch}_class_weights"])
        single = "single" in name
        torch.testing.assert_close(
            margin.kappa[: -1 if single else None], kappa[: -1 if single else None]
        )
        if not single:
            torch.testing.assert_close(margin.class_weights, weights, rtol=1e-6, atol=1e-6)
            continue
        # the class of one image has no kappa; the official value flattens everybody's weights
        assert margin.kappa[-1] == margin.kappa[:-1].max()
        by_kappa = 1 - torch.sigmoid(meta["hyper"]["T"] * standardised(margin.kappa[:-1]))
        by_count = torch.from_numpy(file[f"{epoch}_sample_weights"])[:-1].double()
        gamma = meta["hyper"]["gamma"]
        expected = gamma * by_kappa + (1 - gamma) * by_count
        torch.testing.assert_close(margin.class_weights[:-1], expected, rtol=1e-6, atol=1e-6)


def standardised(values):
    return (values - values.mean()) / values.std()


@pytest.mark.parametrize("name", kappa_names("kappaface_pfc"))
def test_kappaface_sharded_by_global_label(name):
    """One rank reproduces the official layer; with more it reads the wrong classes' weights."""
    file = np.load(FILES[name])
    meta = json.loads(str(file["meta"][0]))
    record = next(steps(file, meta))
    margin = KappaFace(m=meta["hyper"]["m"], s=meta["hyper"]["s"], guard="none")
    weight = torch.from_numpy(file["weight"])
    margin.bind(*weight.shape)
    margin.double()
    margin.class_weights.copy_(torch.from_numpy(file["class_weights"]))
    x = record["embeddings"].requires_grad_()
    margin_loss(x, weight, record["labels"], margin, backend="reference").backward()
    first = record["labels"] < int(record["num_local"].flatten()[0])
    expected = record["grad_embeddings"]
    torch.testing.assert_close(x.grad[first], expected[first], rtol=1e-9, atol=1e-11)
    if (~first).any():
        assert (x.grad - expected)[~first].abs().max() > 1e-4


def test_a_small_set_is_committed():
    families = {path.stem.split("__")[0] for path in (HERE / "golden").glob("*.npz")}
    needed = {"adaface_official", "cvlface_adaface_fc", "arcface_adafacerepo", "kappaface_loss"}
    needed |= {"kappaface_memory", "kappaface_momentumhead", "npt", "insightface_pfc_arc"}
    needed |= {"insightface_pfc_cos", "curricularface", "magface", "pml_arcface"}
    assert needed <= families
