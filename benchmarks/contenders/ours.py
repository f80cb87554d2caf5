"""fastmargin's heads, one contender per backend and operand type."""

from __future__ import annotations

import torch

import fastmargin as fm
from benchmarks.cases import Case
from benchmarks.contenders.base import SCALE, Contender, Head, sgd_numbers
from fastmargin.optim import RowSGD

LOW = {"momentum_dtype": torch.bfloat16, "stochastic_rounding": True}


def margin(name: str) -> fm.margins.Margin:
    """A margin with its usual settings."""
    if name == "cosface":
        return fm.CosFace(m=0.4, s=SCALE)
    if name == "adaface":
        return fm.AdaFace(m=0.4, h=0.333, s=SCALE, t_alpha=0.01)
    return fm.ArcFace(m=0.5, s=SCALE)


def _head(case: Case, weight: torch.Tensor, options: dict) -> fm.MarginHead:
    """A head with these centres, without allocating others: one set may fill the device."""
    size, own = (case.dim, case.classes), margin(case.margin)
    if case.rate == case.world == 1:
        head = fm.MarginHead(*size, own, device="meta", **options)
        state = margin(case.margin).to(weight.device).state_dict()
        state = {f"margin.{name}": value for name, value in state.items()}
        head.load_state_dict({"weight": weight, **state}, assign=True)
        return head
    head = fm.MarginHead(*size, own, device=weight.device, **options)
    if head.shard is not None:
        weight = weight[head.shard.start : head.shard.stop]
    head.weight = torch.nn.Parameter(weight)
    return head


def contender(backend: str, precision: str) -> Contender:
    """MarginHead; its optimiser is fused into the centre pass, and lazy with sampled classes."""

    def make(case: Case, weight: torch.Tensor) -> Head:
        options = {"backend": backend, "precision": precision, "sparse_grad": case.rate < 1}
        if case.rate < 1:
            options["num_sampled"] = case.sampled // case.world
        if case.world > 1:
            options |= {"group": "world", "batch_size": case.batch}
        head = _head(case, weight, options)
        optimiser, left = None, None
        if case.state != "none":
            low = LOW if case.state != "sgd" else {}
            optimiser = RowSGD([head.weight], **sgd_numbers(case), **low, fused=True)

            def left() -> torch.Tensor:
                # its first momentum is the gradient itself; in float32, so that it is not rounded
                still = RowSGD([head.weight], 0.0, 0.9, unsampled="frozen", fused=True)
                still.step()
                return still.state[head.weight]["momentum_buffer"]

        drawn: list = []
        if head.sampler is not None:
            draw = head.sampler.draw

            def remembered(*args):
                drawn[:] = [draw(*args)]
                return drawn[0]

            head.sampler.draw = remembered
        columns = lambda: drawn[0].index if drawn else None  # noqa: E731
        return Head(head, head.weight, optimiser, columns=columns, left=left)

    def refuses(case: Case, device: torch.device) -> str | None:
        if case.world > 1 and case.rate < 1:
            return "the gate has no truth for sampled classes in several processes: rate 1 only"
        found = fm.backends.get(backend)
        return found.unavailable() or found.refuses(device, torch.float32)

    note = fm.backends.get(backend).note
    return Contender(
        f"fastmargin {backend} {precision}",
        precision,
        make,
        margin,
        settings=f"MarginHead, backend={backend!r}, precision={precision!r}; row-sparse gradients "
        "with sampled classes; RowSGD with fused=True, and stochastic rounding if the state has "
        "16 bits",
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
