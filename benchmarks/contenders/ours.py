"""fastmargin's heads, one contender per backend and operand type."""

from __future__ import annotations

import torch

import fastmargin as fm
from benchmarks.cases import Case
from benchmarks.contenders.base import SCALE, SGD, Contender, Head


def margin(name: str) -> fm.margins.Margin:
    """The margins at their usual setting."""
    if name == "cosface":
        return fm.CosFace(m=0.4, s=SCALE)
    if name == "adaface":
        return fm.AdaFace(m=0.4, h=0.333, s=SCALE, t_alpha=0.01)
    return fm.ArcFace(m=0.5, s=SCALE)


def contender(backend: str, precision: str) -> Contender:
    """MarginHead; for a sampled case with row-sparse gradients and lazy rows."""

    def make(case: Case, weight: torch.Tensor) -> Head:
        sampling = {} if case.rate == 1 else {"num_sampled": case.sampled // case.world}
        head = fm.MarginHead(
            case.dim,
            case.classes,
            margin(case.margin),
            group="world" if case.world > 1 else None,
            backend=backend,
            precision=precision,
            device=weight.device,
            sparse_grad=case.rate < 1,
            batch_size=case.batch if case.world > 1 else None,
            **sampling,
        )
        start, stop = (
            (0, case.classes) if head.shard is None else (head.shard.start, head.shard.stop)
        )
        head.weight = torch.nn.Parameter(weight[start:stop])
        optimiser = None
        if case.state == "sgd":
            make_optimiser = torch.optim.SGD if case.rate == 1 else fm.optim.RowSGD
            optimiser = make_optimiser([head.weight], **SGD)
        drawn: list = []
        if head.sampler is not None:
            draw = head.sampler.draw

            def remembered(*args):
                drawn[:] = [draw(*args)]
                return drawn[0]

            head.sampler.draw = remembered
        return Head(head, head.weight, optimiser, columns=lambda: drawn[0].index if drawn else None)

    def refuses(case: Case, device: torch.device) -> str | None:
        if case.world > 1 and case.rate < 1:
            return "the gate has no truth for classes sampled in several processes: rate 1 only"
        found = fm.backends.get(backend)
        return found.unavailable() or found.refuses(device, torch.float32)

    note = fm.backends.get(backend).note
    return Contender(
        f"fastmargin {backend} {precision}",
        precision,
        make,
        margin,
        settings=f"MarginHead, backend={backend!r}, precision={precision!r}; row-sparse gradients "
        "and RowSGD where classes are sampled",
        limits=note,
        ours=True,
        refuses=refuses,
    )


CPU = (contender("cpu", "fp32"),)
GPU = (
    *(contender("triton", precision) for precision in ("fp16", "bf16", "tf32")),
    contender("cuda", "fp16"),
)
REFERENCE = (contender("reference", "fp32"),)
