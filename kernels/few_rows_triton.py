"""What the kernels of few rows by a 4-bit W have in common: the adapter, and what follows a program's sum.

The first programs of a launch compute u = x A^T, one of them 256 columns for 16 ranks, and the last of them to
finish sums the pieces up, in their order, and says that u is there. The other programs multiply x and W. Whichever
starts a tile of rows of W then waits for u and adds u B^T: programs start in the order of their numbers, so those
waited for run already, and as a rule u has long been there. That is one launch where a kernel of its own for u would
cost a second launch and its latency ahead of the product.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_PARTS = 3  # q, k, v
# Of a program of x A^T: columns that it sums, and at most so many ranks.
PIECE, RANKS = tl.constexpr(256), tl.constexpr(16)
PART_ARGUMENTS = [f"{name}{part}" for part in range(MAX_PARTS) for name in ("start", "stop", "a", "b")]
VARYING = ["ranks", "pieces", "groups", *PART_ARGUMENTS]  # no kernel is compiled for special values of these


@triton.jit
def fetch(address):  # type: ignore[no-untyped-def]
    """Ask for the 128 bytes around each address to come to the L2 cache."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [address.to(tl.uint64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _sum_of_splits(  # type: ignore[no-untyped-def]
    total, partial, arrived, split, splits, at, size, there, A_THREAD: tl.constexpr
):  # fmt: skip
    """(whether this program is the last of its tile, and then the sum of all splits, in their order).

    A_THREAD: elements of the sum that a thread has, 0 for less than one; loads of as many splits at once as there are
    registers for.
    """
    AT_ONCE: tl.constexpr = max(1, min(16, 64 // max(1, A_THREAD)))
    tl.store(partial + split.to(tl.int64) * size + at, total, mask=there)
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == splits - 1
    if last:
        total = tl.zeros_like(total)
        for some in range(0, splits, AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                other = some + i
                split_at = partial + other.to(tl.int64) * size
                total += tl.load(split_at + at, there & (other < splits), 0.0, cache_modifier=".cg")
        tl.store(arrived, 0)
    return last, total


@triton.jit
def down(  # type: ignore[no-untyped-def]
    x, A, u, pieces_of_u, signals, program, rows, in_features, x_stride, ranks, pieces,
    ROWS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A program of u = x A^T (rows, ranks): some of its columns, and the sum of all if it is the last to finish."""
    piece, group = program % pieces, program // pieces
    rank_tiles = tl.cdiv(ranks, RANKS)
    rank, row = group % rank_tiles * RANKS + tl.arange(0, RANKS), group // rank_tiles * ROWS + tl.arange(0, ROWS)
    k = piece * PIECE + tl.arange(0, PIECE)
    a_row = A + tl.minimum(rank, ranks - 1)[:, None].to(tl.int64) * in_features
    if AHEAD:
        line = piece * PIECE + tl.arange(0, PIECE // 64) * 64
        fetch(a_row + tl.minimum(line, in_features - 1)[None, :])
        gdc_launch_dependents()
        gdc_wait()
    in_row = (k < in_features)[None, :]
    x_row = x + tl.minimum(row, rows - 1)[:, None].to(tl.int64) * x_stride
    some_x = tl.load(x_row + k[None, :], mask=in_row, other=0.0)
    total = tl.dot(tl.load(a_row + k[None, :], mask=in_row, other=0.0), tl.trans(some_x), input_precision="ieee")
    at = row[None, :] * ranks + rank[:, None]
    there = (row < rows)[None, :] & (rank < ranks)[:, None]
    size = rows * ranks
    last, total = _sum_of_splits(total, pieces_of_u, signals + 2 + group, piece, pieces, at, size, there, A_THREAD=4)
    if last:
        tl.store(u + at, total.to(u.dtype.element_ty), mask=there)
        tl.debug_barrier()
        tl.atomic_add(signals, 1, sem="release")


@triton.jit
def _touches(out_first, start, stop, OUTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether the tile has rows of W that lie in [start, stop)."""
    return (out_first < stop) & (out_first + OUTS > start)


@triton.jit
def _part_of_u(u, rows, ranks, a_start, ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr):  # type: ignore[no-untyped-def]
    """(BLOCK_R, ROWS): u^T of the part whose A starts at row `a_start`."""
    m, r = tl.arange(0, ROWS), tl.arange(0, BLOCK_R)
    at = u + tl.minimum(m, rows - 1)[None, :] * ranks + (a_start + r)[:, None]
    return tl.load(at, mask=(r < RANK)[:, None], other=0.0, cache_modifier=".cg")


@triton.jit
def _update(total, up, of_part, n, start, stop):  # type: ignore[no-untyped-def]
    """total (OUTS, ROWS) + B u^T on those of its rows that lie in [start, stop)."""
    here = tl.where(((n >= start) & (n < stop))[:, None], up, tl.zeros_like(up))
    return tl.dot(here, of_part, total, input_precision="ieee")


@triton.jit
def _with_adapter(  # type: ignore[no-untyped-def]
    total, u, B, signals, n, rows, tiles, ranks, groups, out_first,
    start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """total (OUTS, ROWS), of the rows `n` of W, + the update of every part; once for each of `tiles`.

    B's rows, of one part each, are loaded while others may still compute u. Most tiles are of one part.
    """
    ROWS: tl.constexpr = total.shape[1]
    OUTS: tl.constexpr = total.shape[0]
    in1, in2 = (n >= start1) & (n < stop1), (n >= start2) & (n < stop2)
    there = ((n >= start0) & (n < stop0)) | in1 | in2
    b_row = n + tl.where(in2, b2 - start2, tl.where(in1, b1 - start1, b0 - start0))
    r = tl.arange(0, BLOCK_R)
    up_at = B + b_row[:, None].to(tl.int64) * RANK + r[None, :]
    up = tl.load(up_at, mask=there[:, None] & (r < RANK)[None, :], other=0.0)
    touches0, touches1 = _touches(out_first, start0, stop0, OUTS), _touches(out_first, start1, stop1, OUTS)
    touches2 = _touches(out_first, start2, stop2, OUTS)
    start = tl.where(touches0, start0, tl.where(touches1, start1, start2))
    stop = tl.where(touches0, stop0, tl.where(touches1, stop1, stop2))
    ready = tl.atomic_add(signals, 0, sem="acquire")
    while ready < groups:
        ready = tl.atomic_add(signals, 0, sem="acquire")
    of_first = _part_of_u(
        u, rows, ranks, tl.where(touches0, a0, tl.where(touches1, a1, tl.where(touches2, a2, 0))), ROWS, RANK, BLOCK_R
    )
    if tl.atomic_add(signals + 1, 1, sem="relaxed") == tiles - 1:  # all have seen that u is there
        tl.store(signals, 0)
        tl.store(signals + 1, 0)
    total = _update(total, up, of_first, n, start, stop)
    if touches0 & touches1:
        total = _update(total, up, _part_of_u(u, rows, ranks, a1, ROWS, RANK, BLOCK_R), n, start1, stop1)
    if (touches0 | touches1) & touches2:
        total = _update(total, up, _part_of_u(u, rows, ranks, a2, ROWS, RANK, BLOCK_R), n, start2, stop2)
    return total


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    total, n, m, tile, split, splits, rows, out_features, bias, out, partial, counters,
    u, B, signals, ranks, groups, start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2,
    WARPS: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, ADAPTED: tl.constexpr, RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What follows a program's sum `total` (OUTS, ROWS): bias and adapter, the other splits' sums, and the result.

    n, m: rows of W and of x that it is of; some may be beyond the last.
    """
    OUTS: tl.constexpr = total.shape[0]
    ROWS: tl.constexpr = total.shape[1]
    if split == 0:
        if HAS_BIAS:
            total += tl.load(bias + tl.minimum(n, out_features - 1)).to(tl.float32)[:, None]
        if ADAPTED:
            total = _with_adapter(
                total, u, B, signals, n, rows, tl.cdiv(out_features, OUTS), ranks, groups, tile * OUTS,
                start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2, RANK, BLOCK_R,
            )  # fmt: skip
    there = (n < out_features)[:, None] & (m < rows)[None, :]
    at = m[None, :] * out_features + n[:, None]
    finishes = True
    if SPLIT:
        finishes, total = _sum_of_splits(
            total, partial, counters + tile, split, splits, at, rows * out_features, there,
            A_THREAD=OUTS * ROWS // (32 * WARPS),
        )  # fmt: skip
    if finishes:
        tl.store(out + at, total.to(out.dtype.element_ty), mask=there)
