"""The Triton kernels of `rms_norm`: one program for a wide row or for several short ones.

A program is made of tiles in which a thread has 8 elements, one 16-byte load in half precision: the pieces of a wide
row, or some whole short rows. All of a program's loads are issued before anything waits for one: what hides the
memory's latency is the bytes in flight. The weight is frozen: no gradient of it is computed. Bytes and error are stated
in `rms_norm`.
"""

from functools import cache
from math import ceil
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS_PER_THREAD = 8  # of one tile
WARP_TILE = 32 * ELEMENTS_PER_THREAD
MAX_CHUNKS = 5  # tiles of a wide row: with more the backward pass runs out of registers
SHORT_TILES, SHORT_WARPS = 2, 4  # of a program with several rows
# A thread's registers for each byte of an element, of a program with several rows. Where no limit is named ptxas saves
# registers by moving the second tile's loads behind the arithmetic of the first, which is one more wait for the memory.
SHORT_REGISTERS_PER_BYTE = 32
MAX_WARPS = 16


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    first_row, rows, outer_stride, inner_stride, tile: tl.constexpr,
    INNER: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Offsets (ROWS, CHUNK) of a program's tile, counted along rows that lie INNER to a group, and which exist."""
    row = first_row + tile // CHUNKS * ROWS + tl.arange(0, ROWS)
    column = tile % CHUNKS * CHUNK + tl.arange(0, CHUNK)
    start = (row // INNER).to(tl.int64) * outer_stride + (row % INNER).to(tl.int64) * inner_stride
    return start[:, None] + column[None, :], (row < rows)[:, None] & (column < WIDTH)[None, :]


@triton.jit
def _load_tiles(  # type: ignore[no-untyped-def]
    x, first_row, rows, outer_stride, inner_stride,
    INNER: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    tiles = ()
    for tile in tl.static_range(TILES):
        to, ok = _place(first_row, rows, outer_stride, inner_stride, tile, INNER, WIDTH, CHUNKS, ROWS, CHUNK)
        tiles = tiles + (tl.load(x + to, mask=ok, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def _load_weight(weight, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """CHUNKS tiles (ROWS, CHUNK): one for each row, which is cheaper from the L1 cache than through shared memory."""
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * CHUNK + tl.arange(0, CHUNK)[None, :] + tl.zeros([ROWS, 1], tl.int32)
        tiles = tiles + (tl.load(weight + column, mask=column < WIDTH, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def _gain(weight, ONE_PLUS: tl.constexpr):  # type: ignore[no-untyped-def]
    return 1.0 + weight.to(tl.float32) if ONE_PLUS else weight.to(tl.float32)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, residual, weight, summed, out, rows, x_outer, x_inner, residual_outer, residual_inner, eps,
    INNER: tl.constexpr, ONE_PLUS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out = norm(x), or summed = x + residual and out = norm(summed)."""
    first = tl.program_id(0) * (TILES // CHUNKS * ROWS)
    xs = _load_tiles(x, first, rows, x_outer, x_inner, INNER, WIDTH, TILES, CHUNKS, ROWS, CHUNK)
    if residual is not None:
        residuals = _load_tiles(
            residual, first, rows, residual_outer, residual_inner, INNER, WIDTH, TILES, CHUNKS, ROWS, CHUNK
        )
        sums = ()
        for tile in tl.static_range(TILES):
            to, ok = _place(first, rows, WIDTH, 0, tile, 1, WIDTH, CHUNKS, ROWS, CHUNK)
            rounded = (xs[tile].to(tl.float32) + residuals[tile].to(tl.float32)).to(out.dtype.element_ty)
            tl.store(summed + to, rounded, mask=ok)
            sums = sums + (rounded,)  # type: ignore[assignment]  # noqa: RUF005
        xs = sums  # backward reads the rounded sum: normalise that
    weights = _load_weight(weight, WIDTH, CHUNKS, ROWS, CHUNK)
    for row in tl.static_range(0, TILES, CHUNKS):
        squares = tl.zeros([ROWS, CHUNK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            wide = xs[row + chunk].to(tl.float32)
            squares += wide * wide
        rstd = tl.rsqrt(tl.sum(squares, axis=1) / WIDTH + eps)[:, None]
        for chunk in tl.static_range(CHUNKS):
            normed = xs[row + chunk].to(tl.float32) * rstd
            if not ONE_PLUS:
                normed = normed.to(out.dtype.element_ty).to(tl.float32)  # Llama's form rounds before it multiplies
            normed *= _gain(weights[chunk], ONE_PLUS)
            to, ok = _place(first, rows, WIDTH, 0, row + chunk, 1, WIDTH, CHUNKS, ROWS, CHUNK)
            tl.store(out + to, normed.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_out, x, weight, grad_summed, grad_x, rows,
    grad_outer, grad_inner, x_outer, x_inner, summed_outer, summed_inner, eps,
    INNER: tl.constexpr, ONE_PLUS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """With n = x rstd and h = grad_out gain: grad_x = rstd (h - n mean(h n)) [+ grad_summed].

    Both sums are over operands in registers and are made in one reduction: computing rstd again costs nothing.
    """
    first = tl.program_id(0) * (TILES // CHUNKS * ROWS)
    xs = _load_tiles(x, first, rows, x_outer, x_inner, INNER, WIDTH, TILES, CHUNKS, ROWS, CHUNK)
    grads = _load_tiles(grad_out, first, rows, grad_outer, grad_inner, INNER, WIDTH, TILES, CHUNKS, ROWS, CHUNK)
    if grad_summed is not None:
        more = _load_tiles(
            grad_summed, first, rows, summed_outer, summed_inner, INNER, WIDTH, TILES, CHUNKS, ROWS, CHUNK
        )
    weights = _load_weight(weight, WIDTH, CHUNKS, ROWS, CHUNK)
    for row in tl.static_range(0, TILES, CHUNKS):
        squares = tl.zeros([ROWS, CHUNK], tl.float32)
        products = tl.zeros([ROWS, CHUNK], tl.float32)
        scaled = ()
        for chunk in tl.static_range(CHUNKS):
            wide = xs[row + chunk].to(tl.float32)
            h = grads[row + chunk].to(tl.float32) * _gain(weights[chunk], ONE_PLUS)
            scaled = scaled + (h,)  # type: ignore[assignment]  # noqa: RUF005
            squares += wide * wide
            products += wide * h
        square, product = tl.split(tl.sum(tl.join(squares, products), axis=1))
        rstd = tl.rsqrt(square / WIDTH + eps)
        along = product * rstd / WIDTH * rstd
        for chunk in tl.static_range(CHUNKS):
            grad = rstd[:, None] * (scaled[chunk] - xs[row + chunk].to(tl.float32) * along[:, None])
            if grad_summed is not None:
                grad += more[row + chunk].to(tl.float32)
            to, ok = _place(first, rows, WIDTH, 0, row + chunk, 1, WIDTH, CHUNKS, ROWS, CHUNK)
            tl.store(grad_x + to, grad.to(grad_x.dtype.element_ty), mask=ok)


class _Layout(NamedTuple):
    """How rows are dealt to programs, tiles and warps."""

    tiles: int
    chunks: int
    rows_per_tile: int
    chunk: int
    warps: int
    max_registers: int | None

    def programs(self, rows: int) -> int:
        return ceil(rows / (self.tiles // self.chunks * self.rows_per_tile))


@cache
def _layout(width: int, element_size: int) -> _Layout:
    """For rows of `width` elements of `element_size` bytes."""
    chunk = triton.next_power_of_2(width)
    if chunk <= WARP_TILE:
        registers = min(255, SHORT_REGISTERS_PER_BYTE * element_size)  # 255: a thread can have no more
        return _Layout(SHORT_TILES, 1, SHORT_WARPS * WARP_TILE // chunk, chunk, SHORT_WARPS, registers)
    chunk = max(WARP_TILE, triton.next_power_of_2(ceil(width / MAX_CHUNKS)))
    chunks = ceil(width / chunk)
    return _Layout(chunks, chunks, 1, chunk, min(MAX_WARPS, chunk // WARP_TILE), None)


def _with_row_strides(x: Tensor) -> tuple[Tensor, int, int]:
    """`x`, or a contiguous copy where its rows are not described by two strides, and these strides."""
    if x.ndim > 3 or x.stride(-1) != 1:
        x = x.contiguous()
    if x.ndim == 3:
        return x, x.stride(0), x.stride(1)
    if x.ndim == 2:
        return x, x.stride(0), 0
    return x, x.shape[-1], 0


def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, one_plus_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """(norm(x), None), or (norm(x + residual), x + residual); both contiguous, in the dtype of `x`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = None if residual is None else torch.empty_like(out)
    x, *x_strides = _with_row_strides(x)
    residual_strides = [0, 0]
    if residual is not None:
        residual, *residual_strides = _with_row_strides(residual)
    width = x.shape[-1]
    rows, layout = x.numel() // width, _layout(width, x.element_size())
    if rows:
        _forward[(layout.programs(rows),)](
            x, residual, weight, summed, out, rows, *x_strides, *residual_strides, eps,
            INNER=x.shape[1] if x.ndim == 3 else 1, ONE_PLUS=one_plus_weight, WIDTH=width, TILES=layout.tiles,
            CHUNKS=layout.chunks, ROWS=layout.rows_per_tile, CHUNK=layout.chunk, num_warps=layout.warps,
            maxnreg=layout.max_registers,
        )  # fmt: skip
    return out, summed


def rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, eps: float, one_plus_weight: bool, grad_summed: Tensor | None = None
) -> Tensor:
    """The gradient of `x`, plus `grad_summed` where given; contiguous."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_out, *grad_strides = _with_row_strides(grad_out)
    x, *x_strides = _with_row_strides(x)
    summed_strides = [0, 0]
    if grad_summed is not None:
        grad_summed, *summed_strides = _with_row_strides(grad_summed)
    width = x.shape[-1]
    rows, layout = x.numel() // width, _layout(width, x.element_size())
    if rows:
        _backward[(layout.programs(rows),)](
            grad_out, x, weight, grad_summed, grad_x, rows, *grad_strides, *x_strides, *summed_strides, eps,
            INNER=x.shape[1] if x.ndim == 3 else 1, ONE_PLUS=one_plus_weight, WIDTH=width, TILES=layout.tiles,
            CHUNKS=layout.chunks, ROWS=layout.rows_per_tile, CHUNK=layout.chunk, num_warps=layout.warps,
            maxnreg=layout.max_registers,
        )  # fmt: skip
    return grad_x
