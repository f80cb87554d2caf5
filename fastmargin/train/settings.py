"""Options of ``fastmargin train``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmargin.margins import BY_NAME, Margin

REFERENCE_ROWS, REFERENCE_LR = 1024, 0.1
"""insightface's learning rate, and the rows per step that it has on 8 GPUs."""

NOT_SETTABLE = {"class_counts", "features", "num_samples", "memory_momentum"}
"""Of KappaFace: counts come from the data; other features need a training loop of one's own."""


class TrainError(RuntimeError):
    """Training cannot start or go on; the message says why and how to fix it."""


def last_line(error: Exception) -> str:
    """The message of an error, without the traceback that a loading process puts before it."""
    return str(error).strip().rpartition("\n")[2]


@dataclass(frozen=True)
class Settings:
    """See ``fastmargin train --help``; ``batch`` and ``workers`` are per process.

    lr: None for insightface's 0.1 per 1,024 rows of a step, over all processes.
    """

    data: Path
    out: Path
    validation: tuple[Path, ...] = ()
    backbone: str = "iresnet50"
    pretrained: Path | None = None
    embedding_size: int = 512
    image_size: int = 112
    margin: str = "arcface"
    margin_settings: tuple[str, ...] = ()
    sample_rate: float = 1.0
    epochs: int = 20
    batch: int = 128
    lr: float | None = None
    warm_up: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 5.0
    seed: int = 0
    device: str = "auto"
    workers: int = 4
    save_every: int = 2000
    resume: bool = False

    def rate(self, rows: int, progress: float) -> float:
        """Learning rate for steps of ``rows`` rows after ``progress`` epochs."""
        top = REFERENCE_LR * rows / REFERENCE_ROWS if self.lr is None else self.lr
        if progress < self.warm_up:
            return top * progress / self.warm_up
        return top * (1 - (progress - self.warm_up) / (self.epochs - self.warm_up)) ** 2

    def recipe(self) -> dict[str, Any]:
        """The options that must be the same when training is resumed."""
        names = ("backbone", "embedding_size", "image_size", "sample_rate")
        names += ("momentum", "weight_decay", "seed")
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """Raises TrainError for a number out of range."""
        if self.margin not in BY_NAME:
            raise TrainError(f"--margin must be one of {', '.join(BY_NAME)}, got {self.margin!r}")
        for name in ("embedding_size", "image_size", "epochs", "save_every"):
            if getattr(self, name) < 1:
                raise TrainError(f"{_option(name)} must be at least 1, got {getattr(self, name)}")
        if self.batch < 2:
            raise TrainError(f"--batch must be at least 2, for batch norms, got {self.batch}")
        if not 0 <= self.seed < 2**63:
            raise TrainError(f"--seed must be in [0, 2^63), got {self.seed}")
        for name in ("momentum", "weight_decay", "workers"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise TrainError(f"{_option(name)} must not be negative, got {getattr(self, name)}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise TrainError(f"--lr must be positive, got {self.lr}")
        if not self.clip > 0:
            raise TrainError(f"--clip must be positive (inf for none), got {self.clip}")
        if not 0 <= self.warm_up < self.epochs:
            raise TrainError(f"--warm-up must be at least 0 and below --epochs, got {self.warm_up}")
        if not 0 < self.sample_rate <= 1:
            raise TrainError(f"--sample-rate must be in (0, 1], got {self.sample_rate}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def new_margin(name: str, texts: tuple[str, ...], class_counts) -> Margin:
    """The margin of that name with settings such as "m=0.4".

    Raises:
        TrainError: an unknown setting, or a value that the margin refuses.
    """
    kind = BY_NAME[name]
    defaults = {p.name: p.default for p in inspect.signature(kind).parameters.values()}
    given: dict[str, Any] = {}
    if "class_counts" in defaults:
        given["class_counts"] = class_counts()
    for key in NOT_SETTABLE & defaults.keys():
        del defaults[key]
    for text in texts:
        key, _, value = text.partition("=")
        if key not in defaults:
            raise TrainError(f"--setting {text!r}: {name} has {', '.join(defaults)}, not {key!r}")
        given[key] = _value(text, value, defaults[key])
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise TrainError(f"--margin {name}: {error}") from error


def _value(text: str, value: str, default: Any) -> Any:
    """The value as the type of the default."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        return type(default)(value)
    except (KeyError, TypeError, ValueError):
        kind = type(default).__name__
        raise TrainError(f"--setting {text!r}: expected a {kind}, such as {default!r}") from None
