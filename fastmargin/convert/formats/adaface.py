"""AdaFace: a Lightning checkpoint, ``head.kernel`` (D, C) and the head's statistics.

Its ArcFace and CosFace have only the kernel. In the optimiser, the kernel is the last parameter of
the first group.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmargin.convert import files
from fastmargin.convert.centres import (
    STATISTICS,
    Backbone,
    Centres,
    ConvertError,
    Format,
    Reading,
    Rows,
    Writing,
)
from fastmargin.convert.formats import one_file
from fastmargin.convert.formats.insightface import last_buffer

STATE, KERNEL, BACKBONE, OPTIMISERS = "state_dict", "head.kernel", "model.", "optimizer_states"


def _kernel(content: Any) -> Tensor:
    return content[STATE][KERNEL]


def _momentum(content: Any) -> Tensor:
    return last_buffer(content[OPTIMISERS][0], 0)


def _backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    length = len(BACKBONE)
    return {key[length:]: value for key, value in state.items() if key.startswith(BACKBONE)}


def _read(path: Path, reading: Reading) -> Centres:
    content = files.load(path)
    files.entry(path, content, STATE, KERNEL)
    state = content[STATE]
    weight = one_file.rows(path, content, _kernel, reading, transposed=True)
    rest = [key for key in content if key != STATE]
    momentum = None
    optimisers = content.get(OPTIMISERS)
    if optimisers and last_buffer(optimisers[0], 0) is not None:
        shard = files.shard(path, content, _momentum, transposed=True)
        if (shard.num_rows, shard.dim) != (weight.num_rows, weight.dim):
            raise ConvertError(
                f"{path}: the momentum of the last parameter of the first group is "
                f"{(shard.dim, shard.num_rows)}, {KERNEL} {(weight.dim, weight.num_rows)}: the "
                f"optimiser is not AdaFace's; take {OPTIMISERS} out of the file"
            )
        momentum = Rows((shard,), shard.num_rows)
        rest = [f"{key} of the backbone" if key == OPTIMISERS else key for key in rest]
    names = {f"head.{name}": name for name in STATISTICS}
    statistics = {name: state[key].clone() for key, name in names.items() if key in state}
    known = {KERNEL, "head.t", *names}  # t never changes: it is always 0
    rest += [key for key in state if not key.startswith(BACKBONE) and key not in known]
    own = _backbone(state)
    backbone = Backbone(len(own), lambda: _backbone(files.load(path)[STATE])) if own else None
    return Centres("adaface", weight, momentum, statistics, backbone=backbone, left_out=tuple(rest))


def _write(centres: Centres, path: Path, writing: Writing) -> None:
    state = {KERNEL: one_file.columns(centres.weight)}
    if centres.statistics:
        state["head.t"] = torch.zeros(1)
        state |= {f"head.{name}": value for name, value in centres.statistics.items()}
    files.save(path, {STATE: state})


def _recognises(content: Any) -> bool:
    return isinstance(content, dict) and KERNEL in (content.get(STATE) or ())


FORMAT = Format(
    "adaface",
    "a Lightning .ckpt with head.kernel",
    _read,
    _write,
    recognises=_recognises,
    statistics=True,
)
