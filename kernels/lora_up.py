"""The second half of a LoRA product in one kernel: out = y + bias + u B^T, where y and u come out of one product.

A frozen projection W (out, in) with the adapter's A (parts * r, in) stored beneath it is one matrix, and x [W; A]^T
gives the base output y and u = x A^T together. What is left is to add u_p B_p^T to the columns of each adapted part p:
two launches for base and adapter instead of two and one for each part, and in decoding, where a launch costs as much
as a small product, that is most of the adapter's price.

It is not launched while the product still runs (programmatic dependent launch): projections one after the other gain by
that, but a whole engine, where other kernels come in between, does not (benchmarks/decode.py).

Bytes: y read and written once, B and u read once. Error: u and y are rounded to the compute dtype by the product; the
sum is made in fp32 and rounded once.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PARTS = 3  # q, k, v
MAX_RANK = 256  # the tiles of u and B are in shared memory, and with 512 no longer fit there on every card
BLOCK_N = 64
PART_ALIGNMENT = BLOCK_N  # a tile of columns lies in one part
# Up to so many rows of x: rows of a program and its warps. Measured on an H200 with 8, 32 and 128 rows, rank 16 and the
# projections of a 4B model.
PROGRAMS = ((16, 16, 2), (32, 32, 2), (256, 32, 4), (math.inf, 64, 4))


@triton.jit
def _lora_up(  # type: ignore[no-untyped-def]
    stacked, bias, b, out, rows, out_features, stacked_stride,
    out0, stop0, a0, b0, out1, stop1, a1, b1, out2, stop2, a2, b2,
    RANK: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    in0 = (first >= out0) & (first < stop0)
    in1 = (first >= out1) & (first < stop1)
    in2 = (first >= out2) & (first < stop2)
    adapted = in0 | in1 | in2
    a_start = tl.where(in0, a0, tl.where(in1, a1, a2))
    b_start = first + tl.where(in0, b0 - out0, tl.where(in1, b1 - out1, b2 - out2))
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    in_rows, in_columns = (m < rows)[:, None], (first + n)[None, :] < out_features
    row_at = stacked + m[:, None].to(tl.int64) * stacked_stride
    up_at = b + (b_start + n)[None, :] * RANK + r[:, None]
    if RANK == BLOCK_R:
        up = tl.load(up_at, mask=in_columns & adapted, other=0.0)
    else:
        up = tl.load(up_at, mask=in_columns & adapted & (r < RANK)[:, None], other=0.0)
    base = tl.load(row_at + (first + n)[None, :], mask=in_rows & in_columns, other=0.0)
    down = tl.load(
        row_at + out_features + a_start + r[None, :], mask=in_rows & (r < RANK)[None, :] & adapted, other=0.0
    )
    total = tl.dot(down, up, base.to(tl.float32))
    if HAS_BIAS:
        total += tl.load(bias + first + n, mask=first + n < out_features, other=0.0)[None, :].to(tl.float32)
    out_at = out + m[:, None].to(tl.int64) * out_features + (first + n)[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=in_rows & in_columns)


def fits(dtype: torch.dtype, rank: int, out_starts: Sequence[int], out_stops: Sequence[int]) -> bool:
    """Whether the kernel takes these parts: half precision, a rank of at most 256, at most three of whole tiles."""
    whole = all(bound % PART_ALIGNMENT == 0 for bound in (*out_starts, *out_stops))
    half = dtype in (torch.bfloat16, torch.float16)
    return half and rank <= MAX_RANK and len(out_starts) <= MAX_PARTS and whole


def lora_up(
    stacked: Tensor,
    bias: Tensor | None,
    b: Tensor,
    out_features: int,
    out_starts: Sequence[int],
    out_stops: Sequence[int],
    a_starts: Sequence[int],
    b_starts: Sequence[int],
) -> Tensor:
    """Add each part's update to the base output.

    Args:
        stacked: (rows, out + parts * r), the product with [W; A]; half precision, columns contiguous.
        bias: (out,) or None.
        b: (adapted rows, r), scaled, contiguous.
        out_features: columns of the base output.
        out_starts, out_stops, a_starts, b_starts: each part's columns, its first row in A and in `b`; `fits` holds.

    Returns:
        (rows, out), contiguous.
    """
    rows, rank = stacked.shape[0], b.shape[1]
    out = torch.empty(rows, out_features, dtype=stacked.dtype, device=stacked.device)
    parts: list[int] = []
    for part in range(MAX_PARTS):
        there = part < len(out_starts)
        parts += [out_starts[part], out_stops[part], a_starts[part], b_starts[part]] if there else [0, 0, 0, 0]
    block_m, warps = next((block_m, warps) for most, block_m, warps in PROGRAMS if rows <= most)
    _lora_up[(triton.cdiv(out_features, BLOCK_N), triton.cdiv(rows, block_m))](
        stacked, bias, b, out, rows, out_features, stacked.stride(0), *parts,
        RANK=rank, HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=BLOCK_N,
        BLOCK_R=max(16, triton.next_power_of_2(rank)), num_warps=warps,
    )  # fmt: skip
    return out
