"""The formats of code bases, one module each. A new one is a module here and a list entry."""

from __future__ import annotations

from pathlib import Path

from fastmargin.convert import files
from fastmargin.convert.centres import ConvertError, Format
from fastmargin.convert.formats import (
    adaface,
    cvlface,
    fastmargin,
    insightface,
    kappaface,
    npt,
    pml,
    safetensors,
    wespeaker,
)

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (
        *(fastmargin, safetensors, insightface, kappaface, cvlface, adaface, npt, pml),
        wespeaker,
    )
}


def format_of(name: str) -> Format:
    """The format of a name; raises ConvertError for an unknown one."""
    if name not in FORMATS:
        raise ConvertError(f"format {name!r} is none of {', '.join(FORMATS)}")
    return FORMATS[name]


def place(path: Path, form: Format) -> Path:
    """The folder, if the path is one of its several files; otherwise the path itself."""
    if form.owns is not None and path.is_file() and form.owns(path.name):
        return path.parent
    return path


def detect(path: Path) -> Format:
    """The format of a folder or a file.

    Raises:
        FileNotFoundError: it does not exist.
        ConvertError: it matches no format, or several.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    if path.is_dir():
        names = [entry.name for entry in path.iterdir()]
    else:
        names = [path.name]
    found = [
        form for form in FORMATS.values() if form.owns is not None and any(map(form.owns, names))
    ]
    if path.is_file() and not found:
        if path.suffix == ".safetensors":
            return FORMATS["safetensors"]
        content = files.load(path)
        found = [form for form in FORMATS.values() if form.recognises(content)]
    if len(found) != 1:
        what = "files of " + " and ".join(form.name for form in found) if found else "no known file"
        known = "; ".join(f"{form.name}: {form.files}" for form in FORMATS.values())
        raise ConvertError(
            f"{path} has {what}: name the format with --from, or a matrix with --key. Known are "
            f"{known}"
        )
    return found[0]
