"""x W^T + bias + (x A^T) B^T for few rows of x and W in FP4, in one launch.

The weights are the M side of the tensor cores' product (mma.sync), decoded in registers in the layout in which the
cores take them; x, a few rows, is its N side. Each warp multiplies weights of its own (a batched product), so that no
two warps decode the same; SHARING of them have the same rows of W, each other columns of a step, and are added up at
the end, in shared memory: a warp has more rows for each x that it reads, and fewer programs have to be added up. A step
takes of each row of W up to 256 columns, whose codes are one line of the cache and whose scales are one word.

From 64 rows on x would take too many registers and reads of shared memory, and four warps multiply with the same x, in
shared memory (SHARING = 0; wgmma, on Hopper). There the columns are in x's order.

A program takes a tile of rows of W and, where there would be too few programs, one of several ranges of its columns;
whichever program of a tile finishes last adds the ranges up, in their order: the result does not depend on who that
was. The one with the first columns adds bias and adapter (`few_rows_triton`).

(Equal shares of all tiles' steps, which may end within one tile and begin in another, balance better and are slower. A
loop over a program's tiles takes so many registers that fewer programs run at a time; without one, two programs for a
share that has two tiles, there are more sums to add up.)

Where the GPU can start a kernel before the one ahead of it has ended (AHEAD, Hopper's programmatic dependent launch),
a program first asks for its codes and scales, which that kernel does not write, and then waits for its end. It reads
nothing else and writes nothing before: the kernel ahead may still use the memory that this one was given.

Bytes: 4.25 bits a weight once, x once a tile (from the L2 cache). Error: weights are exact in bf16, sums in fp32; the
result and x A^T are rounded once.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .few_rows_triton import VARYING, down, fetch, finish, multiplied
from .fp4_triton import decode

# Of a block's 32 columns the tensor cores take those of a lane, 4 q to 4 q + 3 and 16 more, in two steps of two from
# either half (in the layout that Triton gives to operands that come from four bits in 32). In which order a product's
# columns are summed is free, and so both operands have theirs rearranged: column 8 q + 4 s + 2 h + e goes to 16 h + 4 q
# + 2 s + e. Then a lane's columns are those of a whole word, and what a step takes of x lies in neighbouring registers,
# as the cores want it.


@triton.jit
def _pair_of_bytes(words, first: tl.constexpr, second: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bytes `first` and `second` of integers (n,) -> (n, 2) int32."""
    return tl.join((words >> 8 * first).to(tl.int32) & 255, (words >> 8 * second).to(tl.int32) & 255)


