"""Launches of training steps of many heads, on a GPU that is not there, as JSON.

    python tests/heads_launches.py 90

For each problem the kernels in order, and those that are no build of
``fastmargin.backends.triton.aot``. A process of its own: see ``fastmargin.backends.triton.asked``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator

os.environ.pop("TRITON_INTERPRET", None)
os.environ["FASTMARGIN_TUNED"] = ""

import torch

import fastmargin as fm
from fastmargin.backends.triton import BACKEND, aot
from fastmargin.backends.triton.asked import noted
from fastmargin.backends.triton.centres import STAGED_BYTES
from fastmargin.backends.triton.problems import CLASSES, ROWS, WIDTHS, Pass, passes, problems
from fastmargin.optim import RowSGD

MOMENTUM = {"lr": 1, "momentum": 0.9, "weight_decay": 5e-4}
OPTIMIZERS = {"sgd": {"lr": 0.1}, "momentum": MOMENTUM, "nesterov": MOMENTUM | {"nesterov": True}}
LOW = {"momentum_dtype": torch.bfloat16, "stochastic_rounding": True}
MARGINS = {
    "arcface": fm.ArcFace,
    "adaface": fm.AdaFace,
    "kappaface": fm.KappaFace,
    "elasticface": fm.ElasticFace,
    "magface": fm.MagFace,
    "curricularface": fm.CurricularFace,
    "class margin": lambda: fm.ClassMargin(torch.full((CLASSES,), 0.3)),
    "npt": fm.NPT,
    "filtered": lambda: fm.Filtered(fm.CosFace(), 0.3),
    "filtered elasticface": lambda: fm.Filtered(fm.ElasticFace(), 0.3),
}


def step(
    d: int = 512,
    margin: Callable[[], fm.margins.Margin] = fm.AdaFace,
    x_dtype: torch.dtype = torch.bfloat16,
    batch: int = ROWS,
    classes: int = CLASSES,
    optimizer: dict | None = None,
    **options,
) -> None:
    """A training step of a head, then its loss without a gradient."""
    options = {"backend": "triton", "validate": False, "device": "meta"} | options
    head = fm.MarginHead(d, classes, margin(), **options).to_empty(device="cpu")
    x = torch.empty(batch, d, dtype=x_dtype, requires_grad=True)
    labels = torch.arange(batch) % classes
    stepper = optimizer and RowSGD(head.parameters(), fused=True, **optimizer)
    head(x, labels).backward()
    if stepper:
        stepper.step()
    with torch.no_grad():
        head(x, labels)


def functional(weight: torch.Tensor, margin=fm.ArcFace) -> None:
    """A step with centres of the caller's."""
    weight.requires_grad_()
    x = torch.empty(ROWS, weight.shape[1], dtype=torch.bfloat16, requires_grad=True)
    about = {"backend": "triton", "validate": False}
    fm.margin_loss(x, weight, torch.arange(ROWS), margin(), **about).backward()


def shard(class_start: int) -> None:
    """What is launched for classes that are not the first."""
    of = Pass(512, "fp16", class_start=class_start)
    for problem in passes(of, False):
        problem.run()
    labels, (seed, step) = torch.arange(ROWS), torch.zeros(2, 1, dtype=torch.int64)
    marks = torch.empty(CLASSES + 1, dtype=torch.uint8)
    BACKEND.sample(labels, seed, step.clone(), marks, class_start, class_start, 16)


def shipped() -> Iterator[tuple[str, Callable, dict]]:
    """Name, what to run and its arguments; all that is compiled for them ships."""
    for name, margin in MARGINS.items():
        yield name, step, {"margin": margin}
        yield f"{name}, sampled", step, {"margin": margin, "num_sampled": CLASSES - 100}
    for d in WIDTHS:
        for precision in ("fp16", "bf16", "tf32", "fp32"):
            yield f"{d} columns, {precision}", step, {"d": d, "precision": precision}
        for name, rates in OPTIMIZERS.items():
            yield f"{d} columns, {name}", step, {"d": d, "optimizer": rates}
            for dtype, precision in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):
                about = {"d": d, "dtype": dtype, "precision": precision}
                yield f"{d} columns, {dtype}, {name}", step, about | {"optimizer": rates | LOW}
    for dtype in (torch.float16, torch.float32):
        yield f"embeddings, {dtype}", step, {"x_dtype": dtype}
    transposed = torch.empty(512, CLASSES)
    yield "transposed", functional, {"weight": transposed.t()}
    yield "transposed, rule", functional, {"weight": transposed.t(), "margin": MARGINS["filtered"]}
    yield "transposed, 16 bits", functional, {"weight": transposed.bfloat16().t()}
    yield "rows left out", step, {"row_tolerance": 1e-3}
    yield "two pieces", step, {"classes": STAGED_BYTES // 512, "optimizer": MOMENTUM}
    for first in (1, 16, 12_345):
        yield f"shard from class {first}", shard, {"class_start": first}


def others() -> Iterator[tuple[str, Callable, dict]]:
    """As above; some of what is compiled for them is for these shapes alone."""
    yield "one row, one class", step, {"batch": 1, "classes": 1}
    yield "gaps between rows", functional, {"weight": torch.empty(CLASSES, 640)[:, :512]}
    yield "unaligned", functional, {"weight": torch.empty(CLASSES * 512 + 1)[1:].view(-1, 512)}
    yield "unaligned columns", functional, {"weight": torch.empty(512, 999).t()}
    yield "100 columns", step, {"d": 100}
    yield "24 columns", step, {"d": 24, "precision": "bf16"}


def run(arch: int) -> list[dict]:
    known = {build.asked.key for build in aot.builds(arch, problems(every=True))}
    report = []
    for group in (shipped, others):
        for name, function, about in group():
            with noted(arch) as notes, contextlib.redirect_stdout(sys.stderr):
                function(**about)
            unknown = [asked for asked in notes if asked.key not in known]
            report.append(
                {
                    "problem": name,
                    "ships": group is shipped,
                    "launches": [asked.kernel for asked in notes],
                    "unknown": [f"{asked.kernel} {asked.source.signature}" for asked in unknown],
                }
            )
    return report


def draw(labels, *about) -> tuple[torch.Tensor, ...]:
    """Numbers that can be used, beside the launches that would make them."""
    index, _, positives = sample(labels, *about)
    return torch.arange(len(index)), torch.arange(len(labels)), positives.fill_(len(labels))


if __name__ == "__main__":
    sample, BACKEND.sample = BACKEND.sample, draw
    BACKEND.unavailable, BACKEND.refuses = lambda: None, lambda device, dtype: None
    print(json.dumps(run(int(sys.argv[1]))))
