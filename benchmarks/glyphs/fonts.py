"""The fonts that draw the glyphs: which ones, where they lie, and what to install."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageFont

USUAL_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts"),
    *("/Library/Fonts", "~/Library/Fonts"),
)


class FontsMissingError(RuntimeError):
    """Fonts are not installed; the message names the packages."""


@dataclass(frozen=True)
class Font:
    """A font as Debian packages it. file: its name; family: of the face in it that is used."""

    name: str
    family: str
    file: str
    package: str


@dataclass(frozen=True)
class Face:
    """A font on this machine: the face number ``index`` of the file ``path``."""

    font: Font
    path: Path
    index: int

    def open(self, size: int) -> ImageFont.FreeTypeFont:
        """Ready to draw with ``size`` pixels per em."""
        return _open(self.path, size, self.index)


# Not fonts-droid-fallback: its glyphs are those of Micro Hei.
HELD_OUT = Font("UKai", "AR PL UKai CN", "ukai.ttc", "fonts-arphic-ukai")
SMALL = (
    Font("Zen Hei", "WenQuanYi Zen Hei", "wqy-zenhei.ttc", "fonts-wqy-zenhei"),
    Font("Micro Hei", "WenQuanYi Micro Hei", "wqy-microhei.ttc", "fonts-wqy-microhei"),
    Font("UMing", "AR PL UMing CN", "uming.ttc", "fonts-arphic-uming"),
    Font("Unifont", "Unifont", "unifont.otf", "fonts-unifont"),
    HELD_OUT,
)
NOTO = (
    Font("Noto Sans", "Noto Sans CJK SC", "NotoSansCJK-Regular.ttc", "fonts-noto-cjk"),
    Font("Noto Serif", "Noto Serif CJK SC", "NotoSerifCJK-Regular.ttc", "fonts-noto-cjk"),
)


def find_faces(fonts: Sequence[Font], folders: Iterable[Path] | None = None) -> list[Face]:
    """The faces of all ``fonts``, in their order.

    Args:
        folders: where to look, with all folders inside; default: where fontconfig and most
            systems keep fonts.

    Raises:
        FontsMissingError: some are not there.
    """
    places = _installed_files() if folders is None else _files_below(folders)
    faces, missing = [], []
    for font in fonts:
        index = None
        if font.file in places:
            index = _face_index(places[font.file], font.family)
        if index is None:
            missing.append(font)
        else:
            faces.append(Face(font, places[font.file], index))
    if missing:
        names = ", ".join(f"{font.name} ({font.file})" for font in missing)
        packages = " ".join(dict.fromkeys(font.package for font in missing))
        raise FontsMissingError(f"fonts not found: {names}. Install them: apt install {packages}")
    return faces


def _installed_files() -> dict[str, Path]:
    """Font files by name, of the usual folders and what fontconfig knows besides."""
    found = _files_below(Path(folder).expanduser() for folder in USUAL_FOLDERS)
    if shutil.which("fc-list"):
        listed = subprocess.run(["fc-list", "--format=%{file}\n"], capture_output=True, text=True)
        for line in listed.stdout.splitlines():
            found.setdefault(Path(line).name, Path(line))
    return found


def _files_below(folders: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        for path, _, names in os.walk(folder, followlinks=True):
            for name in names:
                found.setdefault(name, Path(path) / name)
    return found


def _face_index(path: Path, family: str) -> int | None:
    """Which face of the file (a collection holds several) is of this family; None without."""
    index = 0
    while True:
        try:
            face = _open(path, 10, index)
        except OSError:  # no face of this number, or no font at all
            return None
        if face.getname()[0] == family:
            return index
        index += 1


def _open(path: Path, size: int, index: int) -> ImageFont.FreeTypeFont:
    """Not ``ImageFont.truetype``: that looks elsewhere for a file of this name that it cannot read.

    Raises:
        OSError: it is no font, or has no face of this number.
    """
    return ImageFont.FreeTypeFont(str(path), size, index, layout_engine=ImageFont.Layout.BASIC)
