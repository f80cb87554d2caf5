"""Recorded steps of model-parallel classifiers, run through those of ``fastmargin.compat``."""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.distributed as dist
from processes import run_world
from test_golden import FILES, steps

from fastmargin.sampling import Sample

LIMIT = 69.0
"""Just below -log(1e-30), the most that a row costs there."""
CLOSE = {torch.float64: (1e-9, 1e-11), torch.float32: (1e-4, 1e-6)}


def describe(name: str):
    """The arrays and the description of a recorded case."""
    file = np.load(FILES[name])
    return file, json.loads(str(file["meta"][0]))


def read(name: str):
    """The same, and its steps."""
    file, meta = describe(name)
    return file, meta, list(steps(file, meta))


def names(*families: str) -> list[str]:
    return [name for name in sorted(FILES) if name.split("__")[0] in families]


class Recorded:
    """A sampler that draws the classes of the record."""

    def __init__(self, index: torch.Tensor, start: int, count: int) -> None:
        here = (index >= start) & (index < start + count)
        self.index, self.start = index[here] - start, start

    def draw(self, labels, backend="auto"):
        own = (labels - self.start)[:, None] == self.index
        column = torch.where(own.any(1), own.int().argmax(1), -1)
        return Sample(self.index, column, own.any(0).sum())


def place() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def everywhere(name: str, function, *args) -> list:
    """``function(None, name, *args)`` on as many processes as the case was recorded on."""
    ranks = len(read(name)[0]["class_start"])
    if ranks == 1:
        return [function(None, name, *args)]
    return run_world(ranks, function, name, *args)


def own_rows(values: torch.Tensor) -> torch.Tensor:
    """This process's part of the gathered rows."""
    rank, ranks = place()
    return values.chunk(ranks)[rank].clone()


def load_rows(weight: torch.Tensor, file) -> None:
    """Puts this process's recorded centres into its weight."""
    rank, _ = place()
    start, count = int(file["class_start"][rank]), int(file["num_local"][rank])
    with torch.no_grad():
        weight.copy_(torch.from_numpy(file["weight"][start : start + count]))


def merged(found: list) -> list[dict]:
    """Steps of all processes as one: loss, embeddings' and centres' gradients, state."""
    result = []
    for ranks in zip(*found, strict=True):
        assert all(torch.equal(rank["loss"], ranks[0]["loss"]) for rank in ranks)
        for key in ranks[0]["state"]:
            assert all(torch.equal(r["state"][key], ranks[0]["state"][key]) for r in ranks)
        result.append({
            "loss": ranks[0]["loss"],
            "d_x": torch.cat([rank["d_x"] for rank in ranks]) / len(ranks),
            "d_weight": torch.cat([rank["d_weight"] for rank in ranks]),
            "state": ranks[0]["state"],
        })  # fmt: skip
    return result


def close(actual, expected, dtype, nan=False) -> None:
    """Relative error of the whole tensor, and NaN in the same places if any are allowed."""
    rtol, atol = CLOSE[dtype]
    actual = actual.detach()
    expected = expected.to(actual.dtype)
    if nan:
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = actual.nan_to_num(), expected.nan_to_num()
    assert actual.shape == expected.shape
    assert bool(actual.isfinite().all())
    error, size = float((actual - expected).norm()), float(expected.norm())
    assert error <= rtol * size + atol, f"relative error {error / size if size else error:.3g}"


def compare_centres(d_weight, record, dtype, nan=False) -> None:
    """With all recorded gradients of the centres, or with those of some and their projections."""
    if "grad_weight" in record:
        close(d_weight, record["grad_weight"], dtype, nan)
    elif "grad_weight_f32" in record:
        close(d_weight, record["grad_weight_f32"], torch.float32)
    else:
        close(d_weight[record["grad_weight_row_index"]], record["grad_weight_rows"], dtype)
        projected = d_weight @ record["probe"].to(d_weight.dtype)
        close(projected, record["grad_weight_times_probe"], dtype)


def compare(found: dict, record: dict, dtype, nan=False) -> None:
    close(found["loss"], record["loss"], dtype, nan)
    close(found["d_x"], record["grad_embeddings"], dtype, nan)
    compare_centres(found["d_weight"], record, dtype, nan)
    for key, value in found["state"].items():
        close(value, record[f"state_after_{key}"], dtype, nan)
