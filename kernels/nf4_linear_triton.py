"""x W^T + bias + (x A^T) B^T for few rows of x and W in NF4, in one launch.

The weights are the M side of the tensor cores' product, decoded in registers in the layout in which the cores take
them; x, a few rows, is its N side. A program takes a tile of rows of W and, where there would be too few programs, one
of several ranges of columns; whichever program of a tile finishes last adds the ranges up, in their order: the result
does not depend on who that was. Either each warp multiplies rows of W of its own (mma.sync, by a batched product, so
that no two warps decode the same weights), which is best for up to 16 rows, or four warps share x (wgmma).

With an adapter the first programs compute x A^T in pieces of PIECE columns, and those that finish a tile wait for
them. That cannot hang: programs start in the order of their numbers, so what is waited for runs or has run.

Where the GPU can start a kernel before the one ahead of it has ended (AHEAD, Hopper's programmatic dependent launch),
a program first asks for the beginning of its codes, which that kernel does not write, and then waits for x.

Counters must be zero before a launch, and are again after it; two launches that overlap need counters of their own.

Bytes: 4.14 bits a weight once, x once a tile (from the L2 cache). Error: sums in fp32; the result and x A^T are
rounded once.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .nf4_triton import decode, prepare_decoding


@triton.jit
def _fetch(address):  # type: ignore[no-untyped-def]
    """Ask for the 128 bytes around each address to come to the L2 cache."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [address.to(tl.uint64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _base_sum(  # type: ignore[no-untyped-def]
    x, codes, scale_words, group_scales, group_start, offset, tables, weight_row, here, x_stride, row_bytes, row_words,
    first, last,
    ROWS: tl.constexpr, OUTS: tl.constexpr, WORD: tl.constexpr, BLOCKS: tl.constexpr, BATCH: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """(OUTS, ROWS) fp32: rows of W times those of x, over the columns of the steps [first, last) of BLOCKS blocks."""
    k = tl.arange(0, 64)
    x_at = x + tl.minimum(tl.arange(0, ROWS), here - 1)[:, None] * x_stride + k[None, :]
    codes_at = codes + weight_row[:, None].to(tl.int64) * row_bytes + tl.arange(0, 32)[None, :]
    words_at = scale_words + weight_row.to(tl.int64) * row_words
    start = tl.load(group_start + weight_row)
    mean = tl.load(offset + weight_row)
    total = tl.zeros((BATCH, OUTS // BATCH, ROWS) if BATCH > 1 else (OUTS, ROWS), tl.float32)
    for step in range(first, last):
        word = tl.load(words_at + step * BLOCKS // WORD).to(tl.int32) >> (step * BLOCKS % WORD * 8)
        group_scale = tl.load(group_scales + ((start + step * BLOCKS) >> 8))  # a step's blocks are of one group
        for i in tl.static_range(BLOCKS):
            block = step * BLOCKS + i
            absmax = tl.load(tables + ((word >> (8 * i)) & 255)) * group_scale + mean
            weight = decode(tl.load(codes_at + block * 32), absmax, tables, x.dtype.element_ty, PLAIN)
            rows = tl.trans(tl.load(x_at + block * 64))
            if BATCH > 1:
                weight = tl.reshape(weight, (BATCH, OUTS // BATCH, 64))
                rows = tl.broadcast_to(rows[None], (BATCH, 64, ROWS))
            total = tl.dot(weight, rows, total, input_precision="ieee")
    return tl.reshape(total, (OUTS, ROWS))


@triton.jit
def _down_piece(  # type: ignore[no-untyped-def]
    job, x, a, down, arrived, here, in_features, x_stride, ranks, pieces,
    ROWS: tl.constexpr, RANKS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One piece of x A^T, for RANKS of its columns, into `down` (pieces, ROWS, ranks) fp32."""
    rank, row, k = (job // pieces) * RANKS + tl.arange(0, RANKS), tl.arange(0, ROWS), tl.arange(0, 64)
    a_at = a + tl.minimum(rank, ranks - 1)[:, None].to(tl.int64) * in_features + k[None, :]
    x_at = x + tl.minimum(row, here - 1)[:, None] * x_stride + k[None, :]
    first = (job % pieces) * PIECE
    total = tl.zeros((RANKS, ROWS), tl.float32)
    for column in range(first, tl.minimum(first + PIECE, in_features), 64):
        total = tl.dot(tl.load(a_at + column), tl.trans(tl.load(x_at + column)), total, input_precision="ieee")
    down_at = down + ((job % pieces) * ROWS + row)[None, :] * ranks + rank[:, None]
    tl.store(down_at, total, mask=(rank < ranks)[:, None])
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release")


@triton.jit
def _with_part(  # type: ignore[no-untyped-def]
    total, down, b, out_first, ranks, pieces, start, stop, a_start, b_start, RANK: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """total (OUTS, ROWS) + B (x A^T)^T on those of its rows that lie in [start, stop)."""
    if (out_first < stop) & (out_first + total.shape[0] > start):
        n, m, r = out_first + tl.arange(0, total.shape[0]), tl.arange(0, total.shape[1]), tl.arange(0, BLOCK_R)
        in_part = ((n >= start) & (n < stop))[:, None] & (r < RANK)[None, :]
        up = tl.load(b + (b_start + n - start)[:, None].to(tl.int64) * RANK + r[None, :], mask=in_part, other=0.0)
        u_at = down + m[None, :] * ranks + (a_start + r)[:, None]
        u = tl.zeros((BLOCK_R, total.shape[1]), tl.float32)
        for four in range(0, pieces, 4):  # so many loads at a time
            for i in tl.static_range(4):
                there = (r < RANK)[:, None] & (four + i < pieces)
                u += tl.load(u_at + (four + i) * total.shape[1] * ranks, mask=there, other=0.0, cache_modifier=".cg")
        total = tl.dot(up, u.to(b.dtype.element_ty), total, input_precision="ieee")
    return total


@triton.jit
def _with_adapter(  # type: ignore[no-untyped-def]
    total, down, b, counters, out_first, ranks, pieces, downs, tiles,
    start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2,
    PARTS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """total + the update of every part, once all of x A^T is there."""
    while tl.atomic_add(counters, 0, sem="relaxed") < downs:
        pass
    tl.atomic_add(counters, 0, sem="acquire")  # once: it empties the L1 cache
    total = _with_part(total, down, b, out_first, ranks, pieces, start0, stop0, a0, b0, RANK, BLOCK_R)
    if PARTS > 1:
        total = _with_part(total, down, b, out_first, ranks, pieces, start1, stop1, a1, b1, RANK, BLOCK_R)
    if PARTS > 2:
        total = _with_part(total, down, b, out_first, ranks, pieces, start2, stop2, a2, b2, RANK, BLOCK_R)
    if tl.atomic_add(counters + 1, 1, sem="acq_rel") == tiles - 1:  # nobody waits any more
        tl.store(counters, 0)
        tl.store(counters + 1, 0)
    return total


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


@triton.jit(
    do_not_specialize=["rows", "slabs", "row_words", "tiles", "splits", "downs", "pieces", "ranks"]
    + [f"{name}{part}" for part in range(3) for name in ("start", "stop", "a", "b")]
)
def nf4_linear_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale_words, group_scales, group_start, offset, tables, bias, a, b, out, partial, down, counters,
    rows, slabs, out_features, in_features, x_stride, row_bytes, row_words, tiles, splits, downs, pieces, ranks,
    start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2,
    ROWS: tl.constexpr, OUTS: tl.constexpr, WORD: tl.constexpr, BLOCKS: tl.constexpr, BATCH: tl.constexpr,
    PARTS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK_R: tl.constexpr, PIECE: tl.constexpr,
    HAS_BIAS: tl.constexpr, PLAIN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    prepare_decoding(PLAIN)
    slab, job = tl.program_id(0) % slabs, tl.program_id(0) // slabs
    row_first = slab * ROWS
    here = tl.minimum(rows - row_first, ROWS)
    x += row_first * x_stride
    counters += slab * (tiles + 2)
    tile, split = (job - downs) // splits, (job - downs) % splits
    n, m = tile * OUTS + tl.arange(0, OUTS), row_first + tl.arange(0, ROWS)
    weight_row = tl.minimum(n, out_features - 1)
    row_steps = row_words * WORD // BLOCKS
    first = split * tl.cdiv(row_steps, splits)
    last = tl.minimum(first + tl.cdiv(row_steps, splits), row_steps)
    if AHEAD:
        if job >= downs:
            row_at = weight_row.to(tl.int64)
            _fetch(scale_words + row_at * row_words + tl.minimum(first * BLOCKS // WORD, row_words - 1))
            for line in tl.static_range(2):
                byte = tl.minimum(first * BLOCKS * 32 + line * 128, last * BLOCKS * 32 - 1)
                _fetch(codes + row_at * row_bytes + byte)
        gdc_launch_dependents()
        gdc_wait()
    if PARTS > 0:
        down += slab * pieces * ROWS * ranks
        if job < downs:
            _down_piece(job, x, a, down, counters, here, in_features, x_stride, ranks, pieces, ROWS, RANKS, PIECE)
    if job >= downs:
        total = _base_sum(
            x, codes, scale_words, group_scales, group_start, offset, tables, weight_row, here, x_stride, row_bytes,
            row_words, first, last, ROWS, OUTS, WORD, BLOCKS, BATCH, PLAIN,
        )  # fmt: skip
        there = (n < out_features)[:, None] & (m < rows)[None, :]
        at = m[None, :].to(tl.int64) * out_features + n[:, None]
        finishes = splits == 1
        if splits > 1:
            size = rows.to(tl.int64) * out_features
            finishes, total = _sum_of_splits(total, partial, counters + 2 + tile, split, splits, at, size, there)
        if finishes:
            if PARTS > 0:
                total = _with_adapter(
                    total, down, b, counters, tile * OUTS, ranks, pieces, downs, tiles,
                    start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2, PARTS, RANK, BLOCK_R,
                )  # fmt: skip
            if HAS_BIAS:
                total += tl.load(bias + weight_row).to(tl.float32)[:, None]
            tl.store(out + at, total.to(out.dtype.element_ty), mask=there)
