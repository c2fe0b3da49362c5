"""Launches the FP4 product of few rows (`fp4_linear_triton`): how it is cut up, and the memory that it works in."""

import math
from dataclasses import dataclass
from functools import cache

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
from .fp4 import CHUNK, FP4Tensor
from .fp4_linear_triton import fp4_linear_kernel

DTYPES = (torch.bfloat16,)  # of x
MAX_ROWS = 128  # of x; above, decoding everything once and cuBLAS take less time
_TOGETHER_ROWS = 64  # of x, that warps multiply together at least: the M of wgmma
_REGISTERS = 2**16  # of a multiprocessor
_WORDS = {1: torch.int16, 2: torch.int32, 4: torch.int64}  # the scale codes of so many chunks


@dataclass(frozen=True)
class Config:
    """How the product of one shape and number of rows is cut up.

    Attributes:
        outs: rows of W of a program.
        warps: of a program; `outs * sharing` is at least 16 times as many.
        sharing: warps that have the same rows of W and different columns of a step, at most two for each chunk; 0 where
            all warps multiply one tile together, with weights that they pass on through shared memory.
        chunks: of 64 columns that a step loads and multiplies: 1, 2 or 4.
        buffers: steps whose codes are in shared memory or on their way to it.
        splits: programs that share a tile's columns; of no more steps than there are.
    """

    outs: int
    warps: int
    sharing: int
    chunks: int
    buffers: int
    splits: int


def fits(x: Tensor, parts: int = 0, rank: int = 0) -> bool:
    """Whether `launch` takes x (rows, in) and so many parts of that rank, and is faster than decoding W and cuBLAS."""
    counters(x.device)  # now: the first call with few rows may come in a graph's capture
    takes_x = x.dtype in DTYPES and 0 < x.shape[0] <= MAX_ROWS and x.stride(1) == 1
    return takes_x and parts <= MAX_PARTS and rank <= MAX_RANK


def step_chunks(in_features: int, chunks: int) -> int:
    """Chunks of a step where a config has `chunks`: what divides a row's."""
    return math.gcd(chunks, in_features // CHUNK)


@cache
def _most_registers(device: torch.device, warps: int) -> int | None:
    """Of a thread where `warps` work together: on Hopper so few that another program decodes while one multiplies.

    Elsewhere the shared memory is for one program, and other tensor cores would have registers spilled.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return _REGISTERS // (64 * warps) if hopper and warps > 4 else None


def launch(x: Tensor, fp4: FP4Tensor, bias: Tensor | None, adapter: Adapter | None, config: Config) -> Tensor:
    """(rows, in), at most MAX_ROWS, columns contiguous -> (rows, out); `bias` (out,) and adapter, all of x's dtype.

    The dtype is bf16; fp16 as well in Triton's interpreter.
    """
    (rows, in_features), out_features = x.shape, fp4.shape[0]
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows of x are too many for one launch, which takes {MAX_ROWS}; decode W instead")
    ahead = starts_ahead(x.device)
    chunks = step_chunks(in_features, config.chunks)
    together, sharing = config.sharing == 0, min(config.sharing, 2 * chunks)
    warps = config.warps if together else min(config.warps, config.outs // 16 * sharing)
    program_rows = max(rows_of_program(rows), _TOGETHER_ROWS if together else 0)
    tiles, steps = triton.cdiv(out_features, config.outs), in_features // CHUNK // chunks
    if tiles > MAX_TILES:
        raise ValueError(f"{out_features} outputs are too many for tiles of {config.outs}")
    splits = min(config.splits, steps)
    of_adapter, arguments = adapter_programs(x, adapter)
    zeros = counters(x.device)
    out = x.new_empty(rows, out_features)
    fp4_linear_kernel[(of_adapter + tiles * splits,)](
        x=x, codes=fp4.codes.view(torch.int32), scale_words=fp4.scale_codes.view(_WORDS[chunks]),
        row_scales=fp4.row_scales, bias=bias, out=out,
        partial=x.new_empty(splits if splits > 1 else 0, rows, out_features, dtype=torch.float32),
        counters=zeros, signals=zeros[MAX_TILES:], rows=rows, out_features=out_features, x_stride=x.stride(0),
        row_words=in_features // 8, row_steps=steps, splits=splits, **arguments,
        ROWS=program_rows, OUTS=config.outs, CHUNKS=chunks, WARPS=warps, SHARING=sharing, SPLIT=splits > 1,
        HAS_BIAS=bias is not None, PLAIN=not x.is_cuda, AHEAD=ahead, launch_pdl=ahead, num_warps=warps,
        num_stages=config.buffers + 1, maxnreg=_most_registers(x.device, warps) if together else None,
    )  # fmt: skip
    return out
