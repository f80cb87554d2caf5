"""insightface arcface_torch: what ``train_v2.py`` saves with ``save_all_states``.

Every rank has ``checkpoint_gpu_{rank}.pt`` with its rows of ``PartialFC_V2`` under
``state_dict_softmax_fc``, and its optimiser, whose last parameter they are. The other entries
are the same on all.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmargin.convert import files, shards
from fastmargin.convert.centres import Backbone, Centres, ConvertError, Format, Reading, Writing

NAME = "checkpoint_gpu_{}.pt"
HEAD, BACKBONE, OPTIMISER = "state_dict_softmax_fc", "state_dict_backbone", "state_optimizer"
ALIKE = ("epoch", "global_step")


def last_buffer(optimiser: Any, group: int) -> Tensor | None:
    """SGD's momentum buffer of the last parameter of a group; None without one."""
    try:
        number = optimiser["param_groups"][group]["params"][-1]
        return optimiser["state"][number]["momentum_buffer"]
    except (KeyError, IndexError, TypeError):
        return None


def _weight(content: Any) -> Tensor:
    return content[HEAD]["weight"]


def _momentum(content: Any) -> Tensor:
    return last_buffer(content[OPTIMISER], -1)


def _read(path: Path, reading: Reading) -> Centres:
    weights, momenta, first = [], [], {}
    for file in (paths := shards.numbered(path, NAME)):
        content = files.load(file)
        files.entry(file, content, HEAD, "weight")
        weights.append(files.shard(file, content, _weight))
        if last_buffer(content.get(OPTIMISER), -1) is not None:
            momenta.append(files.shard(file, content, _momentum))
        first = first or content
        for key in ALIKE:
            if content.get(key) != first.get(key):
                raise ConvertError(
                    f"{file}: {key} is {content.get(key)}, in {paths[0].name} {first.get(key)}: "
                    "they were saved at different times"
                )
    shards.check_order(weights)
    rows = shards.joined(weights, shards.even, reading.num_classes)
    momentum = None
    if momenta:
        without = {shard.path for shard in weights} - {shard.path for shard in momenta}
        if without:
            raise ConvertError(
                f"{min(without)} has no momentum of the centres, and others have: they are of "
                "different runs"
            )
        momentum = shards.same_rows("momentum", shards.joined(momenta, shards.even, None), rows)
    rest = [key for key in first if key not in (HEAD, BACKBONE)]
    if momentum is not None:
        rest = [f"{key} of the backbone" if key == OPTIMISER else key for key in rest]
    state = first.get(BACKBONE)
    backbone = state and Backbone(len(state), lambda: files.load(paths[0])[BACKBONE])
    return Centres("insightface", rows, momentum, backbone=backbone or None, left_out=tuple(rest))


def _write(centres: Centres, path: Path, writing: Writing) -> None:
    path.mkdir()
    start, marks = 0, {}
    for rank, count in enumerate(shards.even(centres.num_classes, writing.world_size)):
        rows = centres.weight.tensor(start, start + count)
        files.save(path / NAME.format(rank), {HEAD: {"weight": rows}})
        marks[NAME.format(rank)] = shards.mark(rows)
        start += count
    shards.write_order(path, marks)


FORMAT = Format(
    "insightface",
    "checkpoint_gpu_{rank}.pt",
    _read,
    _write,
    owns=lambda name: re.fullmatch(r"checkpoint_gpu_\d+\.pt", name) is not None,
    sharded=True,
)
