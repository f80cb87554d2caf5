"""Glyphs as tensors: those to train on, and those of the font that is held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.glyphs.classes import Classes
from benchmarks.glyphs.drawing import Pen
from benchmarks.glyphs.fonts import Face, Font

SIDE = 32


@dataclass(frozen=True)
class Glyphs:
    """Images and what is on them.

    pixels: [N, 1, 32, 32] uint8, 0 where there is no ink. labels: [N] int64 classes.
    """

    pixels: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Glyphs:
        """The same on another device."""
        return Glyphs(self.pixels.to(device), self.labels.to(device))

    def images(self, rows: Tensor | slice) -> Tensor:
        """[B, 1, 32, 32] float32, grey values 0..1."""
        return self.pixels[rows].float() / 255


@dataclass(frozen=True)
class Split:
    """``training`` has 3 or more glyphs of every class, ``unseen`` at most one, by another font."""

    training: Glyphs
    unseen: Glyphs
    num_classes: int


def draw_split(
    faces: Sequence[Face],
    classes: Classes,
    held_out: Font,
    side: int = SIDE,
    after_font: Callable[[], None] = lambda: None,
) -> Split:
    """Every class by every face that has it, font after font.

    Raises:
        ValueError: the held-out font is not among the faces or has none of the classes, or a
            class has no glyph to train on.
    """
    fonts = [face.font for face in faces]
    if held_out not in fonts:
        raise ValueError(f"the font to hold out, {held_out.name}, is not among the fonts")
    column = fonts.index(held_out)
    if not classes.has[:, column].any():
        raise ValueError(f"{held_out.name} has none of the {len(classes.has)} characters")
    if not np.delete(classes.has, column, axis=1).any(axis=1).all():
        raise ValueError(f"some characters are in {held_out.name} only: ask for two fonts or more")
    drawn = []
    for face, has in zip(faces, classes.has.T, strict=True):
        pen = Pen(face, side)
        labels = np.flatnonzero(has)
        data = b"".join(pen.draw(chr(point)) for point in classes.code_points[labels])
        pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, 1, side, side)
        drawn.append(Glyphs(pixels, torch.from_numpy(labels)))
        after_font()
    unseen = drawn.pop(column)
    training = Glyphs(
        torch.cat([glyphs.pixels for glyphs in drawn]),
        torch.cat([glyphs.labels for glyphs in drawn]),
    )
    return Split(training, unseen, len(classes.code_points))
