"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4)."""

import torch
from torch import Tensor

from .fuse import fused_on_gpu


@fused_on_gpu
def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus_weight: bool = False) -> Tensor:
    """Normalise the last dimension of `x` by its root mean square and scale by `weight`.

    The statistics are fp32 whatever the dtype of `x`. Llama-like models round the normalised value to the dtype of
    `x` before they multiply; Gemma multiplies by (1 + weight) in fp32 and rounds once.

    Args:
        x: (..., dim), any floating dtype.
        weight: (dim,).
        eps: added to the mean square.
        one_plus_weight: Gemma's form.

    Returns:
        (..., dim) in the dtype of `x`.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if one_plus_weight:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)
