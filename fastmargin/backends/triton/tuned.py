"""The user's own tile shapes: the file that ``fastmargin tune`` writes, and what applies here.

The file is JSON, at ``$FASTMARGIN_TUNED`` (empty: no file) or else in the user's cache folder. It
is read once, at the first choice of a tile. An entry applies only to the GPU model, Triton version
and fastmargin version it was measured with. A choice depends only on its arguments and on the table
read. Needs no Triton.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

VARIABLE = "FASTMARGIN_TUNED"
FORMAT = 1
KERNELS = ("stats_pull", "stats_sum", "centre_pass", "topk")
BLOCKS = ("block_b", "block_c", "block_k", "block_d")
FIELDS = (*BLOCKS, "num_warps", "num_stages")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
MOST_TILE_ROWS = 128
"""Most rows of a tile of the centre pass, whose loop reads past the batch without a mask."""
INTERPRETER = "interpreter"
"""Name of the device in Triton's interpreter, whose compute capability is 0."""

Tiles = Mapping[tuple[str, int, str, int], dict[str, int]]
"""(kernel, D, precision, compute capability) -> the six numbers of a TileConfig."""


class TableError(ValueError):
    """A table cannot be read; the message names the file and the remedy."""


def fault(kernel: str, tile: object) -> str | None:
    """Why this is not a valid tile for the kernel, or None."""
    if kernel not in KERNELS:
        return f"unknown kernel {kernel!r}, want one of {', '.join(KERNELS)}"
    if not isinstance(tile, dict) or set(tile) != set(FIELDS):
        return f"a tile has the numbers {', '.join(FIELDS)}"
    for name, value in tile.items():
        if type(value) is not int:
            return f"{name} must be a whole number, got {value!r}"
        least, most = (16, 1024) if name in BLOCKS else (1, 32 if name == "num_warps" else 8)
        if not least <= value <= most:
            return f"{name} must be from {least} to {most}, got {value}"
        if name != "num_stages" and value & (value - 1):
            return f"{name} must be a power of two, got {value}"
    if kernel == "centre_pass" and tile["block_b"] > MOST_TILE_ROWS:
        return f"block_b of centre_pass must be at most {MOST_TILE_ROWS}, got {tile['block_b']}"
    return None


@dataclass(frozen=True)
class Entry:
    """A tile, and what it was measured on.

    device: name of the GPU. arch: its compute capability, 90 for 9.0. triton, fastmargin:
    versions. tile: the six numbers. made: its origin: torch, date, shape, median times in ms of
    the shipped tile and of this one.
    """

    kernel: str
    dim: int
    precision: str
    device: str
    arch: int
    triton: str
    fastmargin: str
    tile: dict[str, int]
    made: dict[str, object] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int, str, str, int, str, str]:
        """An entry replaces the one with the same key."""
        problem = self.kernel, self.dim, self.precision
        return *problem, self.device, self.arch, self.triton, self.fastmargin

    @staticmethod
    def of(raw: object) -> Entry:
        """From JSON.

        Raises:
            ValueError: it is not a valid entry; says why.
        """
        if not isinstance(raw, dict):
            raise ValueError(f"an entry is an object, got {raw!r}")
        kinds = {"dim": int, "arch": int, "made": dict, "tile": dict}
        values = {}
        for name in Entry.__dataclass_fields__:
            value = raw.get(name, {} if name == "made" else None)
            kind = kinds.get(name, str)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
            values[name] = value
        if values["dim"] < 1:
            raise ValueError(f"dim must be at least 1, got {values['dim']}")
        if values["precision"] not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ValueError(f"precision must be one of {known}, got {values['precision']!r}")
        reason = fault(values["kernel"], values["tile"])
        if reason:
            raise ValueError(reason)
        return Entry(**values)


@dataclass(frozen=True)
class Table:
    """Contents of a file: the entries, and why others were rejected."""

    entries: tuple[Entry, ...] = ()
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Here:
    """What entries must have been measured on to apply in this process.

    devices: compute capability -> names of the GPUs that have it.
    """

    devices: Mapping[int, frozenset[str]]
    triton: str | None
    fastmargin: str

    def objection(self, entry: Entry) -> str | None:
        """Why the entry does not apply here, or None."""
        names = self.devices.get(entry.arch, frozenset())
        if entry.device not in names:
            return f"there is no {entry.device} here"
        if len(names) > 1:
            return f"GPUs of several names have its compute capability: {', '.join(sorted(names))}"
        if entry.triton != self.triton:
            return f"measured with triton {entry.triton}, this is {self.triton}"
        if entry.fastmargin != self.fastmargin:
            return f"measured with fastmargin {entry.fastmargin}, this is {self.fastmargin}"
        return None


def here() -> Here:
    """:class:`Here` for this process."""
    import fastmargin

    try:
        import triton
    except ImportError:
        version = None
    else:
        version = triton.__version__
    found: dict[int, set[str]] = {}
    if os.environ.get("TRITON_INTERPRET") == "1":
        found[0] = {INTERPRETER}
    elif torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            found.setdefault(gpu.major * 10 + gpu.minor, set()).add(gpu.name)
    devices = {arch: frozenset(names) for arch, names in found.items()}
    return Here(devices, version, fastmargin.__version__)


