"""Which characters are classes: those that enough fonts have. Found once, then read from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL

from benchmarks.glyphs.drawing import has_glyph
from benchmarks.glyphs.fonts import Face

# Han and Hangul syllables. Not the compatibility ideographs: the same characters a second time.
HAN_AND_HANGUL = (
    range(0x3400, 0x4DC0),
    range(0x4E00, 0xA000),
    range(0xAC00, 0xD7A4),
    range(0x20000, 0x2A6E0),
)
FEWEST_FONTS = 4


@dataclass(frozen=True)
class Classes:
    """code_points: [C] int32, ascending. has: [C, F] bool, whether the font has the character."""

    code_points: np.ndarray
    has: np.ndarray

    def some(self, count: int, seed: int = 0) -> Classes:
        """A random choice of ``count`` of them, ascending.

        Raises:
            ValueError: there are not so many.
        """
        if not 1 <= count <= len(self.code_points):
            raise ValueError(
                f"--classes must be 1 to {len(self.code_points):,}, the characters that at least "
                f"{FEWEST_FONTS} of the fonts have, got {count:,}; --noto adds two fonts"
            )
        chosen = np.random.default_rng(seed).permutation(len(self.code_points))[:count]
        chosen.sort()
        return Classes(self.code_points[chosen], self.has[chosen])


def find_classes(
    faces: Sequence[Face],
    ranges: Iterable[range] = HAN_AND_HANGUL,
    fewest: int = FEWEST_FONTS,
    after_font: Callable[[], None] = lambda: None,
) -> Classes:
    """The characters in ``ranges`` that at least ``fewest`` faces have."""
    points = np.array([point for part in ranges for point in part], dtype=np.int32)
    has = np.zeros((len(points), len(faces)), dtype=bool)
    for number, face in enumerate(faces):
        has_character = has_glyph(face)
        has[:, number] = [has_character(chr(point)) for point in points]
        # leave out what the remaining fonts cannot save
        possible = has.sum(axis=1) + len(faces) - number - 1 >= fewest
        points, has = points[possible], has[possible]
        after_font()
    return Classes(points, has)


def cached_classes(
    folder: Path, faces: Sequence[Face], after_font: Callable[[], None] = lambda: None
) -> Classes:
    """:func:`find_classes`, from ``classes.npz`` in the folder if that is of the same fonts."""
    file = folder / "classes.npz"
    key = "; ".join(
        [
            f"Pillow {PIL.__version__}",
            *(f"{part.start:x}-{part.stop:x}" for part in HAN_AND_HANGUL),
            *(f"{face.path.name} {face.index} {face.path.stat().st_size}" for face in faces),
        ]
    )
    if file.exists():
        with np.load(file) as stored:
            if str(stored["key"]) == key:
                for _ in faces:
                    after_font()
                return Classes(stored["code_points"], stored["has"])
    found = find_classes(faces, after_font=after_font)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, key=key, code_points=found.code_points, has=found.has)
    return found
