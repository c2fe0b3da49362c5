"""x W^T + bias for few rows of x and W in FP4, in one launch.

The weights are the M side of the tensor cores' product (mma.sync), decoded in registers in the layout in which the
cores take them; x, a few rows, is its N side. Each warp multiplies rows of W of its own, so that no two warps decode
the same weights. A program takes a tile of rows of W. Where there would be too few programs, its warps share a tile:
GROUPS of them take a range of columns each, and their sums are added in shared memory; or several programs do, and
whichever finishes last adds their sums up, in their order: the result does not depend on who that was.

Where the GPU can start a kernel before the one ahead of it has ended (AHEAD, Hopper's programmatic dependent launch),
a program first asks for its codes and scales, which that kernel does not write, and then waits for x. It writes
nothing before: the kernel ahead may still use the memory that `partial` and `out` were given.

Counters must be zero before a launch, and are again after it; two launches that overlap need counters of their own.

Bytes: 4.25 bits a weight once, x once a tile (from the L2 cache). Error: weights are exact in bf16, sums in fp32; the
result is rounded once.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .fp4_triton import decode


@triton.jit
def _fetch(address):  # type: ignore[no-untyped-def]
    """Ask for the 128 bytes around each address to come to the L2 cache."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [address.to(tl.uint64)], dtype=tl.int32, is_pure=False, pack=1)


# Of a block's 32 columns the tensor cores take those of a lane, 4 q to 4 q + 3 and 16 more, in two steps of two from
# either half (in the layout that Triton gives to operands that come from four bits in 32). In which order a product's
# columns are summed is free, and so both operands have theirs rearranged: column 8 q + 4 s + 2 h + e goes to 16 h + 4 q
# + 2 s + e. Then a lane's columns are those of a whole word, and what a step takes of x lies in neighbouring registers,
# as the cores want it. A product takes one block because rows of 64 bytes of x have no bank conflicts.


