"""Launches the NF4 product of few rows (`nf4_linear_triton`): how it is cut up, and the memory that it works in."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from .nf4 import BLOCK, NF4Tensor
from .nf4_linear_triton import nf4_linear_kernel
from .nf4_triton import decoding_tables

MAX_PARTS = 3  # q, k, v
MAX_ROWS = 128  # of x in a program; more are taken in slabs
FEW_ROWS = 256  # above, decoding everything once and cuBLAS take less time than decoding once a slab
_PIECE = 1024  # columns of x A^T that a program sums
_RANK_TILE = 64
_COUNTERS = 2**16
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}  # as many scale codes as divide those of a row


@dataclass(frozen=True)
class Config:
    """How the product of one shape and number of rows is cut up.

    Attributes:
        outs: rows of W of a program.
        warps: of a program, at least a sixteenth of `outs`.
        blocks: of 64 columns that a step loads and multiplies, at most 4.
        buffers: steps whose codes are in shared memory or on their way to it.
        splits: programs that share a tile's columns.
        wgmma: the four warps of a group share x; else each warp multiplies rows of W of its own.
    """

    outs: int
    warps: int
    blocks: int
    buffers: int
    splits: int
    wgmma: bool = False


@dataclass(frozen=True)
class Adapter:
    """LoRA's tensors and the columns of the result that it adds to.

    Attributes:
        a: (ranks, in), the stacked A.
        b: (adapted rows, r), the stacked B, scaled.
        parts: at most MAX_PARTS of (first column, last column + 1, first row in a, first row in b).
    """

    a: Tensor
    b: Tensor
    parts: Sequence[tuple[int, int, int, int]]


@cache
def counters(device: torch.device) -> Tensor:
    """The zeros that launches on a device share: [0] those of launches made one by one, [1] of those in CUDA graphs.

    Raises RuntimeError where they would be made during a graph's capture, which does not set them to zero.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first NF4 product on a device cannot be captured in a CUDA graph; run one before")
    return torch.zeros(2, _COUNTERS, dtype=torch.int32, device=device)


def fits(x: Tensor, parts: Sequence[tuple[int, int, int, int]]) -> bool:
    """Whether `launch` takes these rows and parts, and is faster than decoding W and multiplying by cuBLAS."""
    counters(x.device)  # both now: the first call with few rows may come in a graph's capture
    decoding_tables(x.device)
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and 0 < x.shape[0] <= FEW_ROWS and x.stride(1) == 1 and len(parts) <= MAX_PARTS


def rows_of_program(rows: int) -> int:
    """Rows of x that a program takes, given how many there are; `Config`s are chosen by it."""
    return min(MAX_ROWS, max(8, triton.next_power_of_2(rows)))


@cache
def _starts_ahead(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(x: Tensor, nf4: NF4Tensor, bias: Tensor | None, adapter: Adapter | None, config: Config) -> Tensor:
    """(rows, in), columns contiguous, bf16 or fp16 -> (rows, out); `bias` (out,), all of x's dtype."""
    (rows, in_features), out_features = x.shape, nf4.shape[0]
    plain, ahead = not x.is_cuda, _starts_ahead(x.device)
    block_rows = rows_of_program(rows)
    slabs, tiles = triton.cdiv(rows, block_rows), triton.cdiv(out_features, config.outs)
    row_blocks = in_features // BLOCK
    word = next(size for size in (4, 2, 1) if row_blocks % size == 0)
    out = x.new_empty(rows, out_features)
    partial = x.new_empty(config.splits if config.splits > 1 else 0, rows, out_features, dtype=torch.float32)
    pieces, ranks, rank = triton.cdiv(in_features, _PIECE), 0, 0
    parts: list[int] = []
    if adapter is not None:
        ranks, rank = adapter.a.shape[0], adapter.b.shape[1]
        parts = [number for part in adapter.parts for number in part]
    rank_tile = min(_RANK_TILE, max(16, triton.next_power_of_2(ranks)))
    downs = triton.cdiv(ranks, rank_tile) * pieces
    if slabs * (tiles + 2) > _COUNTERS:
        raise ValueError(f"{out_features} outputs of {rows} rows are too many for one launch")
    down = x.new_empty(slabs * pieces * block_rows * ranks, dtype=torch.float32)
    nf4_linear_kernel[((downs + tiles * config.splits) * slabs,)](
        x, nf4.codes, nf4.scale_codes.view(_WORDS[word]), nf4.group_scales, nf4.group_start, nf4.offset,
        decoding_tables(x.device), bias, *((x, x) if adapter is None else (adapter.a, adapter.b)), out, partial, down,
        counters(x.device)[int(x.is_cuda and torch.cuda.is_current_stream_capturing())],
        rows, slabs, out_features, in_features, x.stride(0), in_features // 2, row_blocks // word, tiles, config.splits,
        downs, pieces, ranks, *parts, *[0] * (4 * MAX_PARTS - len(parts)),
        ROWS=block_rows, OUTS=config.outs, WORD=word, BLOCKS=min(word, config.blocks),
        BATCH=1 if config.wgmma else config.warps,
        PARTS=len(parts) // 4, RANK=rank, RANKS=rank_tile, BLOCK_R=max(16, triton.next_power_of_2(rank)),
        PIECE=_PIECE, HAS_BIAS=bias is not None, PLAIN=plain, AHEAD=ahead, launch_pdl=ahead,
        num_warps=config.warps, num_stages=2 * config.buffers + 1, enable_fp_fusion=False,
    )  # fmt: skip
    return out
