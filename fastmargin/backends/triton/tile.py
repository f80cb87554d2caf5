"""Arithmetic shared by the kernels.

Names in kernels: ``p_`` pointer, ``d_`` tensor descriptor, ``i_`` index of a program or loop,
``o_`` offsets, ``m_`` mask, ``b_`` value held by the program.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter; fixed at their definition."""

EMULATED: tl.constexpr = tl.constexpr(INTERPRETED)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E_TAIL: tl.constexpr = tl.constexpr(1.92596298909109e-8)  # what fp32 leaves of log2(e)
NORM_FLOOR: tl.constexpr = tl.constexpr(1e-12)

# The power of two that keeps weights of the second product inside fp16. A row's shift follows its
# largest logit lazily: it moves when one passes 2**RISE and then puts that one at 2**START, so
# that moves are rare and weights down to 2**-28 of the largest keep a digit.
NO_SHIFT: tl.constexpr = tl.constexpr(-1048576.0)
RISE: tl.constexpr = tl.constexpr(14.0)
START: tl.constexpr = tl.constexpr(4.0)


@triton.jit
def row_tile(
    p_first,
    stride_row,
    stride_col,
    start,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Pointers to columns ``start .. start + BLOCK`` of ROWS rows of width D.

    The first row is at ``p_first``. PACKED rows lie one after the other, so their offsets within
    the tile are known when compiling, which saves registers; the strides then do not matter.
    Otherwise offsets are int64: the transposed view of (D, C) has strides of C. INDEXED rows lie
    anywhere: ``p_first`` (ROWS,) is where each of them begins.
    """
    o_row = tl.arange(0, ROWS)
    o_col = start + tl.arange(0, BLOCK)
    if INDEXED:
        if PACKED:
            return p_first[:, None] + o_col[None, :]
        else:
            return p_first[:, None] + o_col.to(tl.int64)[None, :] * stride_col
    elif PACKED:
        return p_first + (o_row[:, None] * D + o_col[None, :])
    else:
        o_rows = o_row.to(tl.int64)[:, None] * stride_row
        return p_first + o_rows + o_col.to(tl.int64)[None, :] * stride_col


@triton.jit
def load_rows(
    p_first,
    m_row,
    stride_row,
    stride_col,
    start,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    INDEXED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """What :func:`row_tile` points to; zero where ``m_row`` is false and past column D.

    RAGGED: there may be columns past D.
    """
    p_tile = row_tile(p_first, stride_row, stride_col, start, D, ROWS, BLOCK, PACKED, INDEXED)
    if RAGGED:
        m_col = start + tl.arange(0, BLOCK) < D
        return tl.load(p_tile, mask=m_row[:, None] & m_col[None, :], other=0.0)
    else:
        return tl.load(p_tile, mask=m_row[:, None], other=0.0)


@triton.jit
def row_pointer(p_rows, i_row, stride_row, D: tl.constexpr, PACKED: tl.constexpr):
    """Where row ``i_row`` (int64) begins."""
    if PACKED:
        return p_rows + i_row * D
    else:
        return p_rows + i_row * stride_row


@triton.jit
def indexed_rows(
    p_rows, p_index, o_c, C, rows_w, stride_row, D: tl.constexpr, PACKED: tl.constexpr
):
    """Where the rows behind the columns ``o_c`` begin, and which of them are not empty places."""
    b_row = tl.load(p_index + o_c, mask=o_c < C, other=-1)
    m_row = (b_row >= 0) & (b_row < rows_w)
    return row_pointer(p_rows, tl.where(m_row, b_row, 0), stride_row, D, PACKED), m_row


@triton.jit
def inverse_norms(
    p_first,
    m_row,
    stride_row,
    stride_col,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """1 / ||row|| of ROWS rows, 0 for a (nearly) zero row; fp32."""
    b_square = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        b_tile = load_rows(
            p_first,
            m_row,
            stride_row,
            stride_col,
            start,
            D,
            ROWS,
            BLOCK,
            PACKED,
            INDEXED,
            D % BLOCK != 0,
        )
        b_tile = b_tile.to(tl.float32)
        b_square += b_tile * b_tile
    return inverse(tl.sqrt_rn(tl.sum(b_square, 1)))


@triton.jit
def inverse(b_norm):
    """1 / norm, 0 for a (nearly) zero norm."""
    m_zero = b_norm <= NORM_FLOOR
    return tl.where(m_zero, 0.0, tl.div_rn(1.0, tl.where(m_zero, 1.0, b_norm)))


@triton.jit
def cast(b_value, TYPE: tl.constexpr):
    """fp32 to an operand or weight type, to nearest."""
    if EMULATED:
        if TYPE == tl.bfloat16:
            # the interpreter cuts the low half off, and makes something else of subnormal numbers
            b_bits = b_value.to(tl.int32, bitcast=True)
            b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -65536
            b_value = tl.where(b_value == b_value, b_bits.to(tl.float32, bitcast=True), b_value)
    return b_value.to(TYPE)


@triton.jit
def operand(b_value, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """fp32 as an operand of a product, to nearest. Of a tf32 operand the GPU reads 19 bits."""
    if PRECISION == "tf32":
        if EMULATED:
            b_bits = (b_value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
            b_value = tl.where(b_value == b_value, b_bits.to(tl.float32, bitcast=True), b_value)
        else:
            b_bits = tl.inline_asm_elementwise(
                "cvt.rna.tf32.f32 $0, $1;", "=r,f", [b_value], dtype=tl.int32, is_pure=True, pack=1
            )
            b_value = b_bits.to(tl.float32, bitcast=True)
    return cast(b_value, TYPE)


@triton.jit
def matmul(b_left, b_right, b_sum, PRECISION: tl.constexpr):
    """``b_sum + b_left @ b_right`` with fp32 accumulation."""
    if EMULATED:
        # the interpreter multiplies the bit patterns of bf16; in fp32 the products are the same
        b_left = b_left.to(tl.float32)
        b_right = b_right.to(tl.float32)
        if PRECISION == "tf32":
            b_left = (b_left.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
            b_right = (b_right.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)


@triton.jit
def first_product(
    b_left, b_right, count, LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr
):
    """``b_left @ b_right`` (LEFT, RIGHT) for another product to take; ``count`` is above 0.

    Triton shares the rows of such a product out among all warps, so that two groups of four compute
    64 rows twice. It does not look for the other product past a branch, though one that is always
    taken, and shares out the columns too.
    """
    b_product = tl.zeros([LEFT, RIGHT], tl.float32)
    if count > 0:
        b_product = matmul(b_left, b_right, b_product, PRECISION)
    else:
        b_product = matmul(b_left, b_right, b_product + 1.0, PRECISION)
    return b_product


@triton.jit
def runs_ahead(within, AHEAD: tl.constexpr):
    """``within``, which is true though no compiler sees it, where AHEAD is a number of stages.

    What depends on it then stays behind a branch.
    """
    if AHEAD is None:
        return True
    else:
        return within


@triton.jit
def folded_sum(b_tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, 2, 4) sums over the columns, which are a multiple of 16, as far as a thread has them.

    Of a matrix instruction's result a thread has two of every eight columns, and of two groups of
    warps that share the columns each has one half.
    """
    return tl.sum(tl.sum(tl.reshape(b_tile, [ROWS, 2, COLUMNS // 16, 4, 2]), 4), 2)


@triton.jit
def folded_max(b_tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The largest, likewise."""
    return tl.max(tl.max(tl.reshape(b_tile, [ROWS, 2, COLUMNS // 16, 4, 2]), 4), 2)


@triton.jit
def halves(b_tile, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(b_tile, [ROWS, 2, HALF]), [0, 2, 1]))


@triton.jit
def cosines(
    d_left,
    d_right,
    left,
    right,
    D: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products (LEFT, RIGHT) of the rows of two blocks, which begin at ``left`` and ``right``.

    The descriptors' blocks have BLOCK_K columns; those of D are gone through one after another.
    """
    b_cos = tl.zeros([LEFT, RIGHT], tl.float32)
    for k in range(0, D, BLOCK_K):
        b_left, b_right = d_left.load([left, k]), d_right.load([right, k])
        b_cos = matmul(b_left, tl.trans(b_right), b_cos, PRECISION)
    return b_cos


@triton.jit
def local_columns(p_label, o_b, m_b, class_start, C):
    """Column of the own centre of each row, counted from ``class_start``; -1 if not in [0, C)."""
    b_column = tl.load(p_label + o_b, mask=m_b, other=-1) - class_start
    return tl.where((b_column >= 0) & (b_column < C), b_column, -1).to(tl.int32)


@triton.jit
def hard_rule(b_cos, b_threshold, p_rule):
    """``f(c)`` and ``f'(c)`` of :class:`fastmargin.spec.HardRule`."""
    a = tl.load(p_rule)
    b = tl.load(p_rule + 1)
    d = tl.load(p_rule + 2)
    m_hard = b_cos > b_threshold
    b_value = tl.where(m_hard, (a * b_cos + b) * b_cos + d, b_cos)
    b_slope = tl.where(m_hard, 2 * a * b_cos + b, 1.0)
    return b_value, b_slope


@triton.jit
def target_cosine(
    p_x,
    p_w,
    p_index,
    i_row,
    b_label,
    C,
    rows_w,
    stride_wc,
    stride_wd,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """fp32 cosine of row ``i_row`` and the centre of its column ``b_label``; 0 if not here."""
    o_d = tl.arange(0, BLOCK).to(tl.int64)
    m_d = o_d < D
    m_here = (b_label >= 0) & (b_label < C)
    if INDEXED:
        b_label = tl.load(p_index + tl.where(m_here, b_label, 0), mask=m_here, other=-1)
        m_here = (b_label >= 0) & (b_label < rows_w)
    b_x = tl.load(p_x + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    p_row = p_w + tl.where(m_here, b_label, 0) * stride_wc + o_d * stride_wd
    b_w = tl.load(p_row, mask=m_d & m_here, other=0.0).to(tl.float32)
    return tl.sum(b_x * b_w, 0) * inverse(tl.sqrt_rn(tl.sum(b_w * b_w, 0)))


@triton.jit
def exp_precise(b_x):
    """exp with the rounding error of ``x * log2(e)`` put back: a few ulp at any ``x``."""
    b_high = b_x * LOG2E
    b_low = tl.fma(b_x, LOG2E, -b_high) + b_x * LOG2E_TAIL
    return tl.exp2(b_high) * (1.0 + b_low * LN2)


@triton.jit
def log1p_small(b_x):
    """log(1 + x) for x in [0, 1], to a few ulp where 1 + x rounds."""
    b_sum = 1.0 + b_x
    m_lost = b_sum == 1.0
    b_ratio = b_x / tl.where(m_lost, 1.0, b_sum - 1.0)
    return tl.where(m_lost, b_x, tl.log(b_sum) * b_ratio)


@triton.jit
def sin_cos(b_x):
    """sine and cosine in fp32 without the local memory that CUDA's ``sinf`` keeps for huge angles.

    Reduction to [-pi/4, pi/4] with pi/2 in three parts, then the Cephes polynomials; 2 ulp for
    \\|x\\| up to a few thousand, which no margin reaches.
    """
    b_turn = tl.floor(b_x * 0.6366197723675814 + 0.5)
    b_r = tl.fma(b_turn, -1.5703125, b_x)
    b_r = tl.fma(b_turn, -4.837512969970703125e-4, b_r)
    b_r = tl.fma(b_turn, -7.54978995489188216e-8, b_r)
    b_z = b_r * b_r
    b_sin = ((-1.9515295891e-4 * b_z + 8.3321608736e-3) * b_z - 1.6666654611e-1) * b_z * b_r + b_r
    b_cos = (2.443315711809948e-5 * b_z - 1.388731625493765e-3) * b_z + 4.166664568298827e-2
    b_cos = b_cos * b_z * b_z - 0.5 * b_z + 1.0
    b_quarter = b_turn.to(tl.int32) & 3
    m_swap = (b_quarter & 1) == 1
    b_s = tl.where(m_swap, b_cos, b_sin)
    b_c = tl.where(m_swap, b_sin, b_cos)
    b_s = tl.where(b_quarter >= 2, -b_s, b_s)
    b_c = tl.where((b_quarter == 1) | (b_quarter == 2), -b_c, b_c)
    return b_s, b_c