@triton.jit
def _weight_operands(words, scales, dtype: tl.constexpr, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words (n, 8) of two blocks, scale codes (n,), the lowest bytes of an int32 -> two of (n, 32), rearranged."""
    n: tl.constexpr = words.shape[0]
    both = tl.join(scales & 255, (scales >> 8) & 255)
    weights = decode(words, tl.reshape(tl.broadcast_to(both[:, :, None], (n, 2, 4)), (n, 8)), dtype, PLAIN)
    weights = tl.reshape(weights, (n, 2, 4, 2, 2, 2))  # block, q, e, h, s
    return tl.split(tl.reshape(tl.permute(weights, (0, 4, 2, 5, 3, 1)), (n, 32, 2)))


@triton.jit
def _columns_operand(columns):  # type: ignore[no-untyped-def]
    """(groups, rows, 32) of x, rearranged."""
    words = tl.reshape(columns, (columns.shape[0], columns.shape[1], 4, 2, 2, 2))  # q, s, h, e
    return tl.reshape(tl.permute(words, (0, 1, 4, 2, 3, 5)), columns.shape)


@triton.jit
def _base_sum(  # type: ignore[no-untyped-def]
    x, codes, scale_words, weight_row, rows, x_stride, row_words, row_steps, first, last,
    ROWS: tl.constexpr, OUTS: tl.constexpr, CHUNKS: tl.constexpr, BATCH: tl.constexpr, GROUPS: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """(OUTS, ROWS) fp32: rows of W times those of x, over the columns of steps [first, last) of CHUNKS chunks.

    `weight_row` is (GROUPS * OUTS,), the tile's rows for each group.
    """
    k, m = tl.arange(0, 32), tl.minimum(tl.arange(0, ROWS), rows - 1)
    each = tl.cdiv(last - first, GROUPS)
    group = tl.arange(0, GROUPS)
    of_row = first + (tl.arange(0, GROUPS * OUTS) // OUTS) * each
    x_at = x + m[None, :, None] * x_stride + k[None, None, :]
    codes_at = codes + weight_row[:, None].to(tl.int64) * row_words + tl.arange(0, 8)[None, :]
    words_at = scale_words + weight_row.to(tl.int64) * row_steps
    total = tl.zeros((BATCH, GROUPS * OUTS // BATCH, ROWS) if BATCH > 1 else (OUTS, ROWS), tl.float32)
    for step in range(each):
        here = tl.minimum(of_row + step, row_steps - 1)
        word = tl.load(words_at + here)
        x_step = first + group * each + step
        for i in tl.static_range(CHUNKS):
            packed = tl.load(codes_at + (here * CHUNKS + i)[:, None] * 8)
            blocks = _weight_operands(packed, (word >> (16 * i)).to(tl.int32), x.dtype.element_ty, PLAIN)
            for half in tl.static_range(2):
                weight = blocks[half]
                at = x_at + ((x_step * CHUNKS + i) * 64 + 32 * half)[:, None, None]
                # The last group may have fewer steps.
                columns = tl.load(at, mask=(x_step < last)[:, None, None], other=0.0) if GROUPS > 1 else tl.load(at)
                columns = _columns_operand(columns)
                if BATCH > 1:
                    weight = tl.reshape(weight, (BATCH, GROUPS * OUTS // BATCH, 32))
                    columns = tl.broadcast_to(columns[:, None], (GROUPS, BATCH // GROUPS, ROWS, 32))
                    columns = tl.permute(tl.reshape(columns, (BATCH, ROWS, 32)), (0, 2, 1))
                else:
                    columns = tl.trans(tl.reshape(columns, (ROWS, 32)))
                total = tl.dot(weight, columns, total, input_precision="ieee")
    return tl.sum(tl.reshape(total, (GROUPS, OUTS, ROWS)), 0) if GROUPS > 1 else tl.reshape(total, (OUTS, ROWS))


@triton.jit
def _sum_of_splits(total, partial, arrived, split, splits, at, size, there):  # type: ignore[no-untyped-def]
    """(whether this program is the last of its tile, and then the sum of all splits, in their order)."""
    tl.store(partial + split * size + at, total, mask=there)
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == splits - 1
    if last:
        total = tl.zeros_like(total)
        for four in range(0, splits, 4):  # so many loads at a time
            for i in tl.static_range(4):
                other = four + i
                total += tl.load(partial + other * size + at, there & (other < splits), 0.0, cache_modifier=".cg")
        tl.store(arrived, 0)
    return last, total


@triton.jit(do_not_specialize=["rows", "row_steps", "splits"])
def fp4_linear_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale_words, row_scales, bias, out, partial, counters,
    rows, out_features, x_stride, row_words, row_steps, splits,
    ROWS: tl.constexpr, OUTS: tl.constexpr, CHUNKS: tl.constexpr, BATCH: tl.constexpr, GROUPS: tl.constexpr,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, PLAIN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    n, m = tile * OUTS + tl.arange(0, OUTS), tl.arange(0, ROWS)
    weight_row = tl.minimum(tile * OUTS + tl.arange(0, GROUPS * OUTS) % OUTS, out_features - 1)
    first = split * tl.cdiv(row_steps, splits)
    last = tl.minimum(first + tl.cdiv(row_steps, splits), row_steps)
    if AHEAD:
        start = first + (tl.arange(0, GROUPS * OUTS) // OUTS) * tl.cdiv(last - first, GROUPS)
        start = tl.minimum(start, row_steps - 1)
        row_at = weight_row.to(tl.int64)
        for line in tl.static_range(2):
            _fetch(codes + row_at * row_words + tl.minimum(start * CHUNKS * 8 + line * 32, row_words - 1))
        _fetch(scale_words + row_at * row_steps + start)
        gdc_launch_dependents()
        gdc_wait()
    total = _base_sum(
        x, codes, scale_words, weight_row, rows, x_stride, row_words, row_steps, first, last,
        ROWS, OUTS, CHUNKS, BATCH, GROUPS, PLAIN,
    )  # fmt: skip
    there = (n < out_features)[:, None] & (m < rows)[None, :]
    at = m[None, :].to(tl.int64) * out_features + n[:, None]
    finishes = True
    if SPLIT:
        size = rows.to(tl.int64) * out_features
        finishes, total = _sum_of_splits(total, partial, counters + tile, split, splits, at, size, there)
    if finishes:
        total *= tl.load(row_scales + tl.minimum(n, out_features - 1))[:, None]
        if HAS_BIAS:
            total += tl.load(bias + tl.minimum(n, out_features - 1)).to(tl.float32)[:, None]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=there)
