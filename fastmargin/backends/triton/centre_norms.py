"""1 / ||w|| of every centre, once per pass over them.

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
from fastmargin.backends.triton.tile import inverse_norms, row_pointer


@triton.jit(do_not_specialize=["C"])
def centre_norms_kernel(
    p_w,  # (C, D) strided
    p_inverse,  # (C,) fp32
    C,
    stride_wc,
    stride_wd,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_c = tl.program_id(0).to(tl.int64)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_wc = row_pointer(p_w, i_c * BLOCK_C, stride_wc, D, PACKED)
    b_inverse = inverse_norms(p_wc, m_c, stride_wc, stride_wd, D, BLOCK_C, BLOCK_D, PACKED)
    tl.store(p_inverse + o_c, b_inverse, mask=m_c)


def constants(d: int, packed: bool) -> dict:
    """Compile-time arguments."""
    block_d = min(block_of(d), 128)
    return {"PACKED": packed, "D": d, "BLOCK_C": 32, "BLOCK_D": block_d, "num_warps": 4}


def centre_norms(weight: Tensor) -> Tensor:
    """Inverse norms (C,) of the rows of ``weight`` (C, D), fp32."""
    c, d = weight.shape
    out = torch.empty(c, dtype=torch.float32, device=weight.device)
    fixed = constants(d, is_packed(weight))
    with on_device(weight):
        centre_norms_kernel[(triton.cdiv(c, fixed["BLOCK_C"]),)](
            weight, out, c, weight.stride(0), weight.stride(1), **fixed
        )
    return out
