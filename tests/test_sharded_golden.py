"""Values recorded from official model-parallel heads, on as many processes as they had."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import run
from test_golden import FILES, build, compare, steps

import fastmargin as fm
from fastmargin.sampling import Sample

pytestmark = pytest.mark.dist

DIFFERENT = {
    "label_minus1": "-1 is a row to ignore here, a row that repels every class there",
    "zero_embedding": "a zero row has zero gradient here, 1e12 times the upstream one there",
}
NAMES = [
    name
    for name in sorted(FILES)
    if "_pfc" in name.split("__")[0] and not any(tag in name for tag in DIFFERENT)
]


class Recorded(torch.nn.Module):
    """A sampler that draws the classes of the record; CVLface's padding counts as classes."""

    def __init__(self, index, shard):
        super().__init__()
        here = (index >= shard.start) & (index < shard.stop)
        self.index, self.start = index[here] - shard.start, shard.start

    def draw(self, labels, backend):
        own = (labels - self.start)[:, None] == self.index
        column = torch.where(own.any(1), own.int().argmax(1), -1)
        return Sample(self.index, column, own.any(0).sum())


def margin_of(meta, file, weight):
    family, hyper = meta["family"], meta["hyper"]
    if family == "kappaface_pfc":
        margin = fm.KappaFace(m=hyper["m"], s=hyper["s"], guard="none")
        # there a rank reads the table at the label within its shard
        table = [file["class_weights"][:count] for count in file["num_local"]]
        return margin, torch.from_numpy(np.concatenate(table))
    if family == "cvlface_pfc_margin":
        family = "insightface_pfc_arc" if hyper["m3"] == 0 else "insightface_pfc_cos"
    return build(family, hyper, file), None


def recorded_steps(group, name: str):
    """Loss of the own rows, gradients and margin state of every recorded step."""
    file = np.load(FILES[name])
    meta = json.loads(str(file["meta"][0]))
    weight = torch.from_numpy(file["weight"])
    margin, table = margin_of(meta, file, weight)
    head = fm.MarginHead(*weight.shape[::-1], margin, group=group).double()
    if table is not None:
        margin.class_weights.copy_(table)
    head.weight.data.copy_(weight[head.shard.start : head.shard.stop])
    found = []
    for record in steps(file, meta):
        if "class_index" in record:
            head.sampler = Recorded(record["class_index"], head.shard)
        rows = record["labels"].chunk(group.size())[group.rank()]
        x = record["embeddings"].chunk(group.size())[group.rank()].clone().requires_grad_()
        head.weight.grad = None
        loss = head(x, rows)
        loss.backward()
        state = {k: v.clone() for k, v in head.margin.named_buffers() if k.startswith("batch_")}
        head.eval()
        per_row = None
        if not state and "class_index" not in record:
            per_row = head(x.detach(), rows, reduction="none").detach()
        head.train()
        found.append((loss.detach(), per_row, x.grad, head.weight.grad, state))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_official_values(name):
    file = np.load(FILES[name])
    meta = json.loads(str(file["meta"][0]))
    n = len(file["class_start"])
    found = run(n, recorded_steps, name)
    for record, *ranks in zip(steps(file, meta), *found, strict=True):
        losses, per_row, d_x, d_weight, states = zip(*ranks, strict=True)
        assert all(loss == losses[0] for loss in losses)
        if per_row[0] is None:
            # of sampled rows and those that move statistics only the mean is compared
            rows = SimpleNamespace(loss=record["loss_per_sample"])
            record["loss_per_sample"] = None
        else:
            rows = SimpleNamespace(loss=torch.cat(per_row))
            record.setdefault("loss_per_sample")
        compare(meta, record, rows, losses[0], torch.cat(d_x) / n, torch.cat(d_weight))
        for state in states:
            for key, value in state.items():
                torch.testing.assert_close(value, record[f"state_after_{key}"])


@pytest.mark.parametrize("tag", DIFFERENT)
def test_what_differs_from_the_official_values(tag):
    """The row itself gets nothing here; the other rows are as recorded."""
    (name,) = (name for name in FILES if "insightface_pfc" in name and tag in name)
    file = np.load(FILES[name])
    record = next(steps(file, json.loads(str(file["meta"][0]))))
    n = len(file["class_start"])
    ranks = [found[0] for found in run(n, recorded_steps, name)]
    d_x = torch.cat([own[2] for own in ranks]) / n
    odd = record["labels"] < 0 if tag == "label_minus1" else (record["embeddings"] == 0).all(1)
    assert odd.any() and (d_x[odd] == 0).all()
    assert record["grad_embeddings"][odd].abs().max() > 1e-3
    # the mean is over the rows that are not ignored; there over all
    counted = (record["labels"] >= 0).sum() / len(odd)
    torch.testing.assert_close(
        d_x[~odd] * counted, record["grad_embeddings"][~odd], rtol=1e-9, atol=1e-11
    )
    per_row = torch.cat([own[1] for own in ranks])
    torch.testing.assert_close(
        per_row[~odd].clamp_max(-math.log(1e-30)), record["loss_per_sample"][~odd]
    )
