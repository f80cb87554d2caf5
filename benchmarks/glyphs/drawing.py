"""Characters as small grey images, and which characters a font has."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont

from benchmarks.glyphs.fonts import Face

# not a character and never one: every font answers with its mark for what is missing (.notdef)
NO_CHARACTER = "\U0010ffff"
INK_SHARE = 0.85  # of the image's side: leaves room for shifts
EM_SHARE = 2  # drawn larger, then reduced
COVERAGE_SIZE = 12


class Pen:
    """Draws characters of one face on images of ``side`` x ``side`` pixels."""

    def __init__(self, face: Face, side: int) -> None:
        self.side = side
        self.font: ImageFont.FreeTypeFont = face.open(EM_SHARE * side)

    def draw(self, character: str) -> bytes:
        """Grey values row by row, 0 where there is no ink.

        The ink is centred and as large as fits, as faces are aligned: fonts differ in how much
        of the em they fill.
        """
        left, top, right, bottom = self.font.getbbox(character)  # holds the advance too
        drawn = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(drawn).text((-left, -top), character, fill=255, font=self.font)
        ink = drawn.crop(drawn.getbbox())
        scale = INK_SHARE * self.side / max(ink.size)
        size = [max(1, round(scale * length)) for length in ink.size]
        image = Image.new("L", (self.side, self.side))
        corner = (self.side - size[0]) // 2, (self.side - size[1]) // 2
        image.paste(ink.resize(size, Image.Resampling.BOX), corner)
        return image.tobytes()


def has_glyph(face: Face) -> Callable[[str], bool]:
    """A test whether the face has a character: not its mark for what is missing, and not blank."""
    font = face.open(COVERAGE_SIZE)

    def draw(character: str) -> tuple:
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    missing = draw(NO_CHARACTER)

    def has(character: str) -> bool:
        drawn = draw(character)
        return drawn != missing and any(drawn[1])

    return has
