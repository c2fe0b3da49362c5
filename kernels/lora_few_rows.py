"""Frozen linear and its LoRA update in one kernel, for the few rows of a decoding step.

y = x W^T + bias + (x A_p^T) B_p^T. With few rows the product reads every byte of W once and computes little, so its
time is the bytes over the bandwidth; two more launches for A and B cost a fifth of the step. Here each program takes
the rows of W of one output tile and, in the same pass over the inputs, the A of the part that the tile belongs to (a
few rows, from the L2 cache), then adds u B^T to its tile. Bytes: those of W, plus A once and x once for each tile from
the L2 cache.

Error: u = x A^T is rounded to the compute dtype before it meets B, as in the unfused form; the sum of base and update
is rounded once instead of twice. Against the unfused form: 2 ulp of the larger of base and sum.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64  # above it the plain products are faster
MAX_PARTS = 3  # q, k, v


@triton.jit
def _few_rows(  # type: ignore[no-untyped-def]
    x, w, bias, a, b, y, rows, out_features, x_stride, y_stride,
    out0, stop0, b0, a0, out1, stop1, b1, a1, out2, stop2, b2, a2,
    IN: tl.constexpr, RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    in0 = (first >= out0) & (first < stop0)
    in1 = (first >= out1) & (first < stop1)
    in2 = (first >= out2) & (first < stop2)
    a_row = tl.where(in0, a0, tl.where(in1, a1, tl.where(in2, a2, 0)))
    b_row = tl.where(in0, b0 + first - out0, tl.where(in1, b1 + first - out1, tl.where(in2, b2 + first - out2, 0)))
    adapted = in0 | in1 | in2

    m, n, k, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    m_ok, n_ok, r_ok = m[:, None] < rows, (first + n)[:, None] < out_features, r[:, None] < RANK
    x_at = x + m[:, None] * x_stride + k[None, :]
    w_at = w + (first + n)[:, None].to(tl.int64) * IN + k[None, :]
    a_at = a + (a_row + r)[:, None] * IN + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    down = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, IN, BLOCK_K):
        if IN % BLOCK_K == 0:
            w_tile = tl.load(w_at + start, mask=n_ok, other=0.0, eviction_policy="evict_first")
            x_tile = tl.load(x_at + start, mask=m_ok, other=0.0, eviction_policy="evict_last")
            a_tile = tl.load(a_at + start, mask=r_ok, other=0.0, eviction_policy="evict_last")
        else:
            k_ok = (start + k)[None, :] < IN
            w_tile = tl.load(w_at + start, mask=n_ok & k_ok, other=0.0)
            x_tile = tl.load(x_at + start, mask=m_ok & k_ok, other=0.0)
            a_tile = tl.load(a_at + start, mask=r_ok & k_ok, other=0.0)
        total = tl.dot(x_tile, tl.trans(w_tile), total)
        down = tl.dot(x_tile, tl.trans(a_tile), down)
    b_at = b + (b_row + n)[:, None] * RANK + r[None, :]
    b_tile = tl.load(b_at, mask=adapted & n_ok & (r[None, :] < RANK), other=0.0)
    total = tl.dot(down.to(b_tile.dtype), tl.trans(b_tile), total)
    if HAS_BIAS:
        total += tl.load(bias + first + n, mask=first + n < out_features, other=0.0)[None, :].to(tl.float32)
    y_at = y + m[:, None] * y_stride + (first + n)[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=m_ok & ((first + n)[None, :] < out_features))


def tile(out_features: int, in_features: int, rows: int) -> tuple[int, int, int, int]:
    """(BLOCK_N, BLOCK_K, warps, stages): small tiles until there are two programs for each multiprocessor."""
    for block_n in (64, 32):
        if out_features // block_n >= 264:
            return block_n, 128, 4, 4
    return 16, 256, 4, 4


def fits(x: Tensor, starts: Sequence[int], stops: Sequence[int]) -> bool:
    """Whether the kernel takes this input: half precision, few rows, at most three parts, each of whole tiles."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and 0 < x.shape[0] <= MAX_ROWS
        and x.stride(1) == 1
        and len(starts) <= MAX_PARTS
        and all(bound % 64 == 0 for bound in (*starts, *stops))
    )


def lora_linear_few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    out_starts: Sequence[int],
    out_stops: Sequence[int],
    a_starts: Sequence[int],
    b_starts: Sequence[int],
    config: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """The fused product, where `fits`.

    Args:
        x: (rows, in), bf16 or fp16, rows at most MAX_ROWS.
        weight: (out, in); bias: (out,) or None.
        a: (parts * r, in); b: (adapted rows, r), scaled.
        out_starts, out_stops, b_starts, a_starts: for each adapted part its rows in the output, its first row in `b`
            and in `a`.
        config: (BLOCK_N, BLOCK_K, warps, stages); by default `tile`.

    Returns:
        (rows, out), contiguous.
    """
    rows, (out_features, in_features), rank = x.shape[0], weight.shape, b.shape[1]
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    block_n, block_k, warps, stages = config or tile(out_features, in_features, rows)
    parts: list[int] = []
    for part in range(MAX_PARTS):
        there = part < len(out_starts)
        parts += [out_starts[part], out_stops[part], b_starts[part], a_starts[part]] if there else [0, 0, 0, 0]
    _few_rows[(triton.cdiv(out_features, block_n),)](
        x, weight, bias, a, b, y, rows, out_features, x.stride(0), y.stride(0), *parts,
        IN=in_features, RANK=rank, HAS_BIAS=bias is not None,
        BLOCK_M=max(16, triton.next_power_of_2(rows)), BLOCK_N=block_n, BLOCK_K=block_k,
        BLOCK_R=max(16, triton.next_power_of_2(rank)), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y
