"""Local parts of tensors, and the rest of a state around them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """This process's part of a tensor.

    tensor: the part. offset: where it begins in the full tensor, whose shape is ``size``. split:
    processes have different parts; otherwise all have the full one, and the first one's is saved.
    """

    tensor: Tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]
    split: bool

    @staticmethod
    def of(name: str, value: Tensor) -> Piece:
        """The local part of a DTensor; any other tensor is complete.

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
        """The rows from ``start`` on of a tensor with ``num_rows`` rows."""
        offset = (start, *(0,) * (rows.dim() - 1))
        return Piece(rows.detach(), offset, (num_rows, *rows.shape[1:]), True)

    def part(self, offset: Iterable[int], sizes: Iterable[int]) -> Tensor:
        """A view of the region at an offset in the full tensor."""
        part = self.tensor
        for dim, (start, here, length) in enumerate(zip(offset, self.offset, sizes, strict=True)):
            part = part.narrow(dim, start - here, length)
        return part

    def with_tensor(self, tensor: Tensor) -> Piece:
        return Piece(tensor, self.offset, self.size, self.split)

    def empty(self, dtype: torch.dtype) -> Piece:
        """An empty tensor for the same part, to read into, on the host."""
        return self.with_tensor(torch.empty(self.tensor.shape, dtype=dtype, device="cpu"))

    def back(self, value: Tensor) -> Tensor:
        """This part as the same kind of tensor as ``value``, whose layout it has."""
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
    """Placeholder in a state for a tensor that is stored under this name."""

    name: str


def replace(kind: type, value: Any, name: str, by: Callable[[str, Any], Any]) -> Any:
    """``value`` with ``by(name, part)`` for every part of a kind in its dicts, lists and tuples.

    Names are ``name`` and the keys, joined by dots. The containers are copied.
    """
    if isinstance(value, kind):
        return by(name, value)
    if isinstance(value, dict):
        copied = copy.copy(value)  # same type, with its attributes
        for key, part in value.items():
            copied[key] = replace(kind, part, f"{name}.{key}", by)
        return copied
    if type(value) in (list, tuple):
        return type(value)(replace(kind, part, f"{name}.{i}", by) for i, part in enumerate(value))
    return value


def take_out(state: Any, name: str, pieces: dict[str, Piece], piece_of=Piece.of) -> Any:
    """The state with :class:`Place` instead of tensors, which go to ``pieces``.

    Raises:
        ValueError: two tensors would have the same name.
    """

    def put(name: str, tensor: Tensor) -> Place:
        if name in pieces:
            raise ValueError(f"two tensors would be stored as {name!r}: name the objects otherwise")
        pieces[name] = piece_of(name, tensor)
        return Place(name)

    return replace(Tensor, state, name, put)


def put_back(state: Any, tensor_of: Callable[[str], Tensor]) -> Any:
    """Reverses :func:`take_out`."""
    return replace(Place, state, "", lambda _, place: tensor_of(place.name))
