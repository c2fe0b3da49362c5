"""x W^T + bias + (x A^T) B^T for few rows of x and W in NF4, in one launch.

The weights are the M side of the tensor cores' product, decoded in registers in the layout in which the cores take
them; x, a few rows, is its N side. Each warp multiplies weights of its own (a batched product), so that no two warps
decode the same; SHARING of them have the same rows of W, each other columns of a step, and are added up at the end, in
shared memory: a warp has more rows for each x that it reads, and fewer programs have to be added up. A program takes a
tile of rows of W and, where there would be too few programs, one of several ranges of columns; whichever program of a
tile finishes last adds the ranges up, in their order: the result does not depend on who that was. The one with the
first columns adds bias and adapter (`few_rows_triton`). What limits it is the unit of shuffles, shared memory and L1:
a weight takes a lane of a shuffle, so everything else there has to be rare. Hence steps of several blocks, of which a
row's codes are one line of the cache, and scales that go through registers.

From 64 rows on x would take too many registers and reads of shared memory, and four warps multiply with the same x, in
shared memory (SHARING = 0; wgmma, on Hopper). There the columns are in x's order.

Where the GPU can start a kernel before the one ahead of it has ended (AHEAD, Hopper's programmatic dependent launch),
a program first asks for its codes and scales, which that kernel does not write, and then waits for its end. It reads
nothing else and writes nothing before: the kernel ahead may still use the memory that this one was given.

Bytes: 4.14 bits a weight once, x once a tile (from the L2 cache). Error: sums in fp32; the result and x A^T are
rounded once.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .few_rows_triton import VARYING, down, fetch, finish, multiplied
from .nf4_triton import decode_halves, decode_words, prepare_decoding


@triton.jit
def _add_product(  # type: ignore[no-untyped-def]
    total, x_at, codes_at, absmax, tables, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr,
    SHARING: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """total (WARPS, OUTS / OWNERS, ROWS) + the product of a step, of BLOCKS blocks with these absmax (OUTS, BLOCKS)."""
    OUTS: tl.constexpr = absmax.shape[0]
    OWNERS: tl.constexpr = WARPS // SHARING  # of different rows of W
    K: tl.constexpr = 32 * BLOCKS // SHARING  # that a warp multiplies at a time
    absmax = tl.reshape(tl.broadcast_to(absmax[:, :, None], (OUTS, BLOCKS, 32)), (OUTS, 32 * BLOCKS))
    low, high = decode_halves(tl.load(codes_at), absmax, tables, x_at.dtype.element_ty, PLAIN)
    for half in tl.static_range(2):
        weight = tl.reshape(high if half else low, (OWNERS, OUTS // OWNERS, SHARING, K))
        weight = tl.reshape(tl.permute(weight, (0, 2, 1, 3)), (WARPS, OUTS // OWNERS, K))
        some = tl.reshape(tl.load(x_at + half * 32), (BLOCKS, ROWS, 8, 2, 2))
        some = tl.reshape(tl.permute(some, (0, 3, 2, 4, 1)), (1, SHARING, K, ROWS))  # the columns as the codes'
        some = tl.reshape(tl.broadcast_to(some, (OWNERS, SHARING, K, ROWS)), (WARPS, K, ROWS))
        total = tl.dot(weight, some, total, input_precision="ieee")
    return total


@triton.jit
def _add_product_together(  # type: ignore[no-untyped-def]
    total, x_at, codes_at, absmax, tables, BLOCKS: tl.constexpr, PLAIN: tl.constexpr
):  # fmt: skip
    """The same with total (OUTS, ROWS): warps multiply as groups of four that take x from shared memory (wgmma).

    Columns are in x's order, so lanes exchange the decoded weights. While the cores multiply, another program decodes.
    """
    OUTS: tl.constexpr = absmax.shape[0]
    absmax = tl.reshape(tl.broadcast_to(absmax[:, :, None], (OUTS, BLOCKS, 8)), (OUTS, 8 * BLOCKS))
    eights = decode_words(tl.load(codes_at), absmax, tables, x_at.dtype.element_ty, PLAIN)
    # Column 32 h + 8 a + 4 b + 2 c + e of a block is the h-th nibble of byte 2 b + e of word 4 c + a.
    weights = tl.reshape(eights, (OUTS, BLOCKS, 2, 4, 2, 2, 2))  # c, a, e, b, h
    weights = tl.reshape(tl.permute(weights, (0, 1, 6, 3, 5, 2, 4)), (OUTS, 64 * BLOCKS))
    return multiplied(tl.dot(weights, tl.trans(tl.load(x_at)), total, input_precision="ieee"), PLAIN)


@triton.jit
def _base_sum(  # type: ignore[no-untyped-def]
    x, codes, scale_words, group_scales, group_start, offset, tables, weight_row, rows, x_stride, row_codes, row_words,
    first, last,
    ROWS: tl.constexpr, OUTS: tl.constexpr, WORD: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_CODES: tl.constexpr,
    WARPS: tl.constexpr, SHARING: tl.constexpr, AHEAD: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """(OUTS, ROWS) fp32: rows of W times those of x, over the columns of the steps [first, last) of BLOCKS blocks.

    The scales of a step are looked up a step ahead, their codes two: loads of them would depend on each other. Where x
    goes through registers its tiles are of 32 columns: threads read 16 adjacent bytes of them, of two rows 128, and no
    two from one bank.
    """
    STEPS: tl.constexpr = WORD // BLOCKS  # in a word of scale codes
    of_step = tl.arange(0, BLOCKS)
    if SHARING == 0:
        x_at = x + tl.minimum(tl.arange(0, ROWS), rows - 1)[:, None] * x_stride + tl.arange(0, 64 * BLOCKS)[None, :]
        total = tl.zeros((OUTS, ROWS), tl.float32)
    else:
        of_tile = tl.arange(0, BLOCKS * ROWS)
        x_at = x + (tl.minimum(of_tile % ROWS, rows - 1) * x_stride + of_tile // ROWS * 64)[:, None]
        x_at += tl.arange(0, 32)[None, :]  # the columns of the low nibbles; those of the high ones are 32 further on
        total = tl.zeros((WARPS, OUTS // (WARPS // SHARING), ROWS), tl.float32)
    codes_at = codes + weight_row[:, None].to(tl.int64) * row_codes + tl.arange(0, BLOCK_CODES * BLOCKS)[None, :]
    words_at = scale_words + weight_row.to(tl.int64) * row_words
    word = tl.load(words_at + first // STEPS)
    start = tl.load(group_start + weight_row)
    mean = tl.load(offset + weight_row)
    code = (word.to(tl.int32)[:, None] >> ((first % STEPS * BLOCKS + of_step) * 8)[None, :]) & 255
    scale = tl.load(tables + code)
    word = tl.load(words_at + tl.minimum(first + 1, last - 1) // STEPS)
    # So few columns that they are of at most two groups.
    first_group = (start + first * BLOCKS) >> 8
    group_scale = tl.load(group_scales + first_group)
    next_scale = tl.load(group_scales + ((start + last * BLOCKS - 1) >> 8))
    if AHEAD:  # for x; nobody writes the rest
        gdc_wait()
    for step in range(first, last):
        in_first = (start + step * BLOCKS) >> 8 == first_group  # a step's blocks are of one group
        absmax = scale * tl.where(in_first, group_scale, next_scale)[:, None] + mean[:, None]
        code = (word.to(tl.int32)[:, None] >> (((step + 1) % STEPS * BLOCKS + of_step) * 8)[None, :]) & 255
        scale = tl.load(tables + code)
        word = tl.load(words_at + tl.minimum(step + 2, last - 1) // STEPS)
        step_x, step_codes = x_at + step * BLOCKS * 64, codes_at + step * BLOCKS * BLOCK_CODES
        if SHARING == 0:
            total = _add_product_together(total, step_x, step_codes, absmax, tables, BLOCKS, PLAIN)
        else:
            total = _add_product(total, step_x, step_codes, absmax, tables, ROWS, BLOCKS, WARPS, SHARING, PLAIN)
    if SHARING > 1:
        total = tl.sum(tl.reshape(total, (WARPS // SHARING, SHARING, OUTS // (WARPS // SHARING), ROWS)), 1)
    return tl.reshape(total, (OUTS, ROWS))


@triton.jit(do_not_specialize=["rows", "row_words", "row_steps", "splits", *VARYING])
def nf4_linear_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale_words, group_scales, group_start, offset, tables, bias, A, B, u, pieces_of_u, out, partial,
    counters, signals,
    rows, out_features, x_stride, row_codes, row_words, row_steps, splits, ranks, pieces, groups,
    start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2,
    ROWS: tl.constexpr, OUTS: tl.constexpr, WORD: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr,
    SHARING: tl.constexpr, SPLIT: tl.constexpr, ADAPTED: tl.constexpr, DOWN_ROWS: tl.constexpr, RANK: tl.constexpr,
    BLOCK_R: tl.constexpr, HAS_BIAS: tl.constexpr, PLAIN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Programs of x A^T, then for each tile of OUTS rows of W its `splits` programs, of as many steps or one fewer."""
    program = tl.program_id(0) - pieces * groups
    if program < 0:
        if ADAPTED:
            down(
                x, A, u, pieces_of_u, signals, tl.program_id(0), rows, row_words * WORD * 64, x_stride, ranks, pieces,
                DOWN_ROWS, AHEAD,
            )  # fmt: skip
    else:
        tile, split = program // splits, program % splits
        first, last = split * row_steps // splits, (split + 1) * row_steps // splits
        n, m = tile * OUTS + tl.arange(0, OUTS), tl.arange(0, ROWS)
        weight_row = tl.minimum(n, out_features - 1)
        BLOCK_CODES: tl.constexpr = 8 if SHARING == 0 else 32  # of a block: words of four bytes, or bytes
        if AHEAD:
            row_at = weight_row.to(tl.int64)
            for line in tl.static_range(2):
                at = tl.minimum(first * BLOCKS * BLOCK_CODES + line * 4 * BLOCK_CODES, last * BLOCKS * BLOCK_CODES - 1)
                fetch(codes + row_at * row_codes + at)
            gdc_launch_dependents()
        prepare_decoding(PLAIN)
        total = _base_sum(
            x, codes, scale_words, group_scales, group_start, offset, tables, weight_row, rows, x_stride, row_codes,
            row_words, first, last, ROWS, OUTS, WORD, BLOCKS, BLOCK_CODES, WARPS, SHARING, AHEAD, PLAIN,
        )  # fmt: skip
        finish(
            total, n, m, tile, split, splits, rows, out_features, bias, out, partial, counters,
            u, B, signals, ranks, groups, start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2,
            WARPS, SPLIT, HAS_BIAS, ADAPTED, RANK, BLOCK_R,
        )  # fmt: skip
