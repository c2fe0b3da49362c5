"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34), in the half-split layout of Hugging Face."""

import torch
from torch import Tensor

from .fuse import fused_on_gpu


def rope_table(
    positions: Tensor, inverse_frequencies: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `positions`, computed in fp32 and rounded to `dtype` once.

    Args:
        positions: (tokens,) integer positions, restarting at 0 with each packed sequence.
        inverse_frequencies: (head_dim / 2,) fp32.
        scaling: factor on both tables (YaRN's attention scaling; 1 elsewhere).

    Returns:
        cos, sin: (tokens, head_dim) each.
    """
    angles = positions[:, None].float() * inverse_frequencies.float()
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


@fused_on_gpu
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` (tokens, heads, head_dim) by the tables (tokens, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + rotated * sin[:, None]
