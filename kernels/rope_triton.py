"""The Triton kernels of `rope`: one program for a group of heads of one token. Bytes and error are stated there."""

from functools import cache
from math import ceil, gcd
from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .rope import QKNorm

MIN_TILE, MAX_TILE = 1024, 2048  # elements of a program
ELEMENTS_PER_THREAD = 32  # two 16-byte loads in bf16 for each half of the heads, for one of each table
# A thread's registers for each byte of an element, enough for all loads of a program at once. Where no limit is named
# ptxas saves registers by moving loads behind the first arithmetic, and each of these is a wait for the memory more.
REGISTERS_PER_BYTE = 64


@triton.jit
def _load_pair(row, head_stride, heads, first, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    h = first + tl.arange(0, BLOCK_H)
    n = tl.arange(0, BLOCK_D)
    ok = (h < heads)[:, None] & (n < HALF)[None, :]
    at = row + h.to(tl.int64)[:, None] * head_stride + n[None, :]
    low = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=ok, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _store_pair(  # type: ignore[no-untyped-def]
    low, high, row, head_stride, heads, first, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    h = first + tl.arange(0, BLOCK_H)
    n = tl.arange(0, BLOCK_D)
    ok = (h < heads)[:, None] & (n < HALF)[None, :]
    at = row + h.to(tl.int64)[:, None] * head_stride + n[None, :]
    tl.store(at, low.to(row.dtype.element_ty), mask=ok)
    tl.store(at + HALF, high.to(row.dtype.element_ty), mask=ok)


@triton.jit
def _load_vector(at, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same for all heads, loaded for each: cheaper from the L1 cache than spread through shared memory."""
    n = tl.arange(0, BLOCK_D)[None, :] + tl.zeros([BLOCK_H, 1], tl.int32)
    return tl.load(at + n, mask=n < HALF, other=0.0).to(tl.float32)


@triton.jit
def _inverse_rms(low, high, eps, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.rsqrt(tl.sum(low * low + high * high, axis=1) / (2 * HALF) + eps)[:, None]


@triton.jit
def _rotate_heads(  # type: ignore[no-untyped-def]
    x, x_head_stride, y, y_head_stride, heads, first, weight, cos_row, sin_row, eps,
    NORM: tl.constexpr, ONE_PLUS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = rotated(norm(x)) for heads first ... of one token; x and y may be the same."""
    low, high = _load_pair(x, x_head_stride, heads, first, HALF, BLOCK_H, BLOCK_D)
    cos = _load_vector(cos_row, HALF, BLOCK_H, BLOCK_D)
    sin = _load_vector(sin_row, HALF, BLOCK_H, BLOCK_D)
    if NORM:
        scale = _inverse_rms(low, high, eps, HALF)
        weight_low = _load_vector(weight, HALF, BLOCK_H, BLOCK_D)
        weight_high = _load_vector(weight + HALF, HALF, BLOCK_H, BLOCK_D)
        if ONE_PLUS:
            weight_low, weight_high = 1.0 + weight_low, 1.0 + weight_high
        low, high = low * scale * weight_low, high * scale * weight_high
    turned_low, turned_high = low * cos - high * sin, high * cos + low * sin
    _store_pair(turned_low, turned_high, y, y_head_stride, heads, first, HALF, BLOCK_H, BLOCK_D)


@triton.jit
def _rotate_heads_back(  # type: ignore[no-untyped-def]
    dy, dy_head_stride, x, x_head_stride, dx, dx_head_stride, heads, first, weight, cos_row, sin_row, eps,
    NORM: tl.constexpr, ONE_PLUS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx for heads first ... of one token: with n = x / rms(x) and g the gradient of n, (g - n mean(g n)) / rms(x)."""
    dy_low, dy_high = _load_pair(dy, dy_head_stride, heads, first, HALF, BLOCK_H, BLOCK_D)
    cos = _load_vector(cos_row, HALF, BLOCK_H, BLOCK_D)
    sin = _load_vector(sin_row, HALF, BLOCK_H, BLOCK_D)
    low, high = dy_low * cos + dy_high * sin, dy_high * cos - dy_low * sin
    if NORM:
        x_low, x_high = _load_pair(x, x_head_stride, heads, first, HALF, BLOCK_H, BLOCK_D)
        scale = _inverse_rms(x_low, x_high, eps, HALF)
        weight_low = _load_vector(weight, HALF, BLOCK_H, BLOCK_D)
        weight_high = _load_vector(weight + HALF, HALF, BLOCK_H, BLOCK_D)
        if ONE_PLUS:
            weight_low, weight_high = 1.0 + weight_low, 1.0 + weight_high
        low, high = low * weight_low, high * weight_high
        x_low, x_high = x_low * scale, x_high * scale
        along = (tl.sum(low * x_low + high * x_high, axis=1) / (2 * HALF))[:, None]
        low, high = (low - x_low * along) * scale, (high - x_high * along) * scale
    _store_pair(low, high, dx, dx_head_stride, heads, first, HALF, BLOCK_H, BLOCK_D)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, x_stride, y, y_stride, cos, cos_stride, sin, sin_stride, q_weight, k_weight, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, NORM: tl.constexpr, ONE_PLUS: tl.constexpr,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    q_groups: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    groups: tl.constexpr = q_groups + (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    head_dim: tl.constexpr = 2 * HALF
    token = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    x += token * x_stride
    y += token * y_stride
    cos += token * cos_stride
    sin += token * sin_stride
    if group < q_groups:
        _rotate_heads(
            x, head_dim, y, head_dim, HEADS, group * BLOCK_H, q_weight, cos, sin, eps,
            NORM, ONE_PLUS, HALF, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    else:
        _rotate_heads(
            x + HEADS * head_dim, head_dim, y + HEADS * head_dim, head_dim, KV_HEADS, (group - q_groups) * BLOCK_H,
            k_weight, cos, sin, eps, NORM, ONE_PLUS, HALF, BLOCK_H, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dq, dq_stride, dq_head_stride, dk, dk_stride, dk_head_stride, dv, dv_stride, dv_head_stride,
    x, x_stride, dx, dx_stride, cos, cos_stride, sin, sin_stride, q_weight, k_weight, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, NORM: tl.constexpr, ONE_PLUS: tl.constexpr,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    q_groups: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    kv_groups: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    groups: tl.constexpr = q_groups + 2 * kv_groups
    head_dim: tl.constexpr = 2 * HALF
    token = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    x += token * x_stride
    dx += token * dx_stride
    cos += token * cos_stride
    sin += token * sin_stride
    if group < q_groups:
        _rotate_heads_back(
            dq + token * dq_stride, dq_head_stride, x, head_dim, dx, head_dim, HEADS, group * BLOCK_H,
            q_weight, cos, sin, eps, NORM, ONE_PLUS, HALF, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    elif group < q_groups + kv_groups:
        _rotate_heads_back(
            dk + token * dk_stride, dk_head_stride, x + HEADS * head_dim, head_dim, dx + HEADS * head_dim, head_dim,
            KV_HEADS, (group - q_groups) * BLOCK_H,
            k_weight, cos, sin, eps, NORM, ONE_PLUS, HALF, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    else:
        first = (group - q_groups - kv_groups) * BLOCK_H
        low, high = _load_pair(dv + token * dv_stride, dv_head_stride, KV_HEADS, first, HALF, BLOCK_H, BLOCK_D)
        _store_pair(
            low, high, dx + (HEADS + KV_HEADS) * head_dim, head_dim, KV_HEADS, first, HALF, BLOCK_H, BLOCK_D
        )  # fmt: skip


def rotate_forward(
    x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, norm: "QKNorm | None"
) -> None:
    """Write q and k of `x` (tokens, heads + 2 kv_heads, head_dim), normalised and rotated, to the first heads of `y`.

    `y` is (tokens, at least heads + kv_heads, head_dim) and may be `x`; in both the heads of a token are contiguous.
    """
    tokens, _, head_dim = x.shape
    if tokens == 0:
        return
    cos, sin = _rows(cos), _rows(sin)
    layout = _layout(heads, kv_heads, head_dim, x.element_size())
    _forward[(tokens * (layout.q_groups + layout.kv_groups),)](
        x, x.stride(0), y, y.stride(0), cos, cos.stride(0), sin, sin.stride(0), *_norm_arguments(norm, x),
        HEADS=heads, KV_HEADS=kv_heads, NORM=norm is not None, ONE_PLUS=norm is not None and norm.one_plus_weight,
        HALF=head_dim // 2, BLOCK_H=layout.heads, BLOCK_D=layout.columns, num_warps=layout.warps,
        maxnreg=layout.max_registers,
    )  # fmt: skip


def rotate_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, norm: "QKNorm | None"
) -> Tensor:
    """The gradient of the projection (tokens, heads + 2 kv_heads, head_dim), contiguous.

    Args:
        dq, dk, dv: (tokens, heads or kv_heads, head_dim), any strides.
        x: the projection, where there is a norm; the heads of a token contiguous.
    """
    (tokens, heads, head_dim), kv_heads = dq.shape, dk.shape[1]
    dx = dq.new_empty(tokens, heads + 2 * kv_heads, head_dim)
    if tokens == 0:
        return dx
    dq, dk, dv, cos, sin = (_rows(t) for t in (dq, dk, dv, cos, sin))
    source = dx if x is None else x  # not read without a norm
    layout = _layout(heads, kv_heads, head_dim, dx.element_size())
    _backward[(tokens * (layout.q_groups + 2 * layout.kv_groups),)](
        dq, dq.stride(0), dq.stride(1), dk, dk.stride(0), dk.stride(1), dv, dv.stride(0), dv.stride(1),
        source, source.stride(0), dx, dx.stride(0), cos, cos.stride(0), sin, sin.stride(0),
        *_norm_arguments(norm, dx),
        HEADS=heads, KV_HEADS=kv_heads, NORM=norm is not None, ONE_PLUS=norm is not None and norm.one_plus_weight,
        HALF=head_dim // 2, BLOCK_H=layout.heads, BLOCK_D=layout.columns, num_warps=layout.warps,
        maxnreg=layout.max_registers,
    )  # fmt: skip
    return dx


class _Layout(NamedTuple):
    """Heads of a program, its columns of half a head, its warps, a thread's registers, and programs for q and for k."""

    heads: int
    columns: int
    warps: int
    max_registers: int
    q_groups: int
    kv_groups: int


@cache
def _layout(heads: int, kv_heads: int, head_dim: int, element_size: int) -> _Layout:
    """A program's heads are all of q, of k or of v: a size that divides both numbers of heads leaves no lane idle."""
    columns = triton.next_power_of_2(head_dim // 2)
    common = gcd(heads, kv_heads)
    block_h = max(common & -common, MIN_TILE // (2 * columns))
    block_h = max(1, min(block_h, MAX_TILE // (2 * columns)))
    warps = max(1, min(8, block_h * 2 * columns // (32 * ELEMENTS_PER_THREAD)))
    registers = min(255, REGISTERS_PER_BYTE * element_size)  # 255: a thread can have no more
    return _Layout(block_h, columns, warps, registers, ceil(heads / block_h), ceil(kv_heads / block_h))


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _norm_arguments(norm: "QKNorm | None", unused: Tensor) -> tuple[Tensor, Tensor, float]:
    if norm is None:
        return unused, unused, 0.0
    return norm.q_weight.contiguous(), norm.k_weight.contiguous(), norm.eps
