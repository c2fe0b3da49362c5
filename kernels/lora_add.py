"""The low-rank update of a frozen linear (LoRA, Hu et al. 2021, arXiv 2106.09685, eq. 3), added in place.

A fused projection (qkv, gate_up) has one A matrix for all its outputs, stacked, and one B for each of them, stacked
too. The forward reads the *slots*, the tensors in the compute dtype that the rollout engine reads as well; the
gradients go to the fp32 *masters* the slots were cast from, so that trainer and engine see the same bits and the
optimizer loses none.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraPart:
    """Where one adapted output lies in its fused projection.

    `out` are its rows in the base output, `b` its rows in the stacked B, `a` its rows in the stacked A.
    """

    name: str
    out: slice
    b: slice
    a: slice


class _LoraAdd(torch.autograd.Function):
    """y[:, out] += (x @ A[a].T) @ B[b].T for each part; saves x and x @ A.T."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        slot_a: Tensor,
        slot_b: Tensor,
        master_a: Tensor,
        master_b: Tensor,
        scale: float,
        parts: tuple[LoraPart, ...],
    ) -> Tensor:
        down = x @ slot_a.T
        for part in parts:
            y[:, part.out].addmm_(down[:, part.a], slot_b[part.b].T)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, down, slot_a, slot_b)
        ctx.scale, ctx.parts = scale, parts
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, down, slot_a, slot_b = ctx.saved_tensors
        grad_down = torch.empty_like(down)
        grad_b = torch.empty(slot_b.shape, dtype=torch.float32, device=slot_b.device)
        for part in ctx.parts:
            grad_part = grad_y[:, part.out]
            torch.mm(grad_part, slot_b[part.b], out=grad_down[:, part.a])
            grad_b[part.b] = (grad_part.T @ down[:, part.a]).float() * ctx.scale
        grad_x = grad_down @ slot_a if ctx.needs_input_grad[1] else None
        grad_a = (grad_down.T @ x).float()
        return grad_y, grad_x, None, None, grad_a, grad_b, None, None


def lora_add_(
    y: Tensor,
    x: Tensor,
    slot_a: Tensor,
    slot_b: Tensor,
    master_a: Tensor,
    master_b: Tensor,
    scale: float,
    parts: tuple[LoraPart, ...],
) -> Tensor:
    """Add the adapter's update to the base output `y`, in place.

    Args:
        y: (tokens, out), the frozen base's output; overwritten.
        x: (tokens, in), the linear's input, same dtype.
        slot_a: (adapted outputs * r, in), the stacked A in the compute dtype.
        slot_b: (adapted rows, r), the stacked B in the compute dtype, already multiplied by `scale`.
        master_a, master_b: fp32 tensors of the same shapes: only their gradients are used (dB is multiplied by `scale`,
            as B in the slot is scale * master).
        scale: alpha / r.
        parts: where each adapted output lies.

    Returns:
        `y`.
    """
    return _LoraAdd.apply(y, x, slot_a, slot_b, master_a, master_b, scale, parts)
