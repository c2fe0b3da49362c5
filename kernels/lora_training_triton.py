"""The low-rank products of a fused projection that take a call a part otherwise, all its parts in one launch.

    low_rank:       out_p = down_p up_p^T, a matter of writing the result
    down_gradient:  h_p = g_p B_p, a matter of reading g

cuBLAS takes up to twice the time of the bytes for the first, and of several parts for the second.

`low_rank`: a program keeps its rows of `down` and walks along columns: while a tile of the result is on its way to
memory, the next piece of `up` is on its way from the L2 cache and the next product is made. With a program for each
tile, registers let two of them share a multiprocessor, each waits for load, product and store in turn, and what is in
flight is half of what the memory takes.

Bytes: `low_rank`: the result written once, `down` read once from memory, `up` from the cache. `down_gradient`: g read
once, the rest small. Error: sums in fp32, rounded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_RANGES = 3  # q, k, v
MULTIPROCESSORS = 132  # the work is cut for about so many; any card will do


@dataclass(frozen=True)
class Tiling:
    """Rows and columns of a tile, tiles a program, and warps."""

    rows: int
    columns: int
    tiles: int
    warps: int


# Which tiles are fast depends on how `up` lies: y takes B, whose rows are contiguous, dX takes A^T, whose columns are.
# On an H200, 8192 tokens, r 32, us for qkv, o, gate_up and down of an 8B model:
#                     y                  dX
#   64x128, 4 warps   56, 33, 106, 31    69, 33, 42, 82
#   128x64, 8 warps   62, 34, 133, 33    46, 33, 34, 76
#   128x128, 8 warps  53, 33, 111, 32    45, 38, 43, 92
#   fill_             32, 23, 121, 23    23, 23, 23, 62
WRITE_BY_ROWS, WRITE_BY_COLUMNS = Tiling(64, 128, 4, 4), Tiling(128, 64, 8, 8)
FULL_WRITE = Tiling(64, 64, 2, 4)  # for products in fp32
READ, FULL_READ = (64, 64), (32, 32)  # rows and columns of g a step; the second for products in fp32
WRITE_STAGES, READ_STAGES = 2, 5  # steps whose loads are in flight
MAX_READ_RANK = 64  # beyond it so many loads of B do not fit in the shared memory of every card


@dataclass(frozen=True)
class ColumnRange:
    """Columns [start, stop) of the result: columns from `down` on of `down`, rows from `up` on of `up`; None: zero."""

    start: int
    stop: int
    down: int = 0
    up: int | None = None


@triton.jit(do_not_specialize=["groups0", "groups01", "tiles_each"])  # one compilation for any width
def _low_rank(  # type: ignore[no-untyped-def]
    down, up, bias, out, rows, down_stride, up_row_stride, up_column_stride, out_stride,
    start0, stop0, down0, up0, start1, stop1, down1, up1, start2, stop2, down2, up2, groups0, groups01, tiles_each,
    RANK: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    in0, in1 = group < groups0, group < groups01
    start = tl.where(in0, start0, tl.where(in1, start1, start2))
    stop = tl.where(in0, stop0, tl.where(in1, stop1, stop2))
    down_first = tl.where(in0, down0, tl.where(in1, down1, down2))
    up_first = tl.where(in0, up0, tl.where(in1, up1, up2))  # below zero: a range without an update
    before = (group - tl.where(in0, 0, tl.where(in1, groups0, groups01))) * (BLOCK_N * tiles_each)
    updated = up_first >= 0
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_rows = (m < rows)[:, None]
    down_row = down + m[:, None].to(tl.int64) * down_stride + down_first
    u = tl.load(down_row + k[None, :], mask=in_rows & (k < RANK)[None, :] & updated, other=0.0)
    up_at = up + k[:, None] * up_column_stride
    out_row = out + m[:, None].to(tl.int64) * out_stride
    tiles = tl.minimum(tiles_each, tl.cdiv(stop - start - before, BLOCK_N))
    for tile in tl.range(0, tiles, num_stages=STAGES):
        first = before + tile * BLOCK_N
        column = start + first + n
        in_columns = (column < stop)[None, :]
        row = (up_first + first + n)[None, :].to(tl.int64)
        if RANK == BLOCK_K:
            w = tl.load(up_at + row * up_row_stride, mask=in_columns & updated, other=0.0)
        else:
            w = tl.load(up_at + row * up_row_stride, mask=in_columns & updated & (k < RANK)[:, None], other=0.0)
        total = tl.dot(u.to(tl.float32), w.to(tl.float32), input_precision="ieee") if FULL else tl.dot(u, w)
        for more in tl.static_range(BLOCK_K, RANK, BLOCK_K):
            in_rank = more + k < RANK
            u_more = tl.load(down_row + more + k[None, :], mask=in_rows & in_rank[None, :] & updated, other=0.0)
            w_at = up_at + more * up_column_stride + row * up_row_stride
            w_more = tl.load(w_at, mask=in_columns & updated & in_rank[:, None], other=0.0)
            if FULL:
                total = tl.dot(u_more.to(tl.float32), w_more.to(tl.float32), total, input_precision="ieee")
            else:
                total = tl.dot(u_more, w_more, total)
        if HAS_BIAS:
            total += tl.load(bias + column, mask=column < stop, other=0.0)[None, :].to(tl.float32)
        tl.store(out_row + column[None, :], total.to(out.dtype.element_ty), mask=in_rows & in_columns)


@triton.jit
def _down_gradient(  # type: ignore[no-untyped-def]
    grad, up, out, rows, grad_stride, up_stride, out_stride,
    start0, stop0, down0, up0, start1, stop1, down1, up1, start2, stop2, down2, up2,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    in0, in1 = tl.program_id(1) == 0, tl.program_id(1) == 1
    start = tl.where(in0, start0, tl.where(in1, start1, start2))
    stop = tl.where(in0, stop0, tl.where(in1, stop1, stop2))
    down_first = tl.where(in0, down0, tl.where(in1, down1, down2))
    up_first = tl.where(in0, up0, tl.where(in1, up1, up2))
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    in_rows = (m < rows)[:, None]
    in_rank = (r < RANK)[None, :]
    grad_row = grad + m[:, None].to(tl.int64) * grad_stride + start
    up_row = up + up_first.to(tl.int64) * up_stride + r[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in tl.range(0, stop - start, BLOCK_N):
        in_columns = first + n < stop - start
        g = tl.load(grad_row + (first + n)[None, :], mask=in_rows & in_columns[None, :], other=0.0)
        w = tl.load(up_row + (first + n)[:, None] * up_stride, mask=in_columns[:, None] & in_rank, other=0.0)
        if FULL:
            total = tl.dot(g.to(tl.float32), w.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(g, w, total)
    out_at = out + m[:, None].to(tl.int64) * out_stride + down_first + r[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=in_rows & in_rank)


def low_rank(
    down: Tensor, up: Tensor, bias: Tensor | None, out: Tensor, ranges: Sequence[ColumnRange], rank: int
) -> Tensor:
    """out[:, start:stop] = down[:, d : d + rank] up[u : u + stop - start].T (+ bias) for each range.

    Args:
        down: (rows, ...), columns contiguous.
        up: (..., rank), any strides, same dtype.
        bias: (columns,) or None, contiguous.
        out: (rows, columns), columns contiguous; overwritten.
        ranges: at most MAX_RANGES; together they are all the columns.
        rank: columns of `down` that each range takes.

    Returns:
        `out`.
    """
    rows = out.shape[0]
    if rows == 0:
        return out
    full = _in_fp32(down)
    tiling = FULL_WRITE if full else WRITE_BY_ROWS if up.stride(1) == 1 else WRITE_BY_COLUMNS
    row_blocks = triton.cdiv(rows, tiling.rows)
    blocks = row_blocks * triton.cdiv(out.shape[1], tiling.columns)
    tiles = max(1, min(tiling.tiles, blocks // (2 * MULTIPROCESSORS)))  # so that each has two programs
    groups = [triton.cdiv(part.stop - part.start, tiling.columns * tiles) for part in ranges]
    block_k = min(64 if full else 128, _rank_block(rank))
    stages = WRITE_STAGES if rank <= block_k else 1  # several pieces of the rank in flight fill the shared memory
    _low_rank[(sum(groups), row_blocks)](
        down, up, bias, out, rows, down.stride(0), up.stride(0), up.stride(1), out.stride(0),
        *_numbers(ranges), groups[0], sum(groups[:2]), tiles,
        RANK=rank, HAS_BIAS=bias is not None, BLOCK_M=tiling.rows, BLOCK_N=tiling.columns,
        BLOCK_K=block_k, STAGES=stages, FULL=full, num_warps=tiling.warps,
    )  # fmt: skip
    return out


def down_gradient(grad: Tensor, up: Tensor, out: Tensor, ranges: Sequence[ColumnRange]) -> Tensor:
    """out[:, d : d + r] = grad[:, start:stop] up[u : u + stop - start] for each range that has an `up`.

    Args:
        grad: (rows, columns), columns contiguous.
        up: (..., r), columns contiguous, same dtype; r at most MAX_READ_RANK.
        out: (rows, ...), columns contiguous; the ranges' columns are overwritten.
        ranges: at most MAX_RANGES.

    Returns:
        `out`.
    """
    rows, rank = grad.shape[0], up.shape[1]
    # The widest first: its programs run longest.
    ranges = sorted((part for part in ranges if part.up is not None), key=lambda part: part.start - part.stop)
    if rows == 0 or not ranges:
        return out
    full = _in_fp32(grad)
    block_m, block_n = FULL_READ if full else READ
    _down_gradient[(triton.cdiv(rows, block_m), len(ranges))](
        grad, up, out, rows, grad.stride(0), up.stride(0), out.stride(0), *_numbers(ranges),
        RANK=rank, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=_rank_block(rank), FULL=full,
        num_warps=4, num_stages=READ_STAGES,
    )  # fmt: skip
    return out


def _in_fp32(operand: Tensor) -> bool:
    """Whether products are made in fp32: Triton's interpreter multiplies the bits of bf16."""
    return operand.dtype == torch.float32 or not operand.is_cuda


def _rank_block(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _numbers(ranges: Sequence[ColumnRange]) -> list[int]:
    numbers: list[int] = []
    for part in (*ranges, *[ColumnRange(0, 0)] * (MAX_RANGES - len(ranges))):
        numbers += [part.start, part.stop, part.down, -1 if part.up is None else part.up]
    return numbers
