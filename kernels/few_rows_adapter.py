"""How a product of few rows by a 4-bit W is launched: its grid, the adapter's arguments, counters of what is done.

Of the kernels of either format, whose common parts are in `few_rows_triton`.

Counters must be zero before a launch, and are again after it; two launches that overlap need counters of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .few_rows_triton import MAX_PARTS, PART_ARGUMENTS, PIECE, RANKS, VARYING

MAX_RANK = 256  # of a part: B's tile and u's are in shared memory at once, and with 512 no longer fit there
MAX_TILES = 2**16  # of rows of W
_ROWS = 64  # of x, that a program of x A^T takes at most
_SIGNALS = 2**12  # counters of the adapter: those of u and one of each group of such programs


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


def random_adapter(out_features: int, in_features: int, device: torch.device, rank: int = 16) -> Adapter:
    """One of all outputs, in bf16, to measure a product with: an engine's have adapters."""
    a = torch.randn(rank, in_features, dtype=torch.bfloat16, device=device)
    b = torch.randn(out_features, rank, dtype=torch.bfloat16, device=device)
    return Adapter(a, b, [(0, out_features, 0, 0)])


def rows_of_program(rows: int, together: bool = False) -> int:
    """Rows of x that a program takes, given how many there are; how a product is cut up is chosen by it.

    together: warps multiply in groups of four, which takes 16 rows at least.
    """
    return max(16 if together else 8, triton.next_power_of_2(rows))


@cache
def _all_counters(device: torch.device) -> Tensor:
    """The zeros that launches on a device share: [0] those of launches made one by one, [1] of those in CUDA graphs."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first 4-bit product on a device cannot be captured in a CUDA graph; run one before")
    return torch.zeros(2, MAX_TILES + _SIGNALS, dtype=torch.int32, device=device)


def counters(device: torch.device) -> Tensor:
    """(MAX_TILES + signals,) zeros for a launch now: those of tiles, then the adapter's.

    Raises RuntimeError where they would be made during a graph's capture, which does not set them to zero.
    """
    return _all_counters(device)[int(device.type == "cuda" and torch.cuda.is_current_stream_capturing())]


def takes(x: Tensor, parts: int, rank: int, dtypes: Sequence[torch.dtype], max_rows: int) -> bool:
    """Whether a kernel for at most so many rows of x (rows, in), of these dtypes, takes x and `parts` of that rank."""
    counters(x.device)  # now: the first call with few rows may come in a graph's capture
    takes_x = x.dtype in dtypes and 0 < x.shape[0] <= max_rows and x.stride(1) == 1
    return takes_x and parts <= MAX_PARTS and rank <= MAX_RANK


@cache
def starts_ahead(device: torch.device) -> bool:
    """Whether kernels can start before the one ahead of them has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def adapter_programs(x: Tensor, adapter: Adapter | None) -> tuple[int, dict[str, Any]]:
    """How many programs compute u, and the arguments of a kernel that has it (`VARYING`, `down`, `finish`)."""
    numbers = [number for part in adapter.parts for number in part] if adapter is not None else []
    arguments: dict[str, Any] = dict.fromkeys(VARYING, 0) | dict(zip(PART_ARGUMENTS, numbers, strict=False))
    rows, in_features = x.shape
    block_rows = min(_ROWS, rows_of_program(rows))
    if adapter is None:
        unused = {"A": None, "B": None, "u": None, "pieces_of_u": None}
        return 0, arguments | unused | {"ADAPTED": False, "DOWN_ROWS": block_rows, "RANK": 0, "BLOCK_R": 16}
    ranks, rank = adapter.a.shape[0], adapter.b.shape[1]
    pieces = triton.cdiv(in_features, PIECE.value)
    groups = triton.cdiv(ranks, RANKS.value) * triton.cdiv(rows, block_rows)
    if groups > _SIGNALS - 2:
        most = RANKS.value * ((_SIGNALS - 2) // 2)
        raise ValueError(f"{ranks} rows of A are too many for one launch, which takes {most}")
    arguments |= {"A": adapter.a, "B": adapter.b, "ranks": ranks, "pieces": pieces, "groups": groups}
    arguments |= {"u": x.new_empty(rows, ranks), "pieces_of_u": x.new_empty(pieces, rows, ranks, dtype=torch.float32)}
    arguments |= {"ADAPTED": True, "DOWN_ROWS": block_rows, "RANK": rank}
    return pieces * groups, arguments | {"BLOCK_R": max(16, triton.next_power_of_2(rank))}


def launch_arguments(
    x: Tensor, bias: Tensor | None, adapter: Adapter | None, out_features: int, outs: int, splits: int, max_rows: int
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of a product x W^T, and the arguments that a kernel of any format has; `out` is the result.

    After the programs of u come `splits` for each tile of `outs` of W's rows.

    Raises ValueError for more rows of x than `max_rows`, or more tiles than there are counters.
    """
    rows, tiles = x.shape[0], triton.cdiv(out_features, outs)
    if rows > max_rows:
        raise ValueError(f"{rows} rows of x are too many for one launch, which takes {max_rows}; decode W instead")
    if tiles > MAX_TILES:
        raise ValueError(f"{out_features} outputs are too many for tiles of {outs}")
    of_adapter, arguments = adapter_programs(x, adapter)
    zeros, ahead = counters(x.device), starts_ahead(x.device)
    return (of_adapter + tiles * splits,), arguments | {
        "x": x, "bias": bias, "out": x.new_empty(rows, out_features), "rows": rows, "out_features": out_features,
        "partial": x.new_empty(splits if splits > 1 else 0, rows, out_features, dtype=torch.float32),
        "counters": zeros, "signals": zeros[MAX_TILES:], "x_stride": x.stride(0), "splits": splits, "OUTS": outs,
        "SPLIT": splits > 1, "HAS_BIAS": bias is not None, "PLAIN": not x.is_cuda, "AHEAD": ahead, "launch_pdl": ahead,
    }  # fmt: skip
