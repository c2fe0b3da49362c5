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
def columns_at(  # type: ignore[no-untyped-def]
    x, rows, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr
):  # fmt: skip
    """Where `add_product` finds the first COLUMNS columns of x; a step's are a multiple of them further on.

    Not TOGETHER, these are tiles of 8 columns of a row, 16 bytes: the first of each 16 columns, and `add_product` loads
    the others. An instruction that takes eight rows from shared memory then reads adjacent bytes, from every bank.
    """
    if TOGETHER:
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    else:
        tile = tl.arange(0, COLUMNS // 16 * ROWS)
        half = tile // ROWS
        row = (tile % ROWS)[:, None]
        column = (half // 2 * 32 + half % 2 * 8)[:, None] + tl.arange(0, 8)[None, :]
    return x + tl.minimum(row, rows - 1) * x_stride + column


@triton.jit
def no_product(OUTS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, TOGETHER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Zeros for `add_product` to add to; reshaped, (OUTS, ROWS)."""
    if TOGETHER:
        return tl.zeros((OUTS, ROWS), tl.float32)
    else:
        return tl.zeros((WARPS, OUTS // WARPS, ROWS), tl.float32)


@triton.jit
def add_product(total, eights, x_at, TOGETHER: tl.constexpr, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + the product of a step: of decoded words (OUTS, words, 2, 2, 2) and the columns of x at `x_at`."""
    if TOGETHER:
        columns = tl.trans(tl.load(x_at))
        total = _multiplied(tl.dot(in_columns(eights), columns, total, input_precision="ieee"), PLAIN)
    else:
        WARPS: tl.constexpr = total.shape[0]
        OUTS: tl.constexpr = total.shape[1]  # of a warp
        ROWS: tl.constexpr = total.shape[2]
        BLOCKS: tl.constexpr = eights.shape[1] // 4  # of 32 columns
        # Where decoded weights were joined, Triton has lane q multiply operand columns 4 q to 4 q + 3 and those 16
        # further on. The order in which columns are summed is free: both operands get a, q, b, e as their bits.
        eights = tl.reshape(eights, (WARPS * OUTS, BLOCKS, 4, 2, 2, 2))  # q, e, a, b
        weights = tl.reshape(tl.permute(eights, (0, 1, 4, 2, 5, 3)), (WARPS, OUTS, 32 * BLOCKS))
        # Two loads, as the registers of one would not lie as the cores take them.
        columns = tl.join(tl.load(x_at), tl.load(x_at + 16))
        columns = tl.reshape(columns, (BLOCKS, 2, ROWS, 4, 2, 2))  # a, row, q, e, b
        columns = tl.reshape(tl.permute(columns, (0, 1, 3, 5, 4, 2)), (1, 32 * BLOCKS, ROWS))
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
