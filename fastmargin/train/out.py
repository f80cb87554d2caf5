"""The folder of a run: its log, its network, and that no other run writes there."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmargin.data.written_whole import written_whole
from fastmargin.train.settings import TrainError

Figures = dict[str, Any]


class Out:
    """``log.jsonl`` and ``backbone.pt`` of a run, on its first process.

    Raises:
        TrainError: the folder cannot be written, or another run is writing there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._log = open(folder / "log.jsonl", "a+")
        except OSError as error:
            raise TrainError(f"--out {folder} cannot be written: {error}") from error
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
        except BlockingIOError as error:
            self._log.close()
            raise TrainError(f"another run is writing to {folder}: choose another --out") from error

    def close(self) -> None:
        """Closes the log, and lets other runs write here."""
        fcntl.flock(self._log, fcntl.LOCK_UN)  # forked workers may still have it open
        self._log.close()

    def epochs(self) -> list[Figures]:
        """The figures of all epochs so far, of earlier runs, too."""
        self._log.seek(0)
        return [json.loads(line) for line in self._log if line.endswith("\n")]

    def add(self, figures: Figures) -> None:
        """Appends the figures of an epoch to the log."""
        self._log.write(json.dumps(figures) + "\n")
        self._log.flush()

    def write_backbone(self, state: dict[str, Tensor]) -> None:
        """Replaces the network's ``state_dict``, once it is written completely."""
        with written_whole(self.folder / "backbone.pt") as file:
            torch.save({name: value.cpu() for name, value in state.items()}, file)
