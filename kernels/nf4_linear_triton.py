"""x W^T + bias + (x A^T) B^T for few rows of x and W in NF4: a kernel for x A^T, a small one, and one for the rest.

The weights are the M side of the tensor cores' product, decoded in registers in the layout in which the cores take
them; x, a few rows, is its N side. Each warp multiplies weights of its own (a batched product), so that no two warps
decode the same; SHARING of them have the same rows of W, each other columns of a step, and are added up at the end, in
shared memory: a warp has more rows for each x that it reads, and fewer programs have to be added up. A program takes a
tile of rows of W and, where there would be too few programs, one of several ranges of columns; whichever program of a
tile finishes last adds the ranges up, in their order: the result does not depend on who that was. What limits it is the
unit of shuffles, shared memory and L1: a weight takes a lane of a shuffle, so everything else there has to be rare.
Hence steps of several blocks, of which a row's codes are one line of the cache, and scales that go through registers.

Where the GPU can start a kernel before the one ahead of it has ended (AHEAD, Hopper's programmatic dependent launch),
the first kernel of a product prefetches what nobody writes and waits for all that is ahead of it. Only then it lets the
second one start, which therefore finds x complete and waits, at its end, for x A^T alone. Memory that is used again,
also by the allocator, is safe: whatever starts before a second kernel has ended waits for its end before it writes, and
what that kernel writes before its own wait nobody uses but itself, as long as the first kernel's buffers are not freed
between the two launches. That wait, in some program of every launch, also keeps the chain: a second kernel ends after
the first. x is read past the L1 cache, or after emptying it, as only a wait is sure to.

Counters must be zero before a launch, and are again after it; two products that overlap need counters of their own.

Bytes: 4.14 bits a weight once, x once a tile (from the L2 cache). Error: sums in fp32; the result and x A^T are
rounded once.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .nf4_triton import decode_halves, prepare_decoding


@triton.jit
def _fetch(address):  # type: ignore[no-untyped-def]
    """Ask for the 128 bytes around each address to come to the L2 cache."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [address.to(tl.uint64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _empty_l1():  # type: ignore[no-untyped-def]
    tl.inline_asm_elementwise("fence.acq_rel.gpu; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _base_sum(  # type: ignore[no-untyped-def]
    x, codes, scale_words, group_scales, group_start, offset, tables, weight_row, rows, x_stride, row_bytes, row_words,
    first, last,
    ROWS: tl.constexpr, OUTS: tl.constexpr, WORD: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr,
    SHARING: tl.constexpr, WAITS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """(OUTS, ROWS) fp32: rows of W times those of x, over the columns of the steps [first, last) of BLOCKS blocks.

    The scales of a step are looked up a step ahead, their codes two: loads of them would depend on each other. Tiles of
    x are of 32 columns: threads read 16 adjacent bytes of them, of two rows 128, and no two from one bank.
    """
    STEPS: tl.constexpr = WORD // BLOCKS  # in a word of scale codes
    OWNERS: tl.constexpr = WARPS // SHARING  # of different rows of W
    K: tl.constexpr = 32 * BLOCKS // SHARING  # that a warp multiplies at a time
    k, of_step = tl.arange(0, 32 * BLOCKS), tl.arange(0, BLOCKS)
    of_tile = tl.arange(0, BLOCKS * ROWS)
    x_at = x + (tl.minimum(of_tile % ROWS, rows - 1) * x_stride + of_tile // ROWS * 64)[:, None]
    x_at += tl.arange(0, 32)[None, :]  # the columns of the low nibbles; those of the high ones are 32 further on
    codes_at = codes + weight_row[:, None].to(tl.int64) * row_bytes + k[None, :]
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
    if WAITS:  # for x; nobody writes the rest
        gdc_wait()
    total = tl.zeros((WARPS, OUTS // OWNERS, ROWS), tl.float32)
    for step in range(first, last):
        in_first = (start + step * BLOCKS) >> 8 == first_group  # a step's blocks are of one group
        absmax = scale * tl.where(in_first, group_scale, next_scale)[:, None] + mean[:, None]
        code = (word.to(tl.int32)[:, None] >> (((step + 1) % STEPS * BLOCKS + of_step) * 8)[None, :]) & 255
        scale = tl.load(tables + code)
        word = tl.load(words_at + tl.minimum(step + 2, last - 1) // STEPS)
        absmax = tl.reshape(tl.broadcast_to(absmax[:, :, None], (OUTS, BLOCKS, 32)), (OUTS, 32 * BLOCKS))
        low, high = decode_halves(tl.load(codes_at + step * BLOCKS * 32), absmax, tables, x.dtype.element_ty, PLAIN)
        for half in tl.static_range(2):
            weight = tl.reshape(high if half else low, (OWNERS, OUTS // OWNERS, SHARING, K))
            weight = tl.reshape(tl.permute(weight, (0, 2, 1, 3)), (WARPS, OUTS // OWNERS, K))
            some = tl.reshape(tl.load(x_at + step * BLOCKS * 64 + half * 32), (BLOCKS, ROWS, 8, 2, 2))
            some = tl.reshape(tl.permute(some, (0, 3, 2, 4, 1)), (1, SHARING, K, ROWS))  # the columns as the codes'
            some = tl.reshape(tl.broadcast_to(some, (OWNERS, SHARING, K, ROWS)), (WARPS, K, ROWS))
            total = tl.dot(weight, some, total, input_precision="ieee")
    if SHARING > 1:
        total = tl.sum(tl.reshape(total, (OWNERS, SHARING, OUTS // OWNERS, ROWS)), 1)
    return tl.reshape(total, (OUTS, ROWS))


@triton.jit
def _with_part(  # type: ignore[no-untyped-def]
    total, u, up, n, rows, ranks, start, stop, a_start, RANK: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """total (OUTS, ROWS) + B (x A^T)^T on those of its rows that lie in [start, stop)."""
    m, r = tl.arange(0, total.shape[1]), tl.arange(0, BLOCK_R)
    at = u + tl.minimum(m, rows - 1)[None, :] * ranks + (a_start + r)[:, None]
    of_part = tl.load(at, mask=(r < RANK)[:, None], other=0.0, cache_modifier=".cg")
    here = tl.where(((n >= start) & (n < stop))[:, None], up, tl.zeros_like(up))
    return tl.dot(here, of_part, total, input_precision="ieee")


@triton.jit
def _with_adapter(  # type: ignore[no-untyped-def]
    total, u, b, n, rows, ranks, out_first,
    start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """total + the update of every part: each row's of B, which is of one part, and then what x A^T that part has."""
    in1, in2 = (n >= start1) & (n < stop1), (n >= start2) & (n < stop2)
    there = ((n >= start0) & (n < stop0)) | in1 | in2
    b_row = n + tl.where(in2, b2 - start2, tl.where(in1, b1 - start1, b0 - start0))
    r = tl.arange(0, BLOCK_R)
    up_at = b + b_row[:, None].to(tl.int64) * RANK + r[None, :]
    up = tl.load(up_at, mask=there[:, None] & (r < RANK)[None, :], other=0.0)
    if AHEAD:
        gdc_wait()
    end = out_first + total.shape[0]
    if (out_first < stop0) & (end > start0):
        total = _with_part(total, u, up, n, rows, ranks, start0, stop0, a0, RANK, BLOCK_R)
    if (out_first < stop1) & (end > start1):
        total = _with_part(total, u, up, n, rows, ranks, start1, stop1, a1, RANK, BLOCK_R)
    if (out_first < stop2) & (end > start2):
        total = _with_part(total, u, up, n, rows, ranks, start2, stop2, a2, RANK, BLOCK_R)
    return total


@triton.jit
def _sum_of_splits(  # type: ignore[no-untyped-def]
    total, partial, arrived, split, splits, at, size, there, AT_ONCE: tl.constexpr
):  # fmt: skip
    """(whether this program is the last of its tile, and then the sum of all splits, in their order), AT_ONCE loads."""
    tl.store(partial + split * size + at, total, mask=there)
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == splits - 1
    if last:
        total = tl.zeros_like(total)
        for some in range(0, splits, AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                other = some + i
                total += tl.load(partial + other * size + at, there & (other < splits), 0.0, cache_modifier=".cg")
        tl.store(arrived, 0)
    return last, total


@triton.jit(do_not_specialize=["rows", "ranks"])
def nf4_linear_down_kernel(  # type: ignore[no-untyped-def]
    x, a, u, partial, counters, rows, in_features, x_stride, ranks,
    ROWS: tl.constexpr, RANKS: tl.constexpr, PIECE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """u = x A^T (rows, ranks): programs of PIECE columns, of which the last adds them up."""
    rank, row = tl.program_id(1) * RANKS + tl.arange(0, RANKS), tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    a_row = a + tl.minimum(rank, ranks - 1)[:, None].to(tl.int64) * in_features
    if AHEAD:
        line = tl.program_id(0) * PIECE + tl.arange(0, PIECE // 64) * 64
        _fetch(a_row + tl.minimum(line, in_features - 1)[None, :])
        gdc_wait()
        gdc_launch_dependents()
    in_row = (k < in_features)[None, :]
    x_row = x + tl.minimum(row, rows - 1)[:, None].to(tl.int64) * x_stride
    some_x = tl.load(x_row + k[None, :], mask=in_row, other=0.0)
    total = tl.dot(tl.load(a_row + k[None, :], mask=in_row, other=0.0), tl.trans(some_x), input_precision="ieee")
    at = row[None, :] * ranks + rank[:, None]
    there = (row < rows)[None, :] & (rank < ranks)[:, None]
    arrived = counters + tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    last, total = _sum_of_splits(
        total, partial, arrived, tl.program_id(0), tl.num_programs(0), at, rows * ranks, there, AT_ONCE=16
    )
    if last:
        tl.store(u + at, total.to(u.dtype.element_ty), mask=there)


@triton.jit(
    do_not_specialize=["rows", "row_words", "row_steps", "split_steps", "ranks"]
    + [f"{name}{part}" for part in range(3) for name in ("start", "stop", "a", "b")]
)
def nf4_linear_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale_words, group_scales, group_start, offset, tables, bias, u, b, out, partial, counters,
    rows, out_features, x_stride, row_bytes, row_words, row_steps, split_steps, ranks,
    start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2,
    ROWS: tl.constexpr, OUTS: tl.constexpr, WORD: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr,
    SHARING: tl.constexpr, ADAPTED: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, HAS_BIAS: tl.constexpr,
    PLAIN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """x W^T + bias + u B^T: programs of OUTS rows of W and split_steps steps, of which the last adds them up."""
    split, tile, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    n, m = tile * OUTS + tl.arange(0, OUTS), tl.arange(0, ROWS)
    weight_row = tl.minimum(n, out_features - 1)
    first = split * split_steps
    last = tl.minimum(first + split_steps, row_steps)
    WAITS: tl.constexpr = AHEAD and not ADAPTED  # before it multiplies, not just for u
    if AHEAD:
        gdc_launch_dependents()
        row_at = weight_row.to(tl.int64)
        for line in tl.static_range(2):
            byte = tl.minimum(first * BLOCKS * 32 + line * 128, last * BLOCKS * 32 - 1)
            _fetch(codes + row_at * row_bytes + byte)
        # Less than 16 bytes of x a thread go through the L1 cache.
        if not WAITS and ROWS * BLOCKS < 8 * WARPS:
            _empty_l1()
    prepare_decoding(PLAIN)
    total = _base_sum(
        x, codes, scale_words, group_scales, group_start, offset, tables, weight_row, rows, x_stride, row_bytes,
        row_words, first, last, ROWS, OUTS, WORD, BLOCKS, WARPS, SHARING, WAITS, PLAIN,
    )  # fmt: skip
    if split == 0:
        if HAS_BIAS:
            total += tl.load(bias + weight_row).to(tl.float32)[:, None]
        if ADAPTED:
            total = _with_adapter(
                total, u, b, n, rows, ranks, tile * OUTS,
                start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2, RANK, BLOCK_R, AHEAD,
            )  # fmt: skip
    there = (n < out_features)[:, None] & (m < rows)[None, :]
    at = m[None, :].to(tl.int64) * out_features + n[:, None]
    finishes = splits == 1
    if splits > 1:
        size = rows.to(tl.int64) * out_features
        A_THREAD: tl.constexpr = OUTS * ROWS // (32 * WARPS)
        AT_ONCE: tl.constexpr = 8 if A_THREAD <= 8 else (4 if A_THREAD <= 16 else 2)  # more would need more registers
        finishes, total = _sum_of_splits(total, partial, counters + tile, split, splits, at, size, there, AT_ONCE)
    if finishes:
        tl.store(out + at, total.to(out.dtype.element_ty), mask=there)
