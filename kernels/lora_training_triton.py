"""down_p up_p^T for the columns of every part of a fused projection, in one launch.

An inner dimension of 16 to 128 makes this a matter of writing the result: a tile of it is 32 KiB, what it is made of a
few KiB that lie in the L2 cache. cuBLAS takes one call a part and twice the time of the write.

Bytes: the result written once, `down` read once from memory, `up` from the cache. Error: sums in fp32, rounded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_RANGES = 3  # q, k, v
TILE, FULL_TILE = (128, 128, 8), (64, 64, 4)  # rows, columns, warps; the second for products in fp32


@dataclass(frozen=True)
class ColumnRange:
    """Columns [start, stop) of the result: columns from `down` on of `down`, rows from `up` on of `up`; None: zero."""

    start: int
    stop: int
    down: int = 0
    up: int | None = None


@triton.jit
def _low_rank(  # type: ignore[no-untyped-def]
    down, up, bias, out, rows, down_stride, up_row_stride, up_column_stride, out_stride,
    start0, stop0, down0, up0, start1, stop1, down1, up1, start2, stop2, down2, up2, tiles0, tiles01,
    RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    in0, in1 = tile < tiles0, tile < tiles01
    start = tl.where(in0, start0, tl.where(in1, start1, start2))
    stop = tl.where(in0, stop0, tl.where(in1, stop1, stop2))
    down_first = tl.where(in0, down0, tl.where(in1, down1, down2))
    up_first = tl.where(in0, up0, tl.where(in1, up1, up2))  # below zero: a range without an update
    before = (tile - tl.where(in0, 0, tl.where(in1, tiles0, tiles01))) * BLOCK_N
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    in_rows, in_columns = m < rows, start + before + n < stop
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if up_first >= 0:
        down_row = down + m[:, None].to(tl.int64) * down_stride + down_first
        up_row = up + (up_first + before + n)[None, :].to(tl.int64) * up_row_stride
        for first in tl.static_range(0, RANK, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            if RANK % BLOCK_K == 0:
                u = tl.load(down_row + k[None, :], mask=in_rows[:, None], other=0.0)
                w = tl.load(up_row + k[:, None] * up_column_stride, mask=in_columns[None, :], other=0.0)
            else:
                u = tl.load(down_row + k[None, :], mask=in_rows[:, None] & (k < RANK)[None, :], other=0.0)
                in_both = in_columns[None, :] & (k < RANK)[:, None]
                w = tl.load(up_row + k[:, None] * up_column_stride, mask=in_both, other=0.0)
            if FULL:
                total = tl.dot(u.to(tl.float32), w.to(tl.float32), total, input_precision="ieee")
            else:
                total = tl.dot(u, w, total)
    column = start + before + n
    if HAS_BIAS:
        total += tl.load(bias + column, mask=in_columns, other=0.0)[None, :].to(tl.float32)
    out_at = out + m[:, None].to(tl.int64) * out_stride + column[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def _inner_block(rank: int) -> int:
    """Columns of `down` a step: one that divides the rank if there is one, as loads without a mask are wider."""
    dividing = next((block for block in (64, 32, 16) if rank % block == 0), None)
    return dividing or min(64, max(16, triton.next_power_of_2(rank)))


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
    full = down.dtype == torch.float32 or not down.is_cuda  # Triton's interpreter multiplies the bits of bf16
    block_m, block_n, warps = FULL_TILE if full else TILE
    tiles = [triton.cdiv(part.stop - part.start, block_n) for part in ranges]
    numbers: list[int] = []
    for part in (*ranges, *[ColumnRange(0, 0)] * (MAX_RANGES - len(ranges))):
        numbers += [part.start, part.stop, part.down, -1 if part.up is None else part.up]
    _low_rank[(sum(tiles), triton.cdiv(rows, block_m))](
        down, up, bias, out, rows, down.stride(0), up.stride(0), up.stride(1), out.stride(0),
        *numbers, tiles[0], sum(tiles[:2]),
        RANK=rank, HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=_inner_block(rank),
        FULL=full, num_warps=warps,
    )  # fmt: skip
    return out