# ---- the file ----


def user_file() -> Path | None:
    """Path of the user's table, existing or not; None if turned off."""
    named = os.environ.get(VARIABLE)
    if named is not None and not named.strip():
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(named or f"{cache}/fastmargin/tuned.json").expanduser()
    except RuntimeError:  # a user without a home folder, as in some containers
        return None


def why_none() -> str:
    """Why :func:`user_file` is None."""
    return "there is no home folder" if VARIABLE not in os.environ else f"{VARIABLE} is empty"


def read(file: Path) -> Table:
    """The table in a file, an empty one if there is no such file.

    Raises:
        TableError: it cannot be read or is not a table.
    """
    remedy = "delete it or name another (fastmargin tune --reset deletes the user's own)"
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        return Table()
    except (OSError, ValueError) as error:
        raise TableError(
            f"cannot read the table of tile shapes {file}: {error}; {remedy}"
        ) from error
    if not isinstance(raw, dict) or not isinstance(raw.get("entries"), list):
        raise TableError(f"{file} is no table of tile shapes: it has no list 'entries'; {remedy}")
    if raw.get("format") != FORMAT:
        raise TableError(
            f"{file} has format {raw.get('format')!r}, this version reads {FORMAT}; {remedy}"
        )
    entries, refused = {}, []
    for i, item in enumerate(raw["entries"]):
        try:
            entry = Entry.of(item)
        except ValueError as error:
            refused.append(f"entry {i}: {error}")
        else:
            entries[entry.key] = entry
    return Table(tuple(entries.values()), tuple(refused))


def write(file: Path, entries: Iterable[Entry]) -> None:
    """Writes a table atomically: other processes see the old one or the new one.

    Raises:
        OSError: it cannot be written; the old one is unchanged.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "entries": [asdict(e) for e in entries]}, indent=1)
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text + "\n")
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def merge(file: Path, made: Entry | None, key: tuple) -> None:
    """Replaces the entry with this key; None removes it.

    Raises:
        TableError, OSError: as :func:`read` and :func:`write`; the file is unchanged.
    """
    old = read(file).entries
    kept = [entry for entry in old if entry.key != key]
    if made is not None:
        kept.append(made)
    if made is not None or len(kept) < len(old):
        write(file, kept)


# ---- the choice ----

_lock = threading.Lock()
_read: Tiles | None = None
# of the process and not of a thread: autograd runs the backward pass in another
_injected: Tiles | None = None


def applicable(table: Table, at: Here) -> Tiles:
    """The tiles of the entries that apply here."""
    counting = (entry for entry in table.entries if at.objection(entry) is None)
    return {(e.kernel, e.dim, e.precision, e.arch): e.tile for e in counting}


def lookup(kernel: str, d: int, precision: str, arch: int) -> dict[str, int] | None:
    """The six numbers of the user's tile for exactly this width, or None."""
    tiles = _user_tiles() if _injected is None else _injected
    return tiles.get((kernel, d, precision, arch))


@contextlib.contextmanager
def using(tiles: Tiles) -> Iterator[None]:
    """In this block ``tiles`` replaces the user's table; {}: shipped tiles only."""
    global _injected
    before, _injected = _injected, tiles
    try:
        yield
    finally:
        _injected = before


def _user_tiles() -> Tiles:
    global _read
    if _read is None:
        with _lock:
            if _read is None:
                _read = _load()
    return _read


def forget() -> None:
    """Makes the next choice read the file again."""
    global _read
    _read = None


def _load() -> Tiles:
    """The user's tiles; warns once about problems of the file."""
    file = user_file()
    if file is None:
        return {}
    if not os.path.exists(file):  # False, too, in a folder that is not ours to look into
        if os.environ.get(VARIABLE):
            _warn(f"{VARIABLE} names {file}, which does not exist: tile shapes are as shipped")
        return {}
    try:
        table = read(file)
    except TableError as error:
        _warn(f"tile shapes are as shipped: {error}")
        return {}
    if table.refused:
        _warn(f"parts of the table of tile shapes {file} are left out: {'; '.join(table.refused)}")
    return applicable(table, here()) if table.entries else {}


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)


def describe() -> dict[str, object]:
    """The user's table for reports.

    ``file``: its path, None if turned off. ``exists``. ``entries``: how many it has. ``applied``:
    how many apply here. ``left_out``: reasons for the others, or the error of an unreadable file.
    """
    file = user_file()
    found: dict[str, object] = {
        "file": None if file is None else str(file),
        "exists": file is not None and os.path.exists(file),
        "entries": 0,
        "applied": 0,
        "left_out": [],
    }
    if not found["exists"]:
        return found
    try:
        table = read(file)
    except TableError as error:
        return found | {"left_out": [str(error)]}
    at = here()
    objections = [at.objection(entry) for entry in table.entries]
    reasons = dict.fromkeys([*table.refused, *filter(None, objections)])
    return found | {
        "entries": len(table.entries),
        "applied": objections.count(None),
        "left_out": list(reasons),
    }
