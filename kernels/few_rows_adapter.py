"""What the products of few rows by a 4-bit W have in common: the adapter, inside the kernel of x W^T; sums of splits.

The first programs of a launch compute u = x A^T, one of them 256 columns for 16 ranks, and the last of them to
finish sums the pieces up, in their order, and says that u is there. The other programs multiply x and W. Whichever
starts a tile of rows of W then waits for u and adds u B^T: programs start in the order of their numbers, so those
waited for run already, and as a rule u has long been there. That is one launch where a kernel of its own for u would
cost a second launch and its latency ahead of the product.

Counters must be zero before a launch, and are again after it; two launches that overlap need counters of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_PARTS = 3  # q, k, v
MAX_RANK = 256  # of a part: B's tile and u's are in shared memory at once, and with 512 no longer fit there
MAX_TILES = 2**16  # of rows of W
# Of a program of x A^T: columns that it sums, and at most so many ranks and rows of x.
_PIECE, _RANKS, _ROWS = tl.constexpr(256), tl.constexpr(16), 64
_SIGNALS = 2**12  # counters of the adapter: those of u and one of each group of such programs
_ARGUMENTS = [f"{name}{part}" for part in range(MAX_PARTS) for name in ("start", "stop", "a", "b")]
VARYING = ["ranks", "pieces", "groups", *_ARGUMENTS]  # no kernel is compiled for special values of these


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


def rows_of_program(rows: int) -> int:
    """Rows of x that a program takes, given how many there are; how a product is cut up is chosen by it."""
    return max(8, triton.next_power_of_2(rows))


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
    """How many programs compute u, and the arguments of a kernel that has it (`VARYING`, `down`, `with_adapter`)."""
    numbers = [number for part in adapter.parts for number in part] if adapter is not None else []
    arguments: dict[str, Any] = dict.fromkeys(VARYING, 0) | dict(zip(_ARGUMENTS, numbers, strict=False))
    rows, in_features = x.shape
    block_rows = min(_ROWS, rows_of_program(rows))
    if adapter is None:
        unused = {"A": None, "B": None, "u": None, "pieces_of_u": None}
        return 0, arguments | unused | {"ADAPTED": False, "DOWN_ROWS": block_rows, "RANK": 0, "BLOCK_R": 16}
    ranks, rank = adapter.a.shape[0], adapter.b.shape[1]
    pieces = triton.cdiv(in_features, _PIECE.value)
    groups = triton.cdiv(ranks, _RANKS.value) * triton.cdiv(rows, block_rows)
    if groups > _SIGNALS - 2:
        most = _RANKS.value * ((_SIGNALS - 2) // 2)
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


@triton.jit
def fetch(address):  # type: ignore[no-untyped-def]
    """Ask for the 128 bytes around each address to come to the L2 cache."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [address.to(tl.uint64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def sum_of_splits(  # type: ignore[no-untyped-def]
    total, partial, arrived, split, splits, at, size, there, A_THREAD: tl.constexpr
):  # fmt: skip
    """(whether this program is the last of its tile, and then the sum of all splits, in their order).

    A_THREAD: elements of the sum that a thread has, 0 for less than one; loads of as many splits at once as there are
    registers for.
    """
    AT_ONCE: tl.constexpr = max(1, min(16, 64 // max(1, A_THREAD)))
    tl.store(partial + split.to(tl.int64) * size + at, total, mask=there)
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == splits - 1
    if last:
        total = tl.zeros_like(total)
        for some in range(0, splits, AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                other = some + i
                split_at = partial + other.to(tl.int64) * size
                total += tl.load(split_at + at, there & (other < splits), 0.0, cache_modifier=".cg")
        tl.store(arrived, 0)
    return last, total


@triton.jit
def down(  # type: ignore[no-untyped-def]
    x, A, u, pieces_of_u, signals, program, rows, in_features, x_stride, ranks, pieces,
    ROWS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A program of u = x A^T (rows, ranks): some of its columns, and the sum of all if it is the last to finish."""
    piece, group = program % pieces, program // pieces
    rank_tiles = tl.cdiv(ranks, _RANKS)
    rank, row = group % rank_tiles * _RANKS + tl.arange(0, _RANKS), group // rank_tiles * ROWS + tl.arange(0, ROWS)
    k = piece * _PIECE + tl.arange(0, _PIECE)
    a_row = A + tl.minimum(rank, ranks - 1)[:, None].to(tl.int64) * in_features
    if AHEAD:
        line = piece * _PIECE + tl.arange(0, _PIECE // 64) * 64
        fetch(a_row + tl.minimum(line, in_features - 1)[None, :])
        gdc_launch_dependents()
        gdc_wait()
    in_row = (k < in_features)[None, :]
    x_row = x + tl.minimum(row, rows - 1)[:, None].to(tl.int64) * x_stride
    some_x = tl.load(x_row + k[None, :], mask=in_row, other=0.0)
    total = tl.dot(tl.load(a_row + k[None, :], mask=in_row, other=0.0), tl.trans(some_x), input_precision="ieee")
    at = row[None, :] * ranks + rank[:, None]
    there = (row < rows)[None, :] & (rank < ranks)[:, None]
    size = rows * ranks
    last, total = sum_of_splits(total, pieces_of_u, signals + 2 + group, piece, pieces, at, size, there, A_THREAD=4)
    if last:
        tl.store(u + at, total.to(u.dtype.element_ty), mask=there)
        tl.debug_barrier()
        tl.atomic_add(signals, 1, sem="release")


@triton.jit
def _touches(out_first, start, stop, OUTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether the tile has rows of W that lie in [start, stop)."""
    return (out_first < stop) & (out_first + OUTS > start)


@triton.jit
def _part_of_u(u, rows, ranks, a_start, ROWS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr):  # type: ignore[no-untyped-def]
    """(BLOCK_R, ROWS): u^T of the part whose A starts at row `a_start`."""
    m, r = tl.arange(0, ROWS), tl.arange(0, BLOCK_R)
    at = u + tl.minimum(m, rows - 1)[None, :] * ranks + (a_start + r)[:, None]
    return tl.load(at, mask=(r < RANK)[:, None], other=0.0, cache_modifier=".cg")


@triton.jit
def _update(total, up, of_part, n, start, stop):  # type: ignore[no-untyped-def]
    """total (OUTS, ROWS) + B u^T on those of its rows that lie in [start, stop)."""
    here = tl.where(((n >= start) & (n < stop))[:, None], up, tl.zeros_like(up))
    if total.shape[1] >= 64:  # as wide as the tensor cores' M: the sum lies the other way round in the registers
        turned = tl.dot(tl.trans(of_part), tl.trans(here), tl.trans(total), input_precision="ieee")
        return tl.trans(turned)
    else:
        return tl.dot(here, of_part, total, input_precision="ieee")


@triton.jit
def with_adapter(  # type: ignore[no-untyped-def]
    total, u, B, signals, n, rows, tiles, ranks, groups, out_first,
    start0, stop0, a0, b0, start1, stop1, a1, b1, start2, stop2, a2, b2, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """total (OUTS, ROWS), of the rows `n` of W, + the update of every part; once for each of `tiles`.

    B's rows, of one part each, are loaded while others may still compute u. Most tiles are of one part.
    """
    ROWS: tl.constexpr = total.shape[1]
    OUTS: tl.constexpr = total.shape[0]
    in1, in2 = (n >= start1) & (n < stop1), (n >= start2) & (n < stop2)
    there = ((n >= start0) & (n < stop0)) | in1 | in2
    b_row = n + tl.where(in2, b2 - start2, tl.where(in1, b1 - start1, b0 - start0))
    r = tl.arange(0, BLOCK_R)
    up_at = B + b_row[:, None].to(tl.int64) * RANK + r[None, :]
    up = tl.load(up_at, mask=there[:, None] & (r < RANK)[None, :], other=0.0)
    touches0, touches1 = _touches(out_first, start0, stop0, OUTS), _touches(out_first, start1, stop1, OUTS)
    touches2 = _touches(out_first, start2, stop2, OUTS)
    start = tl.where(touches0, start0, tl.where(touches1, start1, start2))
    stop = tl.where(touches0, stop0, tl.where(touches1, stop1, stop2))
    ready = tl.atomic_add(signals, 0, sem="acquire")
    while ready < groups:
        ready = tl.atomic_add(signals, 0, sem="acquire")
    of_first = _part_of_u(
        u, rows, ranks, tl.where(touches0, a0, tl.where(touches1, a1, tl.where(touches2, a2, 0))), ROWS, RANK, BLOCK_R
    )
    if tl.atomic_add(signals + 1, 1, sem="relaxed") == tiles - 1:  # all have seen that u is there
        tl.store(signals, 0)
        tl.store(signals + 1, 0)
    total = _update(total, up, of_first, n, start, stop)
    if touches0 & touches1:
        total = _update(total, up, _part_of_u(u, rows, ranks, a1, ROWS, RANK, BLOCK_R), n, start1, stop1)
    if (touches0 | touches1) & touches2:
        total = _update(total, up, _part_of_u(u, rows, ranks, a2, ROWS, RANK, BLOCK_R), n, start2, stop2)
    return total
