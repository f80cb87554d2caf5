"""Drop-in heads against their originals' operations: time and memory of a step.

The classes of ``fastmargin.compat`` by default and with ``faithful=True``, our own implementation
of the original's operations in plain PyTorch. Forward and backward, taking turns in one process;
peak memory in separate processes. Timed only if the loss and both gradients of the two agree.
Writes ``results/dropins_cpu.json`` beside this file.

    python -m benchmarks.dropins
    python -m benchmarks.dropins --classes 20000 --repeats 3 --only adaface --output -
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import RESULTS, ROOT, data, memory, timing
from benchmarks.cases import Case
from benchmarks.contenders import Head
from benchmarks.provenance import provenance
from benchmarks.spread import Spread, paired_ratio
from fastmargin import testing
from fastmargin.compat import (
    adaface,
    cvlface,
    insightface,
    kappaface,
    npt,
    pytorch_metric_learning,
    speechbrain,
    wespeaker,
)

CPU = torch.device("cpu")
ALLOWED = 1e-3
"""Largest allowed relative difference between the two in float32, due to rounding."""
BOTH = {"default": False, "faithful": True}


def _adaface(case: Case, faithful: bool) -> Head:
    head = adaface.AdaFace(case.dim, case.classes, t_alpha=0.01, faithful=faithful)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        norm = torch.norm(x, 2, 1, True)
        return F.cross_entropy(head(x / norm, norm, labels), labels)

    return Head(loss, head.kernel, transposed=True)


def _insightface(case: Case, faithful: bool) -> Head:
    margin = insightface.CombinedMarginLoss(64, 1.0, 0.5, 0.0)
    head = insightface.PartialFC_V2(margin, case.dim, case.classes, faithful=faithful)
    return Head(head, head.weight)


def _cvlface(case: Case, faithful: bool) -> Head:
    margin = cvlface.AdaFaceLoss(64.0, 0.4, 0.333, 0.01)
    head = cvlface.PartialFC_V2(0, 1, margin, case.dim, case.classes, faithful=faithful)
    return Head(head, head.weight)


def _kappaface(case: Case, faithful: bool) -> Head:
    head = kappaface.PartialFC(
        rank=0,
        local_rank=0,
        world_size=1,
        batch_size=case.batch,
        resume=False,
        margin_softmax=kappaface.KappaFace(),
        num_classes=case.classes,
        embedding_size=case.dim,
        faithful=faithful,
        device="cpu",
    )
    optimiser = torch.optim.SGD([{"params": head.parameters()}], lr=0.1, momentum=0.9)
    weights = torch.ones(case.classes)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        features = F.normalize(x)
        x_grad, value = head.forward_backward(labels, features, optimiser, weights)
        # the equivalent of the training script's features.backward(x_grad)
        carried = (features * x_grad).sum()
        return value.detach() + carried - carried.detach()

    return Head(loss, head.sub_weight)


def _npt(case: Case, faithful: bool) -> Head:
    head = npt.Linear(case.dim, case.classes, faithful=faithful)
    criterion = npt.NPTLoss(top_k=1)
    return Head(lambda x, labels: criterion(head(x, labels).clone(), labels), head.weight)


def _pml(kind: type, **options) -> Callable[[Case, bool], Head]:
    def make(case: Case, faithful: bool) -> Head:
        head = kind(num_classes=case.classes, embedding_size=case.dim, faithful=faithful, **options)
        return Head(head, head.W, transposed=True)

    return make


def _wespeaker(case: Case, faithful: bool) -> Head:
    head = wespeaker.ArcMarginProduct(case.dim, case.classes, faithful=faithful)
    return Head(lambda x, labels: F.cross_entropy(head(x, labels), labels), head.weight)


def _speechbrain(case: Case, faithful: bool) -> Head:
    head = speechbrain.Classifier(case.dim, out_neurons=case.classes, faithful=faithful)
    criterion = speechbrain.LogSoftmaxWrapper(speechbrain.AdditiveAngularMargin(0.2, 30))

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return criterion(head(x.unsqueeze(1)), labels[:, None])

    return Head(loss, head.weight)


DROPINS: dict[str, Callable[[Case, bool], Head]] = {
    "adaface AdaFace": _adaface,
    "insightface PartialFC_V2, ArcFace": _insightface,
    "cvlface PartialFC_V2, AdaFace": _cvlface,
    "kappaface PartialFC, KappaFace": _kappaface,
    "npt Linear, NPTLoss": _npt,
    "pytorch_metric_learning ArcFaceLoss": _pml(pytorch_metric_learning.ArcFaceLoss),
    "pytorch_metric_learning SubCenterArcFaceLoss": _pml(
        pytorch_metric_learning.SubCenterArcFaceLoss, sub_centers=2
    ),
    "wespeaker ArcMarginProduct": _wespeaker,
    "speechbrain Classifier, AdditiveAngularMargin": _speechbrain,
}
"""Name -> function that makes the head of a case, default or faithful."""


def both(name: str, case: Case) -> dict[str, Head]:
    """The drop-in and the original's operations, from the same centres."""
    heads = {key: DROPINS[name](case, faithful) for key, faithful in BOTH.items()}
    with torch.no_grad():
        weight = torch.randn_like(heads["default"].weight)
        for head in heads.values():
            head.weight.copy_(weight)
    return heads


