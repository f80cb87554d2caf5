"""The folder of a run: its log, its network, and that no other run writes there."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmargin.data.written_whole import written_whole
from fastmargin.train.settings import TrainError

PATIENCE = 10.0
"""Seconds: as long as the workers of a killed run may live on, and hold its lock."""

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
            self._log = open(folder / "log.jsonl", "a+b")
        except OSError as error:
            raise TrainError(f"--out {folder} cannot be written: {error}") from error
        try:
            self._lock()
            self._drop_torn_line()
        except Exception:
            self._log.close()
            raise

    def _lock(self) -> None:
        """Keeps other runs out until :meth:`close`."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise TrainError(
                        f"another run is writing to {self.folder}: choose another --out"
                    ) from error
                time.sleep(0.5)
            except OSError as error:
                raise TrainError(
                    f"--out {self.folder} cannot be locked ({error}): choose another file system"
                ) from error

    def _drop_torn_line(self) -> None:
        """Removes what a stop in the middle of writing has left at the end of the log."""
        self._log.seek(0)
        self._log.truncate(self._log.read().rfind(b"\n") + 1)

    @property
    def backbone(self) -> Path:
        return self.folder / "backbone.pt"

    def close(self) -> None:
        """Closes the log, and lets other runs write here."""
        fcntl.flock(self._log, fcntl.LOCK_UN)  # forked workers may still have it open
        self._log.close()

    def epochs(self) -> list[Figures]:
        """The figures of all epochs so far, of earlier runs, too."""
        self._log.seek(0)
        return [json.loads(line) for line in self._log]

    def add(self, figures: Figures) -> None:
        """Appends the figures of an epoch to the log."""
        self._log.write(json.dumps(figures).encode() + b"\n")
        self._log.flush()

    def write_backbone(self, state: dict[str, Tensor]) -> None:
        """Replaces the network's ``state_dict``, once it is written completely."""
        with written_whole(self.backbone) as file:
            torch.save({name: value.cpu() for name, value in state.items()}, file)
