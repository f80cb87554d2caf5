"""Converting class centres from and to the files of other code bases.

::

    centres = fastmargin.convert.read("insightface/run1")  # looks at the files, reads no rows
    fastmargin.convert.write(centres, "checkpoint", "fastmargin")

Rows are streamed: memory holds a few blocks of them, and for ``torch.save`` formats the one file
being written. No file is trusted: see :mod:`fastmargin.convert.files`.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastmargin import margins
from fastmargin.convert import files, keyed, shards
from fastmargin.convert.centres import (
    Backbone,
    Centres,
    ConvertError,
    Format,
    Reading,
    Rows,
    Shard,
    Writing,
    left_out,
)
from fastmargin.convert.formats import FORMATS, detect, format_of, place

__all__ = [
    "FORMATS",
    "Backbone",
    "Centres",
    "ConvertError",
    "Format",
    "Rows",
    "Shard",
    "left_out",
    "read",
    "write",
]


def read(
    path: str | os.PathLike,
    format: str | None = None,
    *,
    num_classes: int | None = None,
    sub_centers: int = 1,
    head: str | None = None,
    key: str | None = None,
    transposed: bool = False,
) -> Centres:
    """Opens and checks the files of a classifier; rows are read on demand.

    Args:
        path: folder, or a file, also one of several in a folder.
        format: a name in :data:`FORMATS`; None: detected from the files.
        num_classes: C. Needed where CVLface's files may have padding rows, and checked otherwise:
            nothing else shows that the last shards are missing.
        sub_centers: consecutive rows per class; pml, wespeaker and with a key only.
        head: in a checkpoint of fastmargin, the head (or another matrix of rows) to take.
        key: take the matrix of this name in a ``torch.save`` file of any code base, instead of
            ``format``, e.g. "model.heads.weight"; only the centres are read then.
        transposed: that matrix is (D, C).

    Raises:
        ConvertError: the files do not match their format, or some are missing.
        OSError: a file cannot be read.
    """
    path = Path(path)
    _check_count("num_classes", num_classes)
    _check_count("sub_centers", sub_centers)
    if transposed and key is None:
        raise ConvertError("transposed goes with a key: the formats know their layout")
    if key is not None:
        if format is not None or head is not None:
            raise ConvertError("key goes without a format (--from) and without a head")
        return keyed.read(path, Reading(num_classes, sub_centers), key, transposed)
    form = detect(path) if format is None else format_of(format)
    if sub_centers > 1 and not form.sub_centers:
        raise ConvertError(f"sub_centers is {sub_centers}, and {form.name} has one row per class")
    path = place(path, form)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    if path.is_dir() != (form.owns is not None):
        kind = "a file" if form.owns is None else "a folder"
        raise ConvertError(f"{path}: {form.name} is {kind}: {form.files}")
    return form.read(path, Reading(num_classes, sub_centers, head))


def write(
    centres: Centres,
    path: str | os.PathLike,
    format: str,
    *,
    world_size: int = 1,
    margin: str | None = None,
    sampler_seed: int | None = None,
    backbone: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes a classifier; after an error nothing has changed.

    Args:
        path: folder or file, depending on the format.
        format: a name in :data:`FORMATS`.
        world_size: number of shards. A fastmargin checkpoint loads into any number.
        margin: of the head that will load a fastmargin checkpoint, such as "kappaface"; its state
            comes from the source if that has it, and is the initial state otherwise.
        sampler_seed: ``seed`` of that head if it samples classes; None: it does not.
        backbone: file for the state_dict of the source's backbone.
        overwrite: replace an existing target. A folder with other files in it is never replaced.

    Returns:
        Descriptions of what the source has and the result lacks.

    Raises:
        ConvertError: the format cannot hold these centres, or ``path`` exists.
        OSError: a file cannot be written.
    """
    path, form = Path(path), format_of(format)
    writing = Writing(world_size, margin, sampler_seed)
    check_target(centres, path, form, writing, backbone, overwrite)
    targets = [path] if backbone is None else [path, Path(backbone)]
    with files.replacing(*targets) as fresh:
        form.write(centres, fresh[0], writing)
        if backbone is not None:
            files.save(fresh[1], dict(centres.backbone.load()))
    return left_out(centres, form, writing, backbone is not None)


def check_target(
    centres: Centres,
    path: Path,
    form: Format,
    writing: Writing,
    backbone: str | os.PathLike | None,
    overwrite: bool,
) -> None:
    """Raises ConvertError if :func:`write` would fail; changes nothing."""
    _check_count("world_size", writing.world_size)
    if writing.world_size > 1 and not form.sharded:
        raise ConvertError(
            f"world_size is {writing.world_size}, and {form.name} is one file: leave it out; "
            "whoever loads it takes the rows they want"
        )
    if form.name != "fastmargin" and (writing.margin, writing.sampler_seed) != (None, None):
        raise ConvertError(
            f"margin and sampler_seed are for a checkpoint of fastmargin, and {form.name} keeps no "
            "such state: leave them out"
        )
    if writing.margin not in (None, *margins.BY_NAME):
        raise ConvertError(
            f"margin {writing.margin!r} is none of {', '.join(margins.BY_NAME)}: see to --margin"
        )
    if centres.sub_centers > 1 and not form.sub_centers:
        able = ", ".join(name for name, other in FORMATS.items() if other.sub_centers)
        raise ConvertError(
            f"{centres.sub_centers} centres for each class, and the margins of {form.name} need "
            f"one: only {able} take them"
        )
    for source in {shard.path for shard in centres.weight.shards}:
        if path.resolve() in (source.resolve(), source.resolve().parent):
            raise ConvertError(f"{path} is the source: write elsewhere")
    if backbone is not None:
        if centres.backbone is None:
            raise ConvertError(f"backbone: {centres.format} has none here: leave --backbone out")
        if Path(backbone).resolve() == path.resolve():
            raise ConvertError(f"backbone and destination are both {path}")
    for target in [path] + ([] if backbone is None else [Path(backbone)]):
        if os.path.lexists(target) and not overwrite:
            raise ConvertError(f"{target} is there already: see to --overwrite (overwrite)")
    if path.is_dir():
        foreign = sorted(
            entry.name
            for entry in path.iterdir()
            if entry.name != shards.ORDER and (form.owns is None or not form.owns(entry.name))
        )
        if foreign:
            raise ConvertError(
                f"{path} has {foreign[0]} in it, which is none of {form.name}: write elsewhere; "
                "a folder with other files is not replaced"
            )
    if backbone is not None and Path(backbone).is_dir():
        raise ConvertError(f"{backbone} is a folder: name a file for the backbone")


def _check_count(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConvertError(f"{name} must be at least 1, got {value}")
