"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4), alone or after a residual add.

Bytes, of n elements of e bytes each: forward 2 n e, backward 3 n e; with the residual add 4 n e each. Only the input
(or the sum, which is an output anyway) is kept for the backward pass, which computes the statistics again.

Error of the kernels against exact arithmetic on the same inputs, with u the unit roundoff of the dtype (2^-8 in
bfloat16): forward 2 u relative (Gemma's form u), as it rounds where the reference does; backward u relative plus
2^-18 rstd (|h| + |n| mean|h n|), h = grad gain and n = x rstd, as everything before the last rounding is fp32.
"""

from typing import Any

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, one_plus_weight: bool = False) -> Tensor:
    """`rms_norm` in plain PyTorch; differentiable in the weight too."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if one_plus_weight:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


class RMSNorm(torch.autograd.Function):
    """x, weight, eps, one_plus_weight -> norm(x), by the kernels; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, one_plus_weight: bool) -> Tensor:
        from .rms_norm_triton import rms_norm_forward

        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.one_plus_weight = eps, one_plus_weight
        return rms_norm_forward(x, None, weight, eps, one_plus_weight)[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        from .rms_norm_triton import rms_norm_backward

        x, weight = ctx.saved_tensors
        return rms_norm_backward(grad_out, x, weight, ctx.eps, ctx.one_plus_weight), None, None, None


class AddRMSNorm(torch.autograd.Function):
    """x, residual, weight, eps, one_plus_weight -> norm(x + residual), x + residual, by the kernels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, one_plus_weight: bool
    ) -> tuple[Tensor, Tensor]:
        from .rms_norm_triton import rms_norm_forward

        normed, summed = rms_norm_forward(x, residual, weight, eps, one_plus_weight)
        assert summed is not None
        ctx.save_for_backward(summed, weight)
        ctx.eps, ctx.one_plus_weight = eps, one_plus_weight
        ctx.set_materialize_grads(False)
        return normed, summed

    @staticmethod
    def backward(ctx: Any, grad_normed: Tensor | None, grad_summed: Tensor | None) -> Any:
        from .rms_norm_triton import rms_norm_backward

        summed, weight = ctx.saved_tensors
        grad = grad_summed
        if grad_normed is not None:
            grad = rms_norm_backward(grad_normed, summed, weight, ctx.eps, ctx.one_plus_weight, grad_summed)
        return grad, grad, None, None, None


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    return x.is_cuda and x.dtype in KERNEL_DTYPES and weight.dtype == x.dtype and not weight.requires_grad


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus_weight: bool = False) -> Tensor:
    """Normalise the last dimension of `x` by its root mean square and scale by `weight`.

    The statistics are fp32 whatever the dtype of `x`. Llama-like models round the normalised value to the dtype of
    `x` before they multiply; Gemma multiplies by (1 + weight) in fp32 and rounds once. A weight that requires a
    gradient, or of another dtype, takes the plain path on the GPU too.

    Args:
        x: (..., dim), any floating dtype; up to three dimensions may have any strides but the last, 1.
        weight: (dim,), contiguous.
        eps: added to the mean square.
        one_plus_weight: Gemma's form.

    Returns:
        (..., dim) in the dtype of `x`.
    """
    if _has_kernel(x, weight):
        out: Tensor = RMSNorm.apply(x, weight, eps, one_plus_weight)
        return out
    return rms_norm_reference(x, weight, eps, one_plus_weight)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, one_plus_weight: bool = False
) -> tuple[Tensor, Tensor]:
    """The residual add and the norm after it in one pass; backward adds the residual stream's gradient in its own.

    Args:
        x, residual: (..., dim), same shape and dtype.
        weight, eps, one_plus_weight: as for `rms_norm`.

    Returns:
        norm(x + residual) and x + residual, both (..., dim) in the dtype of `x`.

    Raises:
        ValueError: `x` and `residual` of different shapes or dtypes.
    """
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"add_rms_norm: x is {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} {residual.dtype}; "
            "they must be alike"
        )
    if _has_kernel(x, weight):
        normed, summed = AddRMSNorm.apply(x, residual, weight, eps, one_plus_weight)
        return normed, summed
    summed = x + residual
    return rms_norm_reference(summed, weight, eps, one_plus_weight), summed
