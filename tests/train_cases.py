"""Faces, and the command, for the tests of ``fastmargin train``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastmargin.cli import app
from fastmargin.train.backbones import new_backbone

Image = pytest.importorskip("PIL.Image")

PEOPLE, IMAGES, SIZE = 6, 9, 16
SMALL = ("--backbone", "tiny_backbone:make", "--embedding-size", "16", "--image-size", str(SIZE))
SMALL += ("--workers", "0", "--batch", "8", "--lr", "0.1", "--device", "cpu")


def write_faces(folder: Path, people: int, seed: int) -> Path:
    """Noisy copies of one random image per person."""
    generator = torch.Generator().manual_seed(seed)
    for person in range(people):
        (folder / f"p{person}").mkdir(parents=True)
        face = torch.rand(SIZE, SIZE, 3, generator=generator)
        for image in range(IMAGES):
            noise = torch.rand(SIZE, SIZE, 3, generator=generator)
            pixels = (255 * (0.7 * face + 0.3 * noise)).byte()
            Image.fromarray(pixels.numpy()).save(folder / f"p{person}" / f"{image}.png")
    return folder


def train(*args):
    """The result of the command, and its figures if it succeeded."""
    result = CliRunner().invoke(app, ["train", *map(str, args), "--json"], env={"COLUMNS": "200"})
    return result, json.loads(result.stdout) if result.exit_code == 0 else None


def new_backbone_of(seed, name="tiny_backbone:make"):
    torch.manual_seed(seed)
    return new_backbone(name, 16, SIZE)
