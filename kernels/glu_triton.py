"""The Triton kernels of `glu`: one program for a piece of one token's row. Bytes and error are stated there."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 4  # 16 elements a thread: two 16-byte loads of each operand in half precision
GELU_LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
GELU_CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)


@triton.jit
def _activation(gate, NAME: tl.constexpr):  # type: ignore[no-untyped-def]
    """(activation(gate), its derivative), fp32. GELU's (1 + tanh(t)) / 2 is sigmoid(2 t), which does not cancel."""
    if NAME == "silu":
        share = tl.sigmoid(gate)
        derivative = share * (1.0 + gate * (1.0 - share))
    else:
        square = gate * gate
        share = tl.sigmoid(gate * (GELU_LINEAR + GELU_CUBIC * square))
        derivative = share + gate * share * (1.0 - share) * (GELU_LINEAR + 3.0 * GELU_CUBIC * square)
    return gate * share, derivative


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    gate_up, out, gate_up_stride,
    WIDTH: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // TILES).to(tl.int64)
    column = (tl.program_id(0) % TILES) * BLOCK + tl.arange(0, BLOCK)
    at = gate_up + row * gate_up_stride + column
    ok = None
    if WIDTH % BLOCK != 0:
        ok = column < WIDTH
    gate = tl.load(at, mask=ok).to(tl.float32)
    up = tl.load(at + WIDTH, mask=ok).to(tl.float32)
    active, _ = _activation(gate, NAME)
    active = active.to(out.dtype.element_ty).to(tl.float32)  # rounded as the reference rounds it
    tl.store(out + row * WIDTH + column, (active * up).to(out.dtype.element_ty), mask=ok)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_out, gate_up, grad_gate_up, grad_out_stride, gate_up_stride, grad_gate_up_stride,
    WIDTH: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """A program reads its gate and up before it writes their gradients: grad_gate_up may be gate_up."""
    row = (tl.program_id(0) // TILES).to(tl.int64)
    column = (tl.program_id(0) % TILES) * BLOCK + tl.arange(0, BLOCK)
    at = gate_up + row * gate_up_stride + column
    ok = None
    if WIDTH % BLOCK != 0:
        ok = column < WIDTH
    gate = tl.load(at, mask=ok).to(tl.float32)
    up = tl.load(at + WIDTH, mask=ok).to(tl.float32)
    grad = tl.load(grad_out + row * grad_out_stride + column, mask=ok).to(tl.float32)
    active, derivative = _activation(gate, NAME)
    active = active.to(gate_up.dtype.element_ty).to(tl.float32)
    to = grad_gate_up + row * grad_gate_up_stride + column
    tl.store(to, (grad * up * derivative).to(grad_gate_up.dtype.element_ty), mask=ok)
    tl.store(to + WIDTH, (grad * active).to(grad_gate_up.dtype.element_ty), mask=ok)


def _tiles(width: int) -> tuple[int, int]:
    """(programs a row, columns of each)."""
    block = min(BLOCK, triton.next_power_of_2(width))
    return triton.cdiv(width, block), block


def glu_forward(gate_up: Tensor, activation: str) -> Tensor:
    """(tokens, intermediate) of gate_up (tokens, 2 * intermediate), whose columns are contiguous."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    tiles, block = _tiles(width)
    if tokens:
        _forward[(tokens * tiles,)](
            gate_up, out, gate_up.stride(0), WIDTH=width, TILES=tiles, BLOCK=block, NAME=activation, num_warps=WARPS
        )
    return out


def glu_backward(grad_out: Tensor, gate_up: Tensor, activation: str, grad_gate_up: Tensor) -> None:
    """Write the gradient of `gate_up` to `grad_gate_up`, of its shape, columns contiguous; it may be `gate_up`."""
    tokens, width = grad_out.shape
    if grad_out.stride(1) != 1:
        grad_out = grad_out.contiguous()
    tiles, block = _tiles(width)
    if tokens:
        _backward[(tokens * tiles,)](
            grad_out, gate_up, grad_gate_up, grad_out.stride(0), gate_up.stride(0), grad_gate_up.stride(0),
            WIDTH=width, TILES=tiles, BLOCK=block, NAME=activation, num_warps=WARPS,
        )  # fmt: skip
