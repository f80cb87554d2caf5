"""Heads and batches for the tests of sharing out classes, and steps to compare."""

from __future__ import annotations

import torch
from conftest import MARGINS, margin_for

import fastmargin as fm
from fastmargin import testing
from fastmargin.distributed.shard import bounds

MARGINS = {
    **MARGINS,
    "adaface_local": lambda: fm.AdaFace(t_alpha=0.5, stats="local"),
}
# rows of each process: uneven, and one with none
ROWS = {1: (23,), 2: (9, 14), 3: (14, 0, 9), 4: (2, 12, 3, 6)}
BATCH, DIM = 23, 8


def batch_of(classes: int, step: int = 0):
    case = testing.make_case("some_ignored", BATCH, classes, DIM, seed=step)
    return case.x * 3, case.weight, case.labels


def own_rows(n: int, rank: int) -> slice:
    start = sum(ROWS[n][:rank])
    return slice(start, start + ROWS[n][rank])


def own_classes(classes: int, n: int, rank: int) -> slice:
    return slice(*bounds(classes, n, rank))


def steps(head, rows: slice, count: int = 2, reduction="mean", optimiser=torch.optim.SGD):
    """A few steps on some rows of the batches; all that may be compared."""
    found = {"loss": [], "d_x": [], "metrics": []}
    optimiser = optimiser(head.parameters(), lr=0.5)
    for step in range(count):
        x, _, labels = batch_of(head.num_classes, step)
        x = x[rows].clone().requires_grad_()
        loss = head(x, labels[rows], reduction)
        optimiser.zero_grad()
        (
            loss * torch.linspace(0.5, 1.5, BATCH)[rows] if reduction == "none" else loss
        ).sum().backward()
        optimiser.step()
        found["loss"].append(loss.detach())
        found["d_x"].append(x.grad)
        found["metrics"].append(head.metrics)
    found["weight"] = head.weight.detach()
    found["state"] = dict(head.margin.named_buffers())
    return found


def head_of(margin: str, classes: int, group=None, **options):
    made = MARGINS[margin]() if margin == "adaface_local" else margin_for(margin, classes)
    head = fm.MarginHead(DIM, classes, made, group=group, **options).double()
    whole = batch_of(classes)[1]
    start, stop = (0, classes) if head.shard is None else (head.shard.start, head.shard.stop)
    head.weight.data.copy_(whole[start:stop])
    if margin == "kappaface":
        head.margin.class_weights.copy_(torch.linspace(0.2, 1, classes))
    return head


def sharded_steps(group, margin: str, classes: int, reduction="mean", options=()):
    head = head_of(margin, classes, group, **dict(options))
    return steps(head, own_rows(group.size(), group.rank()), reduction=reduction)


def compare(found: list[dict], whole: dict, margin: str, classes: int, factor: float) -> None:
    """What N processes found, beside one."""
    n = len(found)
    per_class = MARGINS[margin]().per_class
    # float32 state of AdaFace and KappaFace
    close = {"rtol": 2e-6, "atol": 1e-9} if "face" in margin else {"rtol": 1e-9, "atol": 1e-11}
    for rank, own in enumerate(found):
        rows, here = own_rows(n, rank), own_classes(classes, n, rank)
        for step in range(len(whole["loss"])):
            expected = whole["loss"][step]
            expected = expected[rows] if expected.dim() else expected
            torch.testing.assert_close(own["loss"][step], expected, **close)
            expected = whole["d_x"][step][rows] * factor
            torch.testing.assert_close(own["d_x"][step], expected, **close)
            for name, value in own["metrics"][step].items():
                torch.testing.assert_close(value, whole["metrics"][step][name], **close)
        torch.testing.assert_close(own["weight"], whole["weight"][here], **close)
        assert own["state"].keys() == whole["state"].keys()
        for name, value in own["state"].items():
            expected = whole["state"][name]
            expected = expected[here] if name in per_class else expected
            torch.testing.assert_close(value, expected, rtol=2e-5, atol=1e-6, msg=name)
