"""Class centres as the passes read them: contiguous rows in the operand type.

The passes read each tile of centres once per block of embeddings, so index, strides, norm and cast
are resolved once, here. Columns are *staged* piece by piece as unit rows in a buffer whose size
does not depend on C; the passes load tiles from there by tensor descriptors, which take no
registers. Centres that already have the operand type are staged, too; docs/design.md says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastmargin.backends.triton.configs import (
    DOT_PRECISION,
    OPERAND_DTYPES,
    block_of,
    is_packed,
    operand_width,
)
from fastmargin.backends.triton.launch import NO_SPILLS, on_device
from fastmargin.backends.triton.tile import (
    indexed_rows,
    inverse_norms,
    load_rows,
    operand,
    row_pointer,
)

STAGED_BYTES = 256 << 20
"""Most bytes staged at a time."""


@dataclass(frozen=True)
class Centres:
    """A piece of the columns of a pass.

    start: the first of them.
    operand: (n, D') unit rows in the operand type, D' >= D with zeros past D.
    inverse: (n,) 1 / ||w|| in fp32, 0 for a (nearly) zero centre, -1 in a padding slot.
    gaps: whether there may be padding slots.
    """

    start: int
    operand: Tensor
    inverse: Tensor
    gaps: bool


def as_operand(x_hat: Tensor, precision: str) -> Tensor:
    """Unit rows (B, D) as (B, D') in the operand type."""
    dtype = OPERAND_DTYPES[precision]
    if precision == "tf32":  # to nearest, as `tile.operand` does
        bits = (x_hat.view(torch.int32) + 0x1000) & -0x2000
        x_hat = torch.where(x_hat.isnan(), x_hat, bits.view(torch.float32))
    x_hat, missing = x_hat.to(dtype), operand_width(x_hat.shape[1], dtype) - x_hat.shape[1]
    return torch.nn.functional.pad(x_hat, (0, missing)) if missing else x_hat.contiguous()


def blocks_of(rows: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    """Tensor descriptor for blocks of contiguous (n, D') rows; reads zeros beyond the edges."""
    return TensorDescriptor.from_tensor(rows, [block_rows, block_columns])


def columns_at_a_time(row_bytes: int) -> int:
    """Number of unit rows staged at a time."""
    return max(1, STAGED_BYTES // row_bytes)


def centres_of(weight: Tensor, index: Tensor | None, precision: str) -> Iterator[Centres]:
    """The columns of a pass, piece by piece. Each piece overwrites the one before.

    Args:
        weight: (C, D), C > 0.
        index: (K,) contiguous, K > 0, or None.
        precision: one of "fp32", "tf32", "bf16", "fp16".
    """
    count, d = weight.shape[0] if index is None else index.shape[0], weight.shape[1]
    dtype = OPERAND_DTYPES[precision]
    width = operand_width(d, dtype)
    step = columns_at_a_time(width * dtype.itemsize)
    inverse = torch.empty(min(step, count), dtype=torch.float32, device=weight.device)
    operand = torch.empty((len(inverse), width), dtype=dtype, device=weight.device)
    for start in range(0, count, step):
        n = min(step, count - start)
        rows, places = weight, None if index is None else index[start : start + n]
        if index is None:
            rows = weight[start : start + n]
        stage(rows, places, precision, inverse[:n], operand[:n])
        yield Centres(start, operand[:n], inverse[:n], index is not None)


def kept(centres: Centres, columns: int) -> tuple[Tensor, Tensor]:
    """Unit rows and inverse norms, for reuse in a backward pass, if these are all columns."""
    if len(centres.inverse) < columns:
        return centres.inverse.new_empty(0), centres.inverse.new_empty(0)
    return centres.operand, centres.inverse


def centres_again(
    weight: Tensor, index: Tensor | None, precision: str, operand: Tensor, inverse: Tensor
) -> Iterator[Centres]:
    """As :func:`centres_of`, but reuses what :func:`kept` returned, if anything."""
    if inverse.numel():
        yield Centres(0, operand, inverse, index is not None)
    else:
        yield from centres_of(weight, index, precision)


@triton.jit(do_not_specialize=["C", "rows_w"])
def stage_kernel(
    p_w,  # (rows_w, D) strided
    p_index,  # (C,) int64, their rows that are columns of the pass, if INDEXED
    p_operand,  # (C, WIDTH) contiguous unit rows, out
    p_inverse,  # (C,) fp32, out
    C,
    rows_w,
    stride_wc,
    stride_wd,
    PACKED: tl.constexpr,
    INDEXED: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_c = tl.program_id(0).to(tl.int64)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if INDEXED:
        p_wc, m_c = indexed_rows(p_w, p_index, o_c, C, rows_w, stride_wc, D, PACKED)
    else:
        p_wc = row_pointer(p_w, i_c * BLOCK_C, stride_wc, D, PACKED)
    b_inverse = inverse_norms(p_wc, m_c, stride_wc, stride_wd, D, BLOCK_C, BLOCK_D, PACKED, INDEXED)
    tl.store(p_inverse + o_c, tl.where(m_c, b_inverse, -1.0), mask=o_c < C)
    for start in range(0, WIDTH, BLOCK_D):
        b_tile = load_rows(
            p_wc,
            m_c,
            stride_wc,
            stride_wd,
            start,
            D,
            BLOCK_C,
            BLOCK_D,
            PACKED,
            INDEXED,
            D % BLOCK_D != 0,
        )
        b_tile = b_tile.to(tl.float32) * b_inverse[:, None]
        b_tile = operand(b_tile, p_operand.dtype.element_ty, PRECISION)
        o_d = start + tl.arange(0, BLOCK_D)
        p_tile = p_operand + (o_c[:, None] * WIDTH + o_d[None, :])
        tl.store(p_tile, b_tile, mask=(o_c < C)[:, None] & (o_d < WIDTH)[None, :])


def constants(d: int, packed: bool, indexed: bool, width: int, precision: str) -> dict:
    """Compile-time arguments."""
    return {
        "PACKED": packed,
        "INDEXED": indexed,
        "D": d,
        "WIDTH": width,
        "PRECISION": DOT_PRECISION[precision],
        "BLOCK_C": 16,
        "BLOCK_D": min(block_of(d), 128),
        "num_warps": 4,
        **NO_SPILLS,
    }


def stage(
    weight: Tensor, index: Tensor | None, precision: str, inverse: Tensor, unit: Tensor
) -> None:
    """Fills in inverse norms (n,) and unit rows (n, D') of ``weight`` (C, D) or of its rows."""
    n, d = inverse.shape[0], weight.shape[1]
    fixed = constants(d, is_packed(weight), index is not None, unit.shape[1], precision)
    with on_device(weight):
        stage_kernel[(triton.cdiv(n, fixed["BLOCK_C"]),)](
            weight,
            index,
            unit,
            inverse,
            n,
            weight.shape[0],
            weight.stride(0),
            weight.stride(1),
            **fixed,
        )
