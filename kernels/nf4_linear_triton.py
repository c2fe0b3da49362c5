"""x W^T + bias + (x A^T) B^T for few rows of x and W in NF4, in one launch.

A program takes a tile of rows of W and, where there would be too few programs, one of several ranges of its columns;
whichever program of a tile finishes last adds the ranges up, in their order: the result does not depend on who that
was. The one with the first columns adds bias and adapter (`few_rows_triton`). A step takes of each row of W up to 256
columns, whose codes are one line of the cache and whose scales are one word; they are decoded in the registers from
which the tensor cores take them (`few_rows_product_triton`). What limits it is the unit of shuffles, shared memory and
L1: a weight takes a lane of a shuffle, so everything else there has to be rare.

Where the GPU can start a kernel before the one ahead of it has ended (AHEAD, Hopper's programmatic dependent launch),
a program first asks for its codes and scales and copies the map of scale codes to shared memory, none of which that
kernel writes, and then waits for its end. It reads nothing else and writes no other memory before: the kernel ahead
may still use what this one was given.

Bytes: 4.14 bits a weight once, x once a tile (from the L2 cache). Error: sums in fp32; the result and x A^T are
rounded once.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .few_rows_product_triton import add_product, columns_at, no_product
from .few_rows_triton import VARYING, down, fetch, finish
from .nf4_triton import decode, prepare_decoding, prepare_scales, scales_of


@triton.jit
def _pair(words, tables, first: tl.constexpr, second: tl.constexpr, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """What two bytes, of these numbers, of int32 (n,) stand for -> (n, 2) fp32."""
    return tl.join(
        scales_of(words >> 8 * first & 255, tables, PLAIN), scales_of(words >> 8 * second & 255, tables, PLAIN)
    )


@triton.jit
def _scales(words, tables, BLOCKS: tl.constexpr, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the lowest BLOCKS bytes of int32 (n,) stand for -> (n, BLOCKS) fp32; of one byte (n, 2), the same twice.

    Joined, and two at least: Triton then finds them where the weights are decoded, and moves neither.
    """
    if BLOCKS < 4:
        return _pair(words, tables, 0, BLOCKS - 1, PLAIN)
    else:
        found = tl.join(_pair(words, tables, 0, 2, PLAIN), _pair(words, tables, 1, 3, PLAIN))
        return tl.reshape(found, (words.shape[0], BLOCKS))


@triton.jit
def _base_sum(  # type: ignore[no-untyped-def]
    x, codes, scale_words, group_scales, group_start, offset, tables, weight_row, rows, x_stride, row_words,
    row_scale_words, first, last,
    ROWS: tl.constexpr, WORD: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr, TOGETHER: tl.constexpr,
    AHEAD: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """(OUTS, ROWS) fp32: rows of W times those of x, over the columns of the steps [first, last) of BLOCKS blocks."""
    OUTS: tl.constexpr = weight_row.shape[0]
    STEPS: tl.constexpr = WORD // BLOCKS  # in a word of scale codes
    x_at, there = columns_at(x, rows, x_stride, ROWS, 64 * BLOCKS)
    codes_at = codes + weight_row[:, None].to(tl.int64) * row_words + tl.arange(0, 8 * BLOCKS)[None, :]
    words_at = scale_words + weight_row.to(tl.int64) * row_scale_words
    start = tl.load(group_start + weight_row)
    mean = tl.load(offset + weight_row)
    total = no_product(OUTS, ROWS, WARPS, TOGETHER)
    if AHEAD:  # for x; nobody writes the rest
        gdc_wait()
    for step in range(first, last):
        word = tl.load(words_at + step // STEPS).to(tl.int32) >> step % STEPS * (8 * BLOCKS)
        scales = _scales(word, tables, BLOCKS, PLAIN)
        group_scale = tl.load(group_scales + ((start + step * BLOCKS) >> 8))  # a step's blocks are of one group
        absmax = scales * group_scale[:, None] + mean[:, None]
        SCALES: tl.constexpr = absmax.shape[1]
        absmax = tl.broadcast_to(absmax[:, :, None], (OUTS, SCALES, 8 * BLOCKS // SCALES))
        absmax = tl.reshape(absmax, (OUTS, 8 * BLOCKS))
        eights = decode(tl.load(codes_at + step * (8 * BLOCKS)), absmax, tables, x.dtype.element_ty, PLAIN)
        total = add_product(total, eights, x_at + step * (64 * BLOCKS), there, TOGETHER, PLAIN)
    return tl.reshape(total, (OUTS, ROWS))


@triton.jit(do_not_specialize=["rows", "row_steps", "row_scale_words", "splits", *VARYING])
def nf4_linear_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale_words, group_scales, group_start, offset, tables, bias, A, B, u, pieces_of_u, out, partial,
    counters, signals,
    rows, out_features, x_stride, row_words, row_scale_words, row_steps, splits, ranks, pieces, groups,
    start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2,
    ROWS: tl.constexpr, OUTS: tl.constexpr, WORD: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr,
    TOGETHER: tl.constexpr, SPLIT: tl.constexpr, ADAPTED: tl.constexpr, DOWN_ROWS: tl.constexpr, RANK: tl.constexpr,
    BLOCK_R: tl.constexpr, HAS_BIAS: tl.constexpr, PLAIN: tl.constexpr, AHEAD: tl.constexpr,
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
                fetch(codes + row_at * row_words + tl.minimum(first * BLOCKS * 8 + line * 32, row_words - 1))
            fetch(scale_words + row_at * row_scale_words + first * BLOCKS // WORD)
            gdc_launch_dependents()
        prepare_decoding(PLAIN)
        prepare_scales(tables, PLAIN)
        total = _base_sum(
            x, codes, scale_words, group_scales, group_start, offset, tables, weight_row, rows, x_stride, row_words,
            row_scale_words, first, last, ROWS, WORD, BLOCKS, WARPS, TOGETHER, AHEAD, PLAIN,
        )  # fmt: skip
        finish(
            total, n, m, tile, split, splits, rows, out_features, bias, out, partial, counters,
            u, B, signals, ranks, groups, start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2,
            WARPS, SPLIT, HAS_BIAS, ADAPTED, RANK, BLOCK_R,
        )  # fmt: skip
