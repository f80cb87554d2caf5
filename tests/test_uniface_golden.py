"""UniFace's recorded values: its softmax is CosFace, its sums of sigmoids run in chunks of classes.

Zhou et al. 2023, "UniFace: Unified Cross-Entropy Loss for Deep Face Recognition". No head of the
package has these losses; that they take a few lines over the same passes is what is tested.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_golden import FILES

import fastmargin as fm
from fastmargin.compat import chunked
from fastmargin.compat.chunked import over_chunks, own_cosine

NAMES = [name for name in sorted(FILES) if name.startswith("uniface_")]


def sigmoids(x, weight, labels, bias, hyper):
    """(B,) of the unified loss (bias (1,)) or the binary one (bias (1, C)); labels are columns."""
    m, s, share = hyper["m"], hyper["s"], hyper["l"]
    bias = bias.flatten()

    def cost(z):
        return -F.logsigmoid(-z.clamp(-s, s))

    def of_others(cosines, first, bias):
        n = cosines.shape[1]
        own = torch.arange(first, first + n) == labels[:, None]
        here = bias if len(bias) == 1 else bias[first : first + n]
        return (torch.where(own, 0, cost(s * cosines - here)).sum(1),)

    unit, centres = F.normalize(x), weight[:, None, :]
    parts = over_chunks(of_others, unit, centres, bias)
    mine = bias if len(bias) == 1 else bias[labels]
    own = cost(-(s * (own_cosine(unit, centres, labels) - m) - mine))
    return torch.where(labels >= 0, own, 0) + share * sum(part for (part,) in parts)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_values(name, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 30)
    file = np.load(FILES[name])
    meta = json.loads(str(file["meta"][0]))
    record = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
    hyper, index = meta["hyper"], record["partial_index"]
    x = record["embeddings"].requires_grad_()
    weight = record["weight"].requires_grad_()
    column = torch.searchsorted(index, record["labels"]).clamp(max=len(index) - 1)
    column = torch.where(index[column] == record["labels"], column, -1)
    if meta["family"] == "uniface_softmax":
        margin = fm.CosFace(hyper["m"], hyper["s"])
        rows = fm.margin_loss(x, weight[index], column, margin, reduction="none")
        leaves = x, weight
    else:
        bias = record["bias"].requires_grad_()
        rows = sigmoids(x, weight[index], column, bias, hyper)
        leaves = x, weight, bias
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(rows, record["loss_per_sample"], **close)
    torch.testing.assert_close(rows.mean(), record["loss"], **close)
    d_x, d_weight, *d_bias = torch.autograd.grad(rows.mean(), leaves)
    torch.testing.assert_close(d_x, record["grad_embeddings"], **close)
    if "grad_weight" in record:
        torch.testing.assert_close(d_weight, record["grad_weight"], **close)
    elif "grad_weight_f32" in record:
        expected = record["grad_weight_f32"].double()
        torch.testing.assert_close(d_weight, expected, rtol=1e-6, atol=1e-9)
    else:
        few = record["grad_weight_row_index"]
        torch.testing.assert_close(d_weight[few], record["grad_weight_rows"], **close)
        probed = d_weight @ record["probe"]
        torch.testing.assert_close(probed, record["grad_weight_times_probe"], **close)
    for found in d_bias:
        torch.testing.assert_close(found, record["grad_bias"], **close)


def test_some_are_committed():
    assert {name.split("__")[0] for name in NAMES} == {
        "uniface_softmax",
        "uniface_bce",
        "uniface_uce",
    }
