"""Launches the FP4 product of few rows (`fp4_linear_triton`): how it is cut up, and the memory that it works in."""

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from .fp4 import CHUNK, FP4Tensor
from .fp4_linear_triton import fp4_linear_kernel

MAX_ROWS = 64  # of x; above, decoding everything once and cuBLAS take less time
_COUNTERS = 2**16
_WORDS = {1: torch.int16, 2: torch.int32, 4: torch.int64}  # the scale codes of so many chunks


@dataclass(frozen=True)
class Config:
    """How the product of one shape and number of rows is cut up.

    Attributes:
        outs: rows of W of a program.
        warps: of a program; `outs * groups` is at least 16 times as many.
        groups: ranges of columns that a program's warps share; divides `warps`.
        chunks: of 64 columns that a step loads and multiplies: 1, 2 or 4.
        buffers: steps whose codes are in shared memory or on their way to it.
        splits: programs that share a tile's columns.
    """

    outs: int
    warps: int
    groups: int
    chunks: int
    buffers: int
    splits: int


@cache
def counters(device: torch.device) -> Tensor:
    """The zeros that launches on a device share: [0] those of launches made one by one, [1] of those in CUDA graphs.

    Raises RuntimeError where they would be made during a graph's capture, which does not set them to zero.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first FP4 product on a device cannot be captured in a CUDA graph; run one before")
    return torch.zeros(2, _COUNTERS, dtype=torch.int32, device=device)


def fits(x: Tensor) -> bool:
    """Whether `launch` takes these rows (rows, in), and is faster than decoding W and multiplying by cuBLAS."""
    counters(x.device)  # now: the first call with few rows may come in a graph's capture
    return x.dtype == torch.bfloat16 and 0 < x.shape[0] <= MAX_ROWS and x.stride(1) == 1


def rows_of_program(rows: int) -> int:
    """Rows of x that a program takes, given how many there are; `Config`s are chosen by it."""
    return max(8, triton.next_power_of_2(rows))


def step_chunks(in_features: int, chunks: int) -> int:
    """Chunks of a step where a config has `chunks`: what divides a row's."""
    return math.gcd(chunks, in_features // CHUNK)


@cache
def _starts_ahead(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(x: Tensor, fp4: FP4Tensor, bias: Tensor | None, config: Config) -> Tensor:
    """(rows, in), at most MAX_ROWS, columns contiguous -> (rows, out), `bias` (out,), all of x's dtype.

    The dtype is bf16; fp16 as well in Triton's interpreter.
    """
    (rows, in_features), out_features = x.shape, fp4.shape[0]
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows of x are too many for one launch, which takes {MAX_ROWS}; decode W instead")
    ahead = _starts_ahead(x.device)
    chunks = step_chunks(in_features, config.chunks)
    tiles = triton.cdiv(out_features, config.outs)
    if tiles > _COUNTERS:
        raise ValueError(f"{out_features} outputs are too many for tiles of {config.outs}")
    out = x.new_empty(rows, out_features)
    partial = x.new_empty(config.splits if config.splits > 1 else 0, rows, out_features, dtype=torch.float32)
    fp4_linear_kernel[(tiles * config.splits,)](
        x, fp4.codes.view(torch.int32), fp4.scale_codes.view(_WORDS[chunks]), fp4.row_scales, bias, out, partial,
        counters(x.device)[int(x.is_cuda and torch.cuda.is_current_stream_capturing())],
        rows, out_features, x.stride(0), in_features // 8, in_features // CHUNK // chunks, config.splits,
        ROWS=rows_of_program(rows), OUTS=config.outs, CHUNKS=chunks, BATCH=config.warps, GROUPS=config.groups,
        SPLIT=config.splits > 1, HAS_BIAS=bias is not None, PLAIN=not x.is_cuda, AHEAD=ahead, launch_pdl=ahead,
        num_warps=config.warps, num_stages=config.buffers + 1,
    )  # fmt: skip
    return out