@triton.jit
def _bytes(words, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bytes of integers (n,), the lowest first -> (n, COUNT) int32; by joins, through which layouts carry over."""
    if COUNT == 2:
        found = _pair_of_bytes(words, 0, 1)
    elif COUNT == 4:
        found = tl.join(_pair_of_bytes(words, 0, 2), _pair_of_bytes(words, 1, 3))
    else:
        even = tl.join(_pair_of_bytes(words, 0, 4), _pair_of_bytes(words, 2, 6))
        found = tl.join(even, tl.join(_pair_of_bytes(words, 1, 5), _pair_of_bytes(words, 3, 7)))
    return tl.reshape(found, (words.shape[0], COUNT))


@triton.jit
def _halves(words):  # type: ignore[no-untyped-def]
    """(n, k) -> the first and the last k / 2."""
    n: tl.constexpr = words.shape[0]
    k: tl.constexpr = words.shape[1]
    return tl.split(tl.permute(tl.reshape(words, (n, 2, k // 2)), (0, 2, 1)))


@triton.jit
def _pieces(words, DOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(n, k) -> DOTS times k / DOTS of them, in order."""
    if DOTS == 1:
        return (words,)
    elif DOTS == 2:
        return _halves(words)
    else:
        first, last = _halves(words)
        return _halves(first) + _halves(last)


@triton.jit
def _weights_operand(  # type: ignore[no-untyped-def]
    words, scales, dtype: tl.constexpr, OWNERS: tl.constexpr, SHARING: tl.constexpr, PLAIN: tl.constexpr
):  # fmt: skip
    """Words (n, 4 * blocks), scale codes (n,), a byte a block -> (OWNERS * SHARING, n / OWNERS, k), rearranged."""
    n: tl.constexpr = words.shape[0]
    BLOCKS: tl.constexpr = words.shape[1] // 4
    K: tl.constexpr = 32 * BLOCKS // SHARING
    codes = _bytes(scales, BLOCKS)
    codes = tl.reshape(tl.broadcast_to(codes[:, :, None], (n, BLOCKS, 4)), (n, 4 * BLOCKS))
    weights = tl.reshape(decode(words, codes, dtype, PLAIN), (n, BLOCKS, 4, 2, 2, 2))  # q, e, h, s
    weights = tl.reshape(tl.permute(weights, (0, 1, 4, 2, 5, 3)), (OWNERS, n // OWNERS, SHARING, K))
    return tl.reshape(tl.permute(weights, (0, 2, 1, 3)), (OWNERS * SHARING, n // OWNERS, K))


@triton.jit
def _columns_operand(  # type: ignore[no-untyped-def]
    columns, BLOCKS: tl.constexpr, OWNERS: tl.constexpr, SHARING: tl.constexpr
):  # fmt: skip
    """(BLOCKS * rows, 32) of x -> (OWNERS * SHARING, k, rows), rearranged, each of OWNERS the same."""
    ROWS: tl.constexpr = columns.shape[0] // BLOCKS
    K: tl.constexpr = 32 * BLOCKS // SHARING
    columns = tl.reshape(columns, (BLOCKS, ROWS, 4, 2, 2, 2))  # q, s, h, e
    columns = tl.reshape(tl.permute(columns, (0, 4, 2, 3, 5, 1)), (1, SHARING, K, ROWS))
    return tl.reshape(tl.broadcast_to(columns, (OWNERS, SHARING, K, ROWS)), (OWNERS * SHARING, K, ROWS))


@triton.jit
def _base_sum(  # type: ignore[no-untyped-def]
    x, codes, scale_words, weight_row, rows, x_stride, row_words, row_steps, first, last,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, SHARING: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """(OUTS, ROWS) fp32: rows of W times those of x, over the columns of steps [first, last) of CHUNKS chunks.

    Tiles of x are of 32 columns: threads read 16 adjacent bytes of them, of two rows 128, and no two from one bank.
    """
    OUTS: tl.constexpr = weight_row.shape[0]
    OWNERS: tl.constexpr = WARPS // SHARING  # of different rows of W
    STEP_BLOCKS: tl.constexpr = 2 * CHUNKS
    # What a product takes of x is in registers at once.
    DOTS: tl.constexpr = min(CHUNKS, max(1, STEP_BLOCKS * ROWS // (128 * SHARING)))
    BLOCKS: tl.constexpr = STEP_BLOCKS // DOTS  # of a product
    of_tile = tl.arange(0, BLOCKS * ROWS)
    x_at = x + (tl.minimum(of_tile % ROWS, rows - 1) * x_stride + of_tile // ROWS * 32)[:, None]
    x_at += tl.arange(0, 32)[None, :]
    codes_at = codes + weight_row[:, None].to(tl.int64) * row_words + tl.arange(0, 4 * STEP_BLOCKS)[None, :]
    scales_at = scale_words + weight_row.to(tl.int64) * row_steps
    total = tl.zeros((WARPS, OUTS // OWNERS, ROWS), tl.float32)
    for step in range(first, last):
        pieces, scales = _pieces(tl.load(codes_at + step * STEP_BLOCKS * 4), DOTS), tl.load(scales_at + step)
        for i in tl.static_range(DOTS):
            weights = _weights_operand(pieces[i], scales >> 8 * BLOCKS * i, x.dtype.element_ty, OWNERS, SHARING, PLAIN)
            columns = tl.load(x_at + (step * STEP_BLOCKS + i * BLOCKS) * 32)
            total = tl.dot(weights, _columns_operand(columns, BLOCKS, OWNERS, SHARING), total, input_precision="ieee")
    if SHARING > 1:
        total = tl.sum(tl.reshape(total, (OWNERS, SHARING, OUTS // OWNERS, ROWS)), 1)
    return tl.reshape(total, (OUTS, ROWS))


@triton.jit
def _base_sum_together(  # type: ignore[no-untyped-def]
    x, codes, scale_words, weight_row, rows, x_stride, row_words, row_steps, first, last,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """The same, but warps multiply as groups of four that take x from shared memory (wgmma), not from registers.

    Columns are in x's order, so lanes exchange the decoded weights. While the cores multiply, another program decodes.
    The scales of a step are loaded a step ahead: they are too few to be copied to shared memory meanwhile.
    """
    word, k = tl.arange(0, 8 * CHUNKS), tl.arange(0, 64 * CHUNKS)
    x_at = x + tl.minimum(tl.arange(0, ROWS), rows - 1)[:, None] * x_stride + k[None, :]
    codes_at = codes + weight_row[:, None].to(tl.int64) * row_words + word[None, :]
    scales_at = scale_words + weight_row.to(tl.int64) * row_steps
    total = tl.zeros((weight_row.shape[0], ROWS), tl.float32)
    scale_word = tl.load(scales_at + first)
    for step in range(first, last):
        scales = (scale_word[:, None] >> (word // 4 * 8)[None, :]).to(tl.int32) & 255
        scale_word = tl.load(scales_at + tl.minimum(step + 1, last - 1))
        eights = decode(tl.load(codes_at + step * (8 * CHUNKS)), scales, x.dtype.element_ty, PLAIN)
        weights = tl.reshape(tl.permute(eights, (0, 1, 4, 3, 2)), (weight_row.shape[0], 64 * CHUNKS))
        columns = tl.trans(tl.load(x_at + step * (64 * CHUNKS)))
        total = multiplied(tl.dot(weights, columns, total, input_precision="ieee"), PLAIN)
    return total


@triton.jit(do_not_specialize=["rows", "row_steps", "splits", *VARYING])
def fp4_linear_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale_words, row_scales, bias, A, B, u, pieces_of_u, out, partial, counters, signals,
    rows, out_features, x_stride, row_words, row_steps, splits, ranks, pieces, groups,
    start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2,
    ROWS: tl.constexpr, OUTS: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, SHARING: tl.constexpr,
    SPLIT: tl.constexpr, ADAPTED: tl.constexpr, DOWN_ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr, PLAIN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Programs of x A^T, then for each tile of OUTS rows of W its `splits` programs, of as many steps or one fewer."""
    program = tl.program_id(0) - pieces * groups
    if program < 0:
        if ADAPTED:
            down(
                x, A, u, pieces_of_u, signals, tl.program_id(0), rows, row_words * 8, x_stride, ranks, pieces,
                DOWN_ROWS, AHEAD,
            )  # fmt: skip
    else:
        tile, split = program // splits, program % splits
        first, last = split * row_steps // splits, (split + 1) * row_steps // splits
        n, m = tile * OUTS + tl.arange(0, OUTS), tl.arange(0, ROWS)
        weight_row = tl.minimum(n, out_features - 1)
        if AHEAD:
            row_at = weight_row.to(tl.int64)
            for line in tl.static_range(2):
                fetch(codes + row_at * row_words + tl.minimum(first * CHUNKS * 8 + line * 32, row_words - 1))
            fetch(scale_words + row_at * row_steps + first)
            gdc_launch_dependents()
            gdc_wait()
        if SHARING == 0:
            total = _base_sum_together(
                x, codes, scale_words, weight_row, rows, x_stride, row_words, row_steps, first, last,
                ROWS, CHUNKS, PLAIN,
            )  # fmt: skip
        else:
            total = _base_sum(
                x, codes, scale_words, weight_row, rows, x_stride, row_words, row_steps, first, last,
                ROWS, CHUNKS, WARPS, SHARING, PLAIN,
            )  # fmt: skip
        total *= tl.load(row_scales + weight_row)[:, None]
        finish(
            total, n, m, tile, split, splits, rows, out_features, bias, out, partial, counters,
            u, B, signals, ranks, groups, start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2,
            WARPS, SPLIT, HAS_BIAS, ADAPTED, RANK, BLOCK_R,
        )  # fmt: skip
