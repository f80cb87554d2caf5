"""wespeaker: the state_dict of a model with ``projection.weight`` (C, D), possibly saved
from DDP. For the sub-centre projections (C * K, D), with the K sub-centres of a class consecutive.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fastmargin.convert import files
from fastmargin.convert.centres import Backbone, Centres, Format, Reading, Writing
from fastmargin.convert.formats import one_file

PROJECTION, WEIGHT = "projection.", "projection.weight"


def _state(content: Any) -> dict[str, Tensor]:
    """The state_dict, also from a file with an entry ``state_dict``, which wespeaker loads too."""
    if not isinstance(content, dict):
        return {}
    state = content.get("state_dict", content)
    if not isinstance(state, dict):
        return {}
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _weight(content: Any) -> Tensor:
    return _state(content)[WEIGHT]


def _backbone(content: Any) -> dict[str, Tensor]:
    state = _state(content)
    return {key: value for key, value in state.items() if not key.startswith(PROJECTION)}


def _read(path: Path, reading: Reading) -> Centres:
    content = files.load(path)
    state = _state(content)
    files.entry(path, state, WEIGHT)
    weight = one_file.rows(path, content, _weight, reading)
    rest = [key for key in state if key.startswith(PROJECTION) and key != WEIGHT]
    if "state_dict" in content:
        rest += [key for key in content if key != "state_dict"]
    own = _backbone(content)
    backbone = Backbone(len(own), lambda: _backbone(files.load(path))) if own else None
    return Centres(
        "wespeaker",
        weight,
        sub_centers=reading.sub_centers,
        backbone=backbone,
        left_out=tuple(rest),
    )


def _write(centres: Centres, path: Path, writing: Writing) -> None:
    files.save(path, {WEIGHT: centres.weight.tensor(0, centres.weight.num_rows)})


FORMAT = Format(
    "wespeaker",
    "state_dict of a model with projection.weight",
    _read,
    _write,
    recognises=lambda content: WEIGHT in _state(content),
    sub_centers=True,
)