def near_their_centres(name: str, case: Case) -> tuple[dict[str, Head], Tensor, Tensor]:
    """Heads, embeddings and labels as in training, with losses below the originals' caps."""
    heads = both(name, case)
    x, labels = data.batches(case, CPU)[0]
    weight = heads["default"].weight.detach()
    weight = weight.t() if heads["default"].transposed else weight
    own = F.normalize(weight.view(case.classes, -1, case.dim)[labels, 0])
    x = 20 * own + 20 * F.normalize(x.detach())
    return heads, x.requires_grad_(), labels


def difference(heads: dict[str, Head], x: Tensor, labels: Tensor) -> float:
    """Largest relative difference of the loss and both gradients."""
    found = {}
    for key, head in heads.items():
        x.grad = None
        loss = head.loss(x, labels)
        loss.backward()
        found[key] = (loss.detach(), x.grad, head.gradient().clone())
        head.zero_grad()
    return max(testing.relative_error(*pair) for pair in zip(*found.values(), strict=True))


def peak(name: str, key: str, case: Case) -> int:
    """Peak bytes of a step beyond persistent memory and the centres' gradient."""
    command = [sys.executable, "-m", "benchmarks.dropins", "--peak-of", name, key]
    sizes = ["--batch", case.batch, "--classes", case.classes, "--dim", case.dim]
    done = subprocess.run(
        [*command, *map(str, sizes)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak_bytes"] - found["gradient_bytes"]


def measure(name: str, case: Case, repeats: int) -> dict:
    """All measurements of one drop-in."""
    error = difference(*near_their_centres(name, Case("gate", case.batch, 2_000, case.dim)))
    if not error <= ALLOWED:
        return {"dropin": name, "status": "wrong", "difference": error}
    clock = timing.clock_for(CPU)
    canary = timing.canary_for(CPU, clock)
    heads = both(name, case)
    batches = {key: data.batches(case, CPU) for key in heads}
    times = timing.measure(heads, batches, clock, canary, repeats)
    for found in times.values():
        if found.error is not None:
            raise found.error
    del heads
    return {
        "dropin": name,
        "status": "measured",
        "difference": error,
        "seconds": {key: asdict(Spread.of(found.step)) for key, found in times.items()},
        "ratio": asdict(paired_ratio(times["default"].step, times["faithful"].step)),
        "disturbed_share": timing.disturbed_share(times["default"], canary),
        "peak_bytes_beyond_gradient": {key: peak(name, key, case) for key in BOTH},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--classes", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", help="drop-ins whose name contains this")
    parser.add_argument("--output", default=str(RESULTS / "dropins_cpu.json"), help="or - to print")
    parser.add_argument("--peak-of", nargs=2, metavar=("NAME", "WHICH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    case = Case("dropins", arguments.batch, arguments.classes, arguments.dim)
    if arguments.peak_of:
        name, key = arguments.peak_of
        head = DROPINS[name](case, BOTH[key])
        print(json.dumps(asdict(memory.of_step(head, data.batches(case, CPU), CPU))))
        return
    result = provenance(" ".join(["python -m benchmarks.dropins", *sys.argv[1:]]), CPU)
    result |= {"case": asdict(case), "repeats": arguments.repeats, "rows": []}
    for name in DROPINS:
        if arguments.only is None or arguments.only in name:
            row = measure(name, case, arguments.repeats)
            result["rows"].append(row)
            ratio = f"{row['ratio']['median']:.2f}" if "ratio" in row else row["status"]
            print(f"{name}: {ratio}", file=sys.stderr)
    text = json.dumps(result, indent=2) + "\n"
    if arguments.output == "-":
        print(text, end="")
    else:
        (ROOT / arguments.output).write_text(text)


if __name__ == "__main__":
    main()
