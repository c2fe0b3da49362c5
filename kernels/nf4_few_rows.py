"""Launches the NF4 product of few rows (`nf4_linear_triton`): how it is cut up, and the memory that it works in."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .few_rows_adapter import (
    MAX_PARTS,
    MAX_RANK,
    MAX_TILES,
    Adapter,
    adapter_programs,
    counters,
    rows_of_program,
    starts_ahead,
)
from .nf4 import BLOCK, NF4Tensor
from .nf4_linear_triton import nf4_linear_kernel
from .nf4_triton import decoding_tables

DTYPES = (torch.bfloat16, torch.float16)  # of x
MAX_ROWS = 64  # of x; above, decoding everything once and cuBLAS take less time
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


def fits(x: Tensor, parts: int = 0, rank: int = 0) -> bool:
    """Whether `launch` takes x (rows, in) and so many parts of that rank, and is faster than decoding W and cuBLAS."""
    counters(x.device)  # both now: the first call with few rows may come in a graph's capture
    decoding_tables(x.device)
    takes_x = x.dtype in DTYPES and 0 < x.shape[0] <= MAX_ROWS and x.stride(1) == 1
    return takes_x and parts <= MAX_PARTS and rank <= MAX_RANK


def step_blocks(in_features: int, blocks: int) -> int:
    """Blocks of a step where a config has `blocks`: what divides a row's, and their codes' words."""
    return min(blocks, _word(in_features))


def _word(in_features: int) -> int:
    return next(size for size in (4, 2, 1) if in_features // BLOCK % size == 0)


def launch(x: Tensor, nf4: NF4Tensor, bias: Tensor | None, adapter: Adapter | None, config: Config) -> Tensor:
    """(rows, in), columns contiguous, bf16 or fp16 -> (rows, out); `bias` (out,) and adapter, all of x's dtype."""
    (rows, in_features), out_features = x.shape, nf4.shape[0]
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows of x are too many for one launch, which takes {MAX_ROWS}; decode W instead")
    ahead = starts_ahead(x.device)
    tiles, row_blocks, word = triton.cdiv(out_features, config.outs), in_features // BLOCK, _word(in_features)
    if tiles > MAX_TILES:
        raise ValueError(f"{out_features} outputs are too many for tiles of {config.outs}")
    blocks = step_blocks(in_features, config.blocks)
    sharing = min(config.sharing, blocks)
    warps = min(config.warps, config.outs // 16 * sharing)
    steps = row_blocks // blocks
    splits = max(min(config.splits, steps), triton.cdiv(steps, _COLUMNS // BLOCK // blocks))
    of_adapter, arguments = adapter_programs(x, adapter)
    zeros = counters(x.device)
    out = x.new_empty(rows, out_features)
    nf4_linear_kernel[(of_adapter + tiles * splits,)](
        x=x, codes=nf4.codes, scale_words=nf4.scale_codes.view(_WORDS[word]), group_scales=nf4.group_scales,
        group_start=nf4.group_start, offset=nf4.offset, tables=decoding_tables(x.device), bias=bias, out=out,
        partial=x.new_empty(splits if splits > 1 else 0, rows, out_features, dtype=torch.float32),
        counters=zeros, signals=zeros[MAX_TILES:], rows=rows, out_features=out_features, x_stride=x.stride(0),
        row_bytes=in_features // 2, row_words=row_blocks // word, row_steps=steps, splits=splits, **arguments,
        ROWS=rows_of_program(rows), OUTS=config.outs, WORD=word, BLOCKS=blocks, WARPS=warps, SHARING=sharing,
        SPLIT=splits > 1, HAS_BIAS=bias is not None, PLAIN=not x.is_cuda, AHEAD=ahead, launch_pdl=ahead,
        num_warps=warps, num_stages=config.buffers + 1, maxnreg=config.registers, enable_fp_fusion=False,
    )  # fmt: skip
    return out
