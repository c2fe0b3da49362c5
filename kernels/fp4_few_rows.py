"""Launches the FP4 product of few rows (`fp4_linear_triton`): how it is cut up, and the memory that it works in."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .few_rows_adapter import Adapter, launch_arguments, rows_of_program, takes
from .fp4 import CHUNK, FP4Tensor
from .fp4_linear_triton import fp4_linear_kernel

DTYPES = (torch.bfloat16,)  # of x
MAX_ROWS = 128  # of x; above, decoding everything once and cuBLAS take less time
_WORDS = {1: torch.int16, 2: torch.int32, 4: torch.int64}  # the scale codes of so many chunks


@dataclass(frozen=True)
class Config:
    """How the product of one shape and number of rows is cut up.

    Attributes:
        outs: rows of W of a program, 16 for each warp at least.
        warps: of a program.
        together: whether warps multiply in groups of four, which have the same x, or each on its own.
        chunks: of 64 columns that a step loads and multiplies: 1, 2 or 4.
        buffers: steps whose codes are in shared memory or on their way to it.
        registers: of a thread, at most, so that more programs run at a time; None for as many as it takes.
        splits: programs that share a tile's columns; of no more steps than there are.
    """

    outs: int
    warps: int
    together: bool
    chunks: int
    buffers: int
    registers: int | None
    splits: int


def fits(x: Tensor, parts: int = 0, rank: int = 0) -> bool:
    """Whether `launch` takes x (rows, in) and so many parts of that rank, and is faster than decoding W and cuBLAS."""
    return takes(x, parts, rank, DTYPES, MAX_ROWS)


def step_chunks(in_features: int, chunks: int) -> int:
    """Chunks of a step where a config has `chunks`: what divides a row's."""
    return math.gcd(chunks, in_features // CHUNK)


def launch(x: Tensor, fp4: FP4Tensor, bias: Tensor | None, adapter: Adapter | None, config: Config) -> Tensor:
    """(rows, in), at most MAX_ROWS, columns contiguous -> (rows, out); `bias` (out,) and adapter, all of x's dtype.

    The dtype is bf16; fp16 as well in Triton's interpreter.
    """
    rows, in_features = x.shape
    row_chunks = in_features // CHUNK
    chunks = step_chunks(in_features, config.chunks)
    word = max(chunks, math.gcd(2, row_chunks))  # less than four bytes are not copied to shared memory ahead of time
    steps = row_chunks // chunks
    splits = min(config.splits, steps)
    grid, arguments = launch_arguments(x, bias, adapter, fp4.shape[0], config.outs, splits, MAX_ROWS)
    fp4_linear_kernel[grid](
        codes=fp4.codes.view(torch.int32), scale_words=fp4.scale_codes.view(_WORDS[word]), row_scales=fp4.row_scales,
        row_words=in_features // 8, row_scale_words=row_chunks // word, row_steps=steps, **arguments,
        ROWS=rows_of_program(rows, config.together), CHUNKS=chunks, WORD=word, WARPS=config.warps,
        TOGETHER=config.together, num_warps=config.warps, num_stages=config.buffers + 1, maxnreg=config.registers,
    )  # fmt: skip
    out: Tensor = arguments["out"]
    return out
