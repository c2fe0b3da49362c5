"""Launches the NF4 product of few rows (`nf4_linear_triton`): how it is cut up, and the memory that it works in."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from .nf4 import BLOCK, NF4Tensor
from .nf4_linear_triton import nf4_linear_down_kernel, nf4_linear_kernel
from .nf4_triton import decoding_tables

MAX_PARTS = 3  # q, k, v
MAX_ROWS = 64  # of x; above, decoding everything once and cuBLAS take less time
_PIECE = 256  # columns of x A^T that a program sums
_DOWN_ROWS, _DOWN_RANKS = 16, 16  # at most, of a program
_COUNTERS = 2**16
_COLUMNS = 256 * BLOCK  # of a program: so few that they are of at most two groups of scales
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}  # as many scale codes as divide those of a row


@dataclass(frozen=True)
class Config:
    """How the product of one shape and number of rows is cut up.

    Attributes:
        outs: rows of W of a program.
        warps: of a program.
        sharing: warps that have the same rows of W, at least 16, and different columns of a step.
        blocks: of 64 columns that a step loads and multiplies, at most 4.
        buffers: steps whose codes are in shared memory or on their way to it.
        registers: of a thread, at most, so that more programs run at a time; None for as many as it takes.
        splits: programs that share a tile's columns.
    """

    outs: int
    warps: int
    sharing: int
    blocks: int
    buffers: int
    registers: int | None
    splits: int


@dataclass(frozen=True)
class Adapter:
    """LoRA's tensors and the columns of the result that it adds to.

    Attributes:
        a: (ranks, in), the stacked A.
        b: (adapted rows, r), the stacked B, scaled.
        parts: at most MAX_PARTS of (first column, last column + 1, first row in a, first row in b), none overlapping.
    """

    a: Tensor
    b: Tensor
    parts: Sequence[tuple[int, int, int, int]]


@cache
def counters(device: torch.device) -> Tensor:
    """(2, 2, n) zeros that launches on a device share: [0] those of launches made one by one, [1] of those in graphs.

    Of either, [0] are those of x A^T, [1] those of the rest, which runs at the same time. Raises RuntimeError where
    they would be made during a graph's capture, which does not set them to zero.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first NF4 product on a device cannot be captured in a CUDA graph; run one before")
    return torch.zeros(2, 2, _COUNTERS, dtype=torch.int32, device=device)


def fits(x: Tensor, parts: Sequence[tuple[int, int, int, int]]) -> bool:
    """Whether `launch` takes these rows and parts, and is faster than decoding W and multiplying by cuBLAS."""
    counters(x.device)  # both now: the first call with few rows may come in a graph's capture
    decoding_tables(x.device)
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and 0 < x.shape[0] <= MAX_ROWS and x.stride(1) == 1 and len(parts) <= MAX_PARTS


def rows_of_program(rows: int) -> int:
    """Rows of x that a program computes, given how many there are; `Config`s are chosen by it."""
    return max(8, triton.next_power_of_2(rows))


def step_blocks(in_features: int, blocks: int) -> int:
    """Blocks of a step where a config has `blocks`: what divides a row's, and their codes' words."""
    return min(blocks, _word(in_features))


def _word(in_features: int) -> int:
    return next(size for size in (4, 2, 1) if in_features // BLOCK % size == 0)


@cache
def _starts_ahead(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(x: Tensor, nf4: NF4Tensor, bias: Tensor | None, adapter: Adapter | None, config: Config) -> Tensor:
    """(rows, in), columns contiguous, bf16 or fp16 -> (rows, out); `bias` (out,), all of x's dtype."""
    (rows, in_features), out_features = x.shape, nf4.shape[0]
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows of x are too many for one launch, which takes {MAX_ROWS}; decode W instead")
    ahead, block_rows = _starts_ahead(x.device), rows_of_program(rows)
    tiles, row_blocks, word = triton.cdiv(out_features, config.outs), in_features // BLOCK, _word(in_features)
    if tiles > _COUNTERS:
        raise ValueError(f"{out_features} outputs are too many for one launch")
    blocks = step_blocks(in_features, config.blocks)
    sharing = min(config.sharing, blocks)
    warps = min(config.warps, config.outs // 16 * sharing)
    steps = row_blocks // blocks
    split_steps = min(triton.cdiv(steps, config.splits), _COLUMNS // BLOCK // blocks)
    splits = triton.cdiv(steps, split_steps)
    arrived = counters(x.device)[int(x.is_cuda and torch.cuda.is_current_stream_capturing())]
    out = x.new_empty(rows, out_features)
    partial = x.new_empty(splits if splits > 1 else 0, rows, out_features, dtype=torch.float32)
    # u is held until the second launch, lest its memory became that of `partial`.
    u, _held = (x, x) if adapter is None else _down(x, adapter.a, arrived[0], ahead)
    ranks, rank = (0, 0) if adapter is None else (adapter.a.shape[0], adapter.b.shape[1])
    parts = [number for part in adapter.parts for number in part] if adapter is not None else []
    nf4_linear_kernel[(splits, tiles)](
        x, nf4.codes, nf4.scale_codes.view(_WORDS[word]), nf4.group_scales, nf4.group_start, nf4.offset,
        decoding_tables(x.device), bias, u, x if adapter is None else adapter.b, out, partial, arrived[1],
        rows, out_features, x.stride(0), in_features // 2, row_blocks // word, steps, split_steps, ranks,
        *parts, *[0] * (4 * MAX_PARTS - len(parts)),
        ROWS=block_rows, OUTS=config.outs, WORD=word, BLOCKS=blocks, WARPS=warps, SHARING=sharing,
        ADAPTED=adapter is not None, RANK=rank, BLOCK_R=max(16, triton.next_power_of_2(rank)),
        HAS_BIAS=bias is not None, PLAIN=not x.is_cuda, AHEAD=ahead, launch_pdl=ahead, num_warps=warps,
        num_stages=config.buffers + 1, maxnreg=config.registers, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _down(x: Tensor, a: Tensor, arrived: Tensor, ahead: bool) -> tuple[Tensor, Tensor]:
    """x A^T (rows, ranks), and the memory that its kernel works in."""
    (rows, in_features), ranks = x.shape, a.shape[0]
    block_rows, pieces = min(_DOWN_ROWS, rows_of_program(rows)), triton.cdiv(in_features, _PIECE)
    u, partial = x.new_empty(rows, ranks), x.new_empty(pieces, rows, ranks, dtype=torch.float32)
    nf4_linear_down_kernel[(pieces, triton.cdiv(ranks, _DOWN_RANKS), triton.cdiv(rows, block_rows))](
        x, a, u, partial, arrived, rows, in_features, x.stride(0), ranks,
        ROWS=block_rows, RANKS=_DOWN_RANKS, PIECE=_PIECE, AHEAD=ahead, launch_pdl=ahead, num_warps=4,
    )  # fmt: skip
    return u, partial
