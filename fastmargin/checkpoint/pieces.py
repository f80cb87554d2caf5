"""Tensors of which a process has a part, and what lies in between them in a state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """The part of a tensor that is on this process.

    tensor: the part. offset: where it begins in the whole, whose shape is ``size``. split: the
    processes have different parts; otherwise all have the whole, and that of the first counts.
    """

    tensor: Tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]
    split: bool

    @staticmethod
    def of(name: str, value: Tensor) -> Piece:
        """Of a DTensor the part that is here; any other tensor is a whole.

        Raises:
            TypeError: it is not strided, or another kind of distributed tensor.
        """
        value = value.detach()
        if hasattr(value, "placements"):
            (chunk,) = value.__create_chunk_list__()
            return Piece(value.to_local(), tuple(chunk.offsets), tuple(value.shape), True)
        if value.layout != torch.strided or value.is_quantized or hasattr(value, "local_shards"):
            raise TypeError(
                f"{name} is a {type(value).__name__} of layout {value.layout}; a checkpoint takes "
                "strided tensors and DTensors: convert it in its state_dict"
            )
        return Piece(value, (0,) * value.dim(), tuple(value.shape), False)

    @staticmethod
    def of_rows(rows: Tensor, start: int, num_rows: int) -> Piece:
        """Of a tensor of ``num_rows`` rows, those from ``start`` on."""
        offset = (start, *(0,) * (rows.dim() - 1))
        return Piece(rows.detach(), offset, (num_rows, *rows.shape[1:]), True)

    def part(self, offset: Iterable[int], sizes: Iterable[int]) -> Tensor:
        """What lies at an offset in the whole, a view."""
        part = self.tensor
        for dim, (start, here, length) in enumerate(zip(offset, self.offset, sizes, strict=True)):
            part = part.narrow(dim, start - here, length)
        return part

    def with_tensor(self, tensor: Tensor) -> Piece:
        return Piece(tensor, self.offset, self.size, self.split)

    def empty(self, dtype: torch.dtype) -> Piece:
        """The same part, to read into, on the host."""
        return self.with_tensor(torch.empty(self.tensor.shape, dtype=dtype, device="cpu"))

    def back(self, value: Tensor) -> Tensor:
        """This part as the kind of tensor that ``value``, of which it is the layout, was."""
        if not hasattr(value, "placements"):
            return self.tensor
        return type(value).from_local(
            self.tensor,
            value.device_mesh,
            value.placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )


@dataclass(frozen=True)
class Place:
    """Stands in a state for a tensor that is stored under this name."""

    name: str


def replace(kind: type, value: Any, name: str, by: Callable[[str, Any], Any]) -> Any:
    """``value`` with ``by(name, part)`` for every part of a kind in its dicts, lists and tuples.

    Names are ``name`` and the keys, with dots. The containers are copies.
    """
    if isinstance(value, kind):
        return by(name, value)
    if isinstance(value, dict):
        copied = copy.copy(value)  # of its own kind, with its attributes
        for key, part in value.items():
            copied[key] = replace(kind, part, f"{name}.{key}", by)
        return copied
    if type(value) in (list, tuple):
        return type(value)(replace(kind, part, f"{name}.{i}", by) for i, part in enumerate(value))
    return value


def take_out(state: Any, name: str, pieces: dict[str, Piece], piece_of=Piece.of) -> Any:
    """The state with :class:`Place` instead of tensors, which go to ``pieces``.

    Raises:
        ValueError: two tensors would have one name.
    """

    def put(name: str, tensor: Tensor) -> Place:
        if name in pieces:
            raise ValueError(f"two tensors would be stored as {name!r}: name the objects otherwise")
        pieces[name] = piece_of(name, tensor)
        return Place(name)

    return replace(Tensor, state, name, put)


def put_back(state: Any, tensor_of: Callable[[str], Tensor]) -> Any:
    """The state with the tensors that :func:`take_out` took."""
    return replace(Place, state, "", lambda _, place: tensor_of(place.name))
