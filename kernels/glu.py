"""Gated linear units (Shazeer 2020, arXiv 2002.05202): SwiGLU and GeGLU over a fused [gate; up] projection.

Bytes, of n = tokens * intermediate elements of e bytes each: forward 3 n e, backward 5 n e. Only gate_up is kept for
the backward pass, which computes the activation again.

Error of the kernels against exact arithmetic on the same inputs, with u the unit roundoff of the dtype (2^-8 in
bfloat16): forward and d(up) 2 u relative, as they round where the reference does; d(gate) u relative plus 2^-18 of
|grad up|, as everything before its last rounding is fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def glu_reference(gate_up: Tensor, activation: str) -> Tensor:
    """`glu` in plain PyTorch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


class GLU(torch.autograd.Function):
    """gate_up (tokens, 2 * intermediate), activation, overwrite -> (tokens, intermediate), by the kernels."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str, overwrite: bool) -> Tensor:
        from .glu_triton import glu_forward

        if gate_up.stride(1) != 1:
            gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        ctx.activation, ctx.overwrite = activation, overwrite
        return glu_forward(gate_up, activation)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        from .glu_triton import glu_backward

        (gate_up,) = ctx.saved_tensors
        if ctx.overwrite:
            # Whoever else kept gate_up, a second backward pass included, gets autograd's error and not the gradient.
            torch.autograd.graph.increment_version(gate_up)
        grad_gate_up = gate_up.detach() if ctx.overwrite else torch.empty_like(gate_up)
        glu_backward(grad_out, gate_up, ctx.activation, grad_gate_up)
        return grad_gate_up, None, None


def glu(gate_up: Tensor, activation: str, overwrite: bool = False) -> Tensor:
    """activation(gate) * up.

    Args:
        gate_up: (..., 2 * intermediate), gate first.
        activation: `silu`, or `gelu_tanh` (Gemma).
        overwrite: let the kernel's backward write the gradient of `gate_up` in its place, which saves 2 * intermediate
            elements a token. For a `gate_up` that nothing else reads after this call; the graph can then be walked
            once. The CPU path takes no notice.

    Returns:
        (..., intermediate).

    Raises:
        ValueError: an unknown activation; an odd number of columns.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu: unknown activation {activation!r}; known: {', '.join(map(repr, ACTIVATIONS))}")
    if gate_up.shape[-1] % 2:
        raise ValueError(f"glu: gate_up {tuple(gate_up.shape)} does not split into gate and up of one width")
    if not (gate_up.is_cuda and gate_up.dtype in KERNEL_DTYPES):
        return glu_reference(gate_up, activation)
    out: Tensor = GLU.apply(gate_up.reshape(-1, gate_up.shape[-1]), activation, overwrite)
    return out.view(*gate_up.shape[:-1], out.shape[-1])
