"""The Triton kernels of `rms_norm`: one program for a wide row or for several short ones.

Bytes and error are stated there.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements of a program with several rows
ELEMENTS_PER_THREAD = 16  # two 16-byte loads of each operand in half precision
MAX_WARPS = 16


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    first_row, rows, outer_stride, inner_stride,
    INNER: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Offsets (ROWS, BLOCK) of rows that lie INNER to a group, and which of them exist."""
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    start = (row // INNER).to(tl.int64) * outer_stride + (row % INNER).to(tl.int64) * inner_stride
    return start[:, None] + column[None, :], (row < rows)[:, None] & (column < WIDTH)[None, :]


@triton.jit
def _gain(weight, ONE_PLUS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.arange(0, BLOCK)
    gain = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if ONE_PLUS:
        gain += 1.0
    return gain[None, :]


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, residual, weight, summed, out, rows, x_outer, x_inner, residual_outer, residual_inner, eps,
    INNER: tl.constexpr, ONE_PLUS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = norm(x), or summed = x + residual and out = norm(summed)."""
    first = tl.program_id(0) * ROWS
    to_out, ok = _tile(first, rows, WIDTH, 0, 1, WIDTH, ROWS, BLOCK)
    to_x, _ = _tile(first, rows, x_outer, x_inner, INNER, WIDTH, ROWS, BLOCK)
    wide = tl.load(x + to_x, mask=ok, other=0.0).to(tl.float32)
    if residual is not None:
        to_residual, _ = _tile(first, rows, residual_outer, residual_inner, INNER, WIDTH, ROWS, BLOCK)
        wide += tl.load(residual + to_residual, mask=ok, other=0.0).to(tl.float32)
        rounded = wide.to(out.dtype.element_ty)
        tl.store(summed + to_out, rounded, mask=ok)
        wide = rounded.to(tl.float32)  # backward reads the rounded sum: normalise that
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + eps)[:, None]
    if not ONE_PLUS:
        normed = normed.to(out.dtype.element_ty).to(tl.float32)  # Llama's form rounds before it multiplies
    normed *= _gain(weight, ONE_PLUS, WIDTH, BLOCK)
    tl.store(out + to_out, normed.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_out, x, weight, grad_summed, grad_x, rows,
    grad_outer, grad_inner, x_outer, x_inner, summed_outer, summed_inner, eps,
    INNER: tl.constexpr, ONE_PLUS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With n = x rstd and h = grad_out gain: grad_x = rstd (h - n mean(h n)) [+ grad_summed].

    Both sums are over operands in registers and do not wait for each other: computing rstd again costs nothing.
    """
    first = tl.program_id(0) * ROWS
    to_grad_x, ok = _tile(first, rows, WIDTH, 0, 1, WIDTH, ROWS, BLOCK)
    to_grad, _ = _tile(first, rows, grad_outer, grad_inner, INNER, WIDTH, ROWS, BLOCK)
    to_x, _ = _tile(first, rows, x_outer, x_inner, INNER, WIDTH, ROWS, BLOCK)
    wide = tl.load(x + to_x, mask=ok, other=0.0).to(tl.float32)
    scaled = tl.load(grad_out + to_grad, mask=ok, other=0.0).to(tl.float32) * _gain(weight, ONE_PLUS, WIDTH, BLOCK)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + eps)
    along = tl.sum(scaled * wide, axis=1) * rstd / WIDTH
    grad = rstd[:, None] * (scaled - wide * rstd[:, None] * along[:, None])
    if grad_summed is not None:
        to_summed, _ = _tile(first, rows, summed_outer, summed_inner, INNER, WIDTH, ROWS, BLOCK)
        grad += tl.load(grad_summed + to_summed, mask=ok, other=0.0).to(tl.float32)
    tl.store(grad_x + to_grad_x, grad.to(grad_x.dtype.element_ty), mask=ok)


class _Shape(NamedTuple):
    """How the rows of operands of one shape are laid out and dealt to programs."""

    rows: int
    inner: int
    width: int
    rows_per_program: int
    block: int

    @classmethod
    def of(cls, x: Tensor) -> "_Shape":
        width = x.shape[-1]
        block = triton.next_power_of_2(width)
        return cls(x.numel() // width, x.shape[1] if x.ndim == 3 else 1, width, max(1, TILE // block), block)

    @property
    def grid(self) -> tuple[int]:
        return (triton.cdiv(self.rows, self.rows_per_program),)

    @property
    def warps(self) -> int:
        elements = self.rows_per_program * self.block
        return min(MAX_WARPS, max(1, elements // (32 * ELEMENTS_PER_THREAD)))


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
    shape = _Shape.of(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = None if residual is None else torch.empty_like(out)
    x, *x_strides = _with_row_strides(x)
    residual_strides = [0, 0]
    if residual is not None:
        residual, *residual_strides = _with_row_strides(residual)
    if shape.rows:
        _forward[shape.grid](
            x, residual, weight, summed, out, shape.rows, *x_strides, *residual_strides, eps, INNER=shape.inner,
            ONE_PLUS=one_plus_weight, WIDTH=shape.width, ROWS=shape.rows_per_program, BLOCK=shape.block,
            num_warps=shape.warps,
        )  # fmt: skip
    return out, summed


def rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, eps: float, one_plus_weight: bool, grad_summed: Tensor | None = None
) -> Tensor:
    """The gradient of `x`, plus `grad_summed` where given; contiguous."""
    shape = _Shape.of(x)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_out, *grad_strides = _with_row_strides(grad_out)
    x, *x_strides = _with_row_strides(x)
    summed_strides = [0, 0]
    if grad_summed is not None:
        grad_summed, *summed_strides = _with_row_strides(grad_summed)
    if shape.rows:
        _backward[shape.grid](
            grad_out, x, weight, grad_summed, grad_x, shape.rows, *grad_strides, *x_strides, *summed_strides, eps,
            INNER=shape.inner, ONE_PLUS=one_plus_weight, WIDTH=shape.width, ROWS=shape.rows_per_program,
            BLOCK=shape.block, num_warps=shape.warps,
        )  # fmt: skip
    return grad_x
