"""A step of the product of few rows: columns of x by words of W that were just decoded, on the tensor cores.

The weights are the M side of the product, in registers: those in which they were decoded (`words`). x, a few rows, is
its N side. TOGETHER, warps multiply in groups of four with the same x, which the cores read from shared memory (wgmma,
on Hopper); fewer than 16 rows are filled up. Or, on any GPU, each warp multiplies weights of its own (a batched
product, mma.sync) by x in registers.
"""

import triton
import triton.language as tl

from .words_triton import in_columns


@triton.jit
def columns_at(x, rows, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(where the first COLUMNS columns of x are, whether the row is one): both (ROWS, COLUMNS), for `add_product`.

    A step's columns are a multiple of COLUMNS further on. Rows beyond the last are the last again.
    """
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    at = x + tl.minimum(row, rows - 1) * x_stride + column
    return at, tl.broadcast_to(row < rows, (ROWS, COLUMNS))


@triton.jit
def no_product(OUTS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, TOGETHER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Zeros for `add_product` to add to; reshaped, (OUTS, ROWS)."""
    if TOGETHER:
        return tl.zeros((OUTS, ROWS), tl.float32)
    else:
        return tl.zeros((WARPS, OUTS // WARPS, ROWS), tl.float32)


@triton.jit
def add_product(total, eights, x_at, there, TOGETHER: tl.constexpr, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + the product of a step: of decoded words (OUTS, words, 2, 2, 2) and the columns of x at `x_at`.

    Most of 16 rows may be none of x's, and are not loaded then. Of more rows, half are, and masks cost more than they
    save.
    """
    columns = tl.load(x_at, mask=there, other=0.0) if x_at.shape[0] <= 16 else tl.load(x_at)
    if TOGETHER:
        product = tl.dot(in_columns(eights), tl.trans(columns), total, input_precision="ieee")
        total = _multiplied(product, PLAIN)
    else:
        WARPS: tl.constexpr = total.shape[0]
        OUTS: tl.constexpr = total.shape[1]  # of a warp
        ROWS: tl.constexpr = total.shape[2]
        BLOCKS: tl.constexpr = eights.shape[1] // 4  # of 32 columns
        # Where decoded weights were joined, Triton has lane q multiply operand columns 4 q to 4 q + 3 and those 16
        # further on. The order in which columns are summed is free: both operands get a, q, b, e as their bits.
        eights = tl.reshape(eights, (WARPS * OUTS, BLOCKS, 4, 2, 2, 2))  # q, e, a, b
        weights = tl.reshape(tl.permute(eights, (0, 1, 4, 2, 5, 3)), (WARPS, OUTS, 32 * BLOCKS))
        columns = tl.reshape(columns, (ROWS, BLOCKS, 2, 2, 4, 2))  # b, a, q, e
        columns = tl.reshape(tl.permute(columns, (1, 3, 4, 2, 5, 0)), (1, 32 * BLOCKS, ROWS))
        columns = tl.broadcast_to(columns, (WARPS, 32 * BLOCKS, ROWS))
        total = tl.dot(weights, columns, total, input_precision="ieee")
    return total


@triton.jit
def _multiplied(total, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """total, once the tensor cores are done with the product that it is the result of.

    Until then they read weights from registers, and where nothing uses the result within a step of the loop, Triton 3.6
    lets the next step write to these registers too early (triton-lang/triton#9433).
    """
    if PLAIN:
        return total
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=True, pack=1)
