"""Characters as small grey images, and which characters a font has."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from benchmarks.glyphs.fonts import Face

# not a character and never one: every font answers with its mark for what is missing (.notdef)
NO_CHARACTER = "\U0010ffff"
EM_SHARE = 0.85  # of the image's side: leaves room for shifts
COVERAGE_SIDE = 16


class Pen:
    """Draws characters of one face on images of ``side`` x ``side`` pixels."""

    def __init__(self, face: Face, side: int) -> None:
        self.side = side
        self.font: ImageFont.FreeTypeFont = face.open(round(EM_SHARE * side))
        self.absent = {self.draw(NO_CHARACTER), bytes(side * side)}

    def draw(self, character: str) -> bytes:
        """Grey values row by row, 0 where there is no ink; the ink is centred."""
        left, top, right, bottom = self.font.getbbox(character)
        image = Image.new("L", (self.side, self.side))
        corner = (self.side - left - right) // 2, (self.side - top - bottom) // 2
        ImageDraw.Draw(image).text(corner, character, fill=255, font=self.font)
        return image.tobytes()

    def has(self, character: str) -> bool:
        """Whether the font has it: not the mark for what is missing, and not blank."""
        return self.draw(character) not in self.absent
