"""Gated linear units (Shazeer 2020, arXiv 2002.05202): SwiGLU and GeGLU over a fused [gate; up] projection."""

import torch.nn.functional as F
from torch import Tensor

from .fuse import fused_on_gpu


@fused_on_gpu
def glu(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up.

    Args:
        gate_up: (tokens, 2 * intermediate), gate first.
        activation: `silu`, or `gelu_tanh` (Gemma).

    Returns:
        (tokens, intermediate).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    raise ValueError(f"glu: unknown activation {activation!r}; known: 'silu', 'gelu_tanh'")
