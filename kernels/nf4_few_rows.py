"""Launches the NF4 product of few rows (`nf4_linear_triton`): how it is cut up, and the memory that it works in."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .few_rows_adapter import Adapter, launch_arguments, rows_of_program, takes
from .nf4 import BLOCK, NF4Tensor
from .nf4_linear_triton import nf4_linear_kernel
from .nf4_triton import decoding_tables

DTYPES = (torch.bfloat16, torch.float16)  # of x
MAX_ROWS = 128  # of x; above, decoding everything once and cuBLAS take less time
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}  # as many scale codes as divide those of a row


@dataclass(frozen=True)
class Config:
    """How the product of one shape and number of rows is cut up.

    Attributes:
        outs: rows of W of a program, 16 for each warp at least.
        warps: of a program.
        together: whether warps multiply in groups of four, which have the same x, or each on its own.
        blocks: of 64 columns that a step loads and multiplies: 1, 2 or 4.
        buffers: steps whose codes, of weights and of scales, are in shared memory or on their way to it.
        registers: of a thread, at most, so that more programs run at a time; None for as many as it takes.
        splits: programs that share a tile's columns; of no more steps than there are.
    """

    outs: int
    warps: int
    together: bool
    blocks: int
    buffers: int
    registers: int | None
    splits: int


def fits(x: Tensor, parts: int = 0, rank: int = 0) -> bool:
    """Whether `launch` takes x (rows, in) and so many parts of that rank, and is faster than decoding W and cuBLAS."""
    decoding_tables(x.device)  # now: the first call with few rows may come in a graph's capture
    return takes(x, parts, rank, DTYPES, MAX_ROWS)


def step_blocks(in_features: int, blocks: int) -> int:
    """Blocks of a step where a config has `blocks`: what divides a row's, and their codes' words."""
    return min(blocks, _word(in_features))


def _word(in_features: int) -> int:
    return next(size for size in (4, 2, 1) if in_features // BLOCK % size == 0)


def launch(x: Tensor, nf4: NF4Tensor, bias: Tensor | None, adapter: Adapter | None, config: Config) -> Tensor:
    """(rows, in), columns contiguous, bf16 or fp16 -> (rows, out); `bias` (out,) and adapter, all of x's dtype."""
    rows, in_features = x.shape
    row_blocks, word = in_features // BLOCK, _word(in_features)
    blocks = step_blocks(in_features, config.blocks)
    steps = row_blocks // blocks
    splits = min(config.splits, steps)
    grid, arguments = launch_arguments(x, bias, adapter, nf4.shape[0], config.outs, splits, MAX_ROWS)
    nf4_linear_kernel[grid](
        codes=nf4.codes.view(torch.int32), scale_words=nf4.scale_codes.view(_WORDS[word]),
        group_scales=nf4.group_scales, group_start=nf4.group_start, offset=nf4.offset,
        tables=decoding_tables(x.device), row_words=in_features // 8, row_scale_words=row_blocks // word,
        row_steps=steps, **arguments, ROWS=rows_of_program(rows, config.together), WORD=word, BLOCKS=blocks,
        WARPS=config.warps, TOGETHER=config.together, num_warps=config.warps, num_stages=config.buffers + 1,
        maxnreg=config.registers, enable_fp_fusion=False,
    )  # fmt: skip
    out: Tensor = arguments["out"]
    return out
