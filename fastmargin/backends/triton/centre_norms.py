"""1 / ||w|| of every centre of a pass, once per pass.

The passes need it before they cast a tile to the operand type, and a pass that splits D never
holds a whole row. Recomputing it in each of the B / BLOCK_B programs that stream a tile would cost
a tenth of their arithmetic; one more read of W and 4 bytes per class cost less.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmargin.backends.triton.configs import block_of, is_packed
from fastmargin.backends.triton.launch import on_device
from fastmargin.backends.triton.tile import indexed_rows, inverse_norms, row_pointer


@triton.jit(do_not_specialize=["C", "rows_w"])
def centre_norms_kernel(
    p_w,  # (rows_w, D) strided
    p_index,  # (C,) int64, their rows that are columns of the pass, if INDEXED
    p_inverse,  # (C,) fp32
    C,
    rows_w,
    stride_wc,
    stride_wd,
    PACKED: tl.constexpr,
    INDEXED: tl.constexpr,
    D: tl.constexpr,
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
    tl.store(p_inverse + o_c, b_inverse, mask=o_c < C)


def constants(d: int, packed: bool, indexed: bool) -> dict:
    """Compile-time arguments."""
    return {
        "PACKED": packed,
        "INDEXED": indexed,
        "D": d,
        "BLOCK_C": 32,
        "BLOCK_D": min(block_of(d), 128),
        "num_warps": 4,
    }


def centre_norms(weight: Tensor, index: Tensor | None) -> Tensor:
    """Inverse norms of the rows of ``weight`` (C, D): (C,), or (K,) of those in ``index``; fp32.

    The index is contiguous; 0 at its empty places.
    """
    c, d = weight.shape[0] if index is None else index.shape[0], weight.shape[1]
    out = torch.empty(c, dtype=torch.float32, device=weight.device)
    fixed = constants(d, is_packed(weight), index is not None)
    with on_device(weight):
        centre_norms_kernel[(triton.cdiv(c, fixed["BLOCK_C"]),)](
            weight,
            index,
            out,
            c,
            weight.shape[0],
            weight.stride(0),
            weight.stride(1),
            **fixed,
        )
    return out
