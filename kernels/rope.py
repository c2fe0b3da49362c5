"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34), in the half-split layout of Hugging Face.

`rotate_qkv` takes the fused projection and returns q and k rotated and v as it is: one kernel for all heads of q and k,
with the per-head RMS norm of Qwen3 and Gemma 3 in front where the model has one. Its backward writes the gradient of
the whole projection in one kernel, where autograd would pad the gradients of the three slices with zeros and add them.

Without a norm the rotation is done in place and nothing but the tables is kept for the backward pass, which turns back.
With a norm the projection is kept and q and k go to a new (tokens, heads + kv_heads, head_dim) tensor: the backward
pass needs the values before the norm, and in place they would have to be kept in a copy.

Bytes, with s of one element, H = heads, G = kv_heads, D = head_dim, for each token:
    forward: 2 (H + G) D s + D s (the first halves of both tables; the second repeat them).
    backward: 2 (H + 2 G) D s + D s; with a norm (H + G) D s more.

Error: all arithmetic is fp32 and each result is rounded once, to the compute dtype with unit roundoff u (2^-8 in bf16).
    forward: |error| <= u |result| + 2^-20 (|a| + |b|), (a, b) the pair of normalised values that is rotated.
    backward: the same without a norm, (a, b) the pair of incoming gradients; with one u |result| + 2^-18 r (p +
    |n| mean(p |n|)), where r = 1 / rms(x), n = x r, and p = |a| + |b| of a pair of gradients of n.
The reference rounds where transformers does, between the norm and the rotation and in between its steps; in fp32 both
are the same within the bound, in bf16 the reference is a few u from the exact result and the kernel is at most one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .rms_norm import rms_norm_reference

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class QKNorm:
    """The RMS norms of queries and keys over head_dim: weights (head_dim,), epsilon, Gemma's (1 + weight)."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float
    one_plus_weight: bool = False


def rope_table(
    positions: Tensor, inverse_frequencies: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `positions`, computed in fp32 and rounded to `dtype` once.

    Args:
        positions: (tokens,) integer positions, restarting at 0 with each packed sequence.
        inverse_frequencies: (head_dim / 2,) fp32.
        scaling: factor on both tables (YaRN's attention scaling; 1 elsewhere).

    Returns:
        cos, sin: (tokens, head_dim) each, the second half a repetition of the first.
    """
    angles = positions[:, None].float() * inverse_frequencies.float()
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` (tokens, heads, head_dim) by the tables (tokens, head_dim), in plain torch."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + rotated * sin[:, None]


def rotate_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, norm: QKNorm | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into heads, normalise queries and keys where `norm` is given, and rotate them.

    On a GPU this is one kernel forward and one backward. Elsewhere, in double precision, and where the weights of the
    norms require a gradient, it is the reference.

    Args:
        qkv: (tokens, (heads + 2 * kv_heads) * head_dim); on a GPU it is overwritten where there is no norm, and v is a
            view of it: do not use it afterwards.
        cos, sin: (tokens, head_dim) from `rope_table`, without gradient.
        heads, kv_heads: of queries; of keys and of values.
        norm: the norms in front of the rotation.

    Returns:
        q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), the last dimension contiguous.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(qkv, cos, sin, heads, kv_heads, norm)
    frozen = norm is None or not (norm.q_weight.requires_grad or norm.k_weight.requires_grad)
    if qkv.is_cuda and qkv.dtype in KERNEL_DTYPES and frozen:  # where there is a GPU there is Triton
        return RotateQKV.apply(qkv, cos, sin, heads, kv_heads, norm)
    return rotate_qkv_reference(qkv, cos, sin, heads, kv_heads, norm)


def rotate_qkv_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, norm: QKNorm | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotate_qkv` in plain torch, rounding to the dtype of `qkv` where transformers does; `qkv` is left alone."""
    q, k, v = qkv.view(qkv.shape[0], heads + 2 * kv_heads, -1).split((heads, kv_heads, kv_heads), dim=1)
    if norm is not None:
        q = rms_norm_reference(q, norm.q_weight, norm.eps, norm.one_plus_weight)
        k = rms_norm_reference(k, norm.k_weight, norm.eps, norm.one_plus_weight)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


class RotateQKV(torch.autograd.Function):
    """The kernels of `rotate_qkv`, whose arguments it takes."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, norm: QKNorm | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        from .rope_triton import rotate_forward

        tokens, head_dim = cos.shape
        rows = (qkv if qkv.stride(1) == 1 else qkv.contiguous()).view(tokens, heads + 2 * kv_heads, head_dim)
        if norm is None:
            turned = rows
            rotate_forward(rows, turned, cos, sin, heads, kv_heads, None)
            torch.autograd.graph.increment_version(rows)  # whoever saved the projection must hear of it
            ctx.save_for_backward(cos, sin)
        else:
            turned = rows.new_empty(tokens, heads + kv_heads, head_dim)
            rotate_forward(rows, turned, cos, sin, heads, kv_heads, norm)
            ctx.save_for_backward(cos, sin, rows)
        ctx.norm = norm
        return turned[:, :heads], turned[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        from .rope_triton import rotate_backward

        cos, sin, *kept = ctx.saved_tensors
        dqkv = rotate_backward(dq, dk, dv, kept[0] if kept else None, cos, sin, ctx.norm)
        return dqkv.flatten(1), None, None, None, None, None


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, norm: QKNorm | None) -> None:
    tokens, head_dim = cos.shape
    if sin.shape != cos.shape or qkv.shape != (tokens, (heads + 2 * kv_heads) * head_dim) or head_dim % 2:
        raise ValueError(
            f"rotate_qkv: a projection of shape {tuple(qkv.shape)} is not one of {heads} query and {kv_heads} "
            f"key-value heads with tables of shapes {tuple(cos.shape)} and {tuple(sin.shape)} (tokens, even head_dim)"
        )
    if norm is None:
        return
    for name, weight in (("q", norm.q_weight), ("k", norm.k_weight)):
        if weight.shape != (head_dim,):
            raise ValueError(f"rotate_qkv: the {name} norm has {tuple(weight.shape)} weights, head_dim is {head_dim}")
