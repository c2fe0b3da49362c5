"""x W^T + bias + (x A^T) B^T for few rows of x and W in FP4, in one launch.

A program takes a tile of rows of W and, where there would be too few programs, one of several ranges of its columns;
whichever program of a tile finishes last adds the ranges up, in their order: the result does not depend on who that
was. The one with the first columns adds bias and adapter (`few_rows_triton`). A step takes of each row of W up to 256
columns, whose codes are one line of the cache and whose scales are one word; they are decoded in the registers from
which the tensor cores take them (`few_rows_product_triton`).

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

from .few_rows_product_triton import add_product, columns_at, no_product
from .few_rows_triton import VARYING, down, fetch, finish
from .fp4_triton import decode


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
def _base_sum(  # type: ignore[no-untyped-def]
    x, codes, scale_words, weight_row, rows, x_stride, row_words, row_scale_words, first, last,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, WORD: tl.constexpr, WARPS: tl.constexpr, TOGETHER: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """(OUTS, ROWS) fp32: rows of W times those of x, over the columns of steps [first, last) of CHUNKS chunks."""
    OUTS: tl.constexpr = weight_row.shape[0]
    BLOCKS: tl.constexpr = 2 * CHUNKS
    STEPS: tl.constexpr = WORD // CHUNKS  # in a word of scale codes
    x_at, there = columns_at(x, rows, x_stride, ROWS, 64 * CHUNKS)
    codes_at = codes + weight_row[:, None].to(tl.int64) * row_words + tl.arange(0, 8 * CHUNKS)[None, :]
    scales_at = scale_words + weight_row.to(tl.int64) * row_scale_words
    total = no_product(OUTS, ROWS, WARPS, TOGETHER)
    for step in range(first, last):
        scales = _bytes(tl.load(scales_at + step // STEPS) >> (step % STEPS * (8 * BLOCKS)), BLOCKS)
        scales = tl.reshape(tl.broadcast_to(scales[:, :, None], (OUTS, BLOCKS, 4)), (OUTS, 4 * BLOCKS))
        eights = decode(tl.load(codes_at + step * (8 * CHUNKS)), scales, x.dtype.element_ty, PLAIN)
        total = add_product(total, eights, x_at + step * (64 * CHUNKS), there, TOGETHER, PLAIN)
    return tl.reshape(total, (OUTS, ROWS))


@triton.jit(do_not_specialize=["rows", "row_steps", "row_scale_words", "splits", *VARYING])
def fp4_linear_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale_words, row_scales, bias, A, B, u, pieces_of_u, out, partial, counters, signals,
    rows, out_features, x_stride, row_words, row_steps, row_scale_words, splits, ranks, pieces, groups,
    start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2,
    ROWS: tl.constexpr, OUTS: tl.constexpr, CHUNKS: tl.constexpr, WORD: tl.constexpr, WARPS: tl.constexpr,
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
                fetch(codes + row_at * row_words + tl.minimum(first * CHUNKS * 8 + line * 32, row_words - 1))
            fetch(scale_words + row_at * row_scale_words + first * CHUNKS // WORD)
            gdc_launch_dependents()
            gdc_wait()
        total = _base_sum(
            x, codes, scale_words, weight_row, rows, x_stride, row_words, row_scale_words, first, last,
            ROWS, CHUNKS, WORD, WARPS, TOGETHER, PLAIN,
        )  # fmt: skip
        total *= tl.load(row_scales + weight_row)[:, None]
        finish(
            total, n, m, tile, split, splits, rows, out_features, bias, out, partial, counters,
            u, B, signals, ranks, groups, start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2,
            WARPS, SPLIT, HAS_BIAS, ADAPTED, RANK, BLOCK_R,
        )  # fmt: skip
