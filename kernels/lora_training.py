"""A frozen linear with its low-rank update (LoRA, Hu et al. 2021, arXiv 2106.09685, eq. 3), to train the update.

Forward, for input x, frozen W and bias, and each adapted part p of the fused output:
    u = x A^T,   y = [u_p B_p^T + bias, written by one kernel],   y += x W^T,
backward, for the gradient g of y:
    h = [g_p B_p],   dB_p = scale g_p^T u_p,   dA = h^T x,   dX = h A by the same kernel,   dX += g W.
Each reads x or g once for all parts. h is made by a kernel where cuBLAS would take a call a part; dB is cut out of
g^T u, the products of one part's columns with another part's u being dropped: up to a P r of 200 or so they cost no
time, as reading g takes longer.
The update goes first and the frozen product is added to it, because a matrix product that reads the tile of its result
reads it while it multiplies; the other way round the result is read and written once more by a product that has
nothing to do meanwhile. Nothing of W's size is made; a W in 4 bits is decoded a tile at a time (`frozen`). Kept for the
backward pass: x, once, and u.

Cost for T tokens, in -> out, P adapted parts of rank r, e bytes an element; the frozen chain x W^T, g W takes
4 T in out FLOPs. On top of it, every product being bound by memory:
    FLOPs: 6 T P r in + (4 + 2 P) T r out: for 4096 -> 24576, r 32, P 2: 2 % of the chain.
    bytes: u: T in e read; the update: T out e written, and read by the frozen product;
        h and dB: T out e read each; dA: T in e read; h A: T in e written, and read by the frozen product.
The four projections of an 8B model (Qwen3, Llama 3), 8192 tokens, bf16: T in e = 0.40 GB and T out e = 0.64 GB
altogether: 3.12 GB outside the frozen products, 0.73 ms at the 4.3 TB/s of a copy on an H200, and 1.04 GB that they
read meanwhile. The chain is 6.3 TFLOP, 9.0 ms at 700 TFLOP/s: the floor is 1.08 of its time.

To read g once for both h and dB was weighed: a program that holds dB of 512 columns writes the sums of h over them,
4 r bytes in fp32 against 1024 of g a token, and they are read again: at r 32 that saves 0.09 ms at best, at r 128
nothing.

Error, with u the unit roundoff of the dtype (2^-8 in bf16) and sums in fp32: y is rounded once, after an update that
was rounded to u |x A^T B^T| and comes from x A^T rounded likewise; dX the same with h; dA and dB are sums in fp32 of
products of rounded u or h, kept in fp32. Two runs give the same bits: no atomic additions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .frozen import FrozenWeight, add_input_gradient_, add_product_, frozen_linear
from .lora_add import LoraPart, lora_add_

if TYPE_CHECKING:
    from .lora_training_triton import ColumnRange

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# From here on the kernel for h has about a program a part for each multiprocessor of an H200; with fewer it is slower
# than cuBLAS, which also divides the columns.
MANY_TOKENS = 6144


def lora_training(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
    slot_a: Tensor,
    slot_b: Tensor,
    master_a: Tensor,
    master_b: Tensor,
    scale: float,
    parts: tuple[LoraPart, ...],
) -> Tensor:
    """x W^T + bias, plus (x A^T) B^T on the columns of each adapted part.

    On a GPU, where `kernel_fits`, as the module's text says; elsewhere `lora_training_reference`.

    Args:
        x: (tokens, in).
        weight: (out, in), frozen: dense in the same dtype, or in 4 bits, of which a tile at a time is decoded to it.
        bias: (out,), frozen, or None.
        slot_a: (adapted outputs * r, in), the stacked A in the compute dtype.
        slot_b: (adapted rows, r), the stacked B in the compute dtype, already multiplied by `scale`.
        master_a, master_b: fp32 tensors of the same shapes: only their gradients are used (dB is multiplied by `scale`,
            as B in the slot is scale * master).
        scale: alpha / r.
        parts: where each adapted output lies; they do not overlap.

    Returns:
        (tokens, out), contiguous: a tensor that nothing keeps, so that whoever reads it may overwrite it.
    """
    operands = (x, weight, bias, slot_a, slot_b, master_a, master_b, scale, parts)
    if x.is_cuda and kernel_fits(x, weight, bias, slot_a, slot_b, parts):  # where there is a GPU there is Triton
        return LoraTraining.apply(*operands)
    return lora_training_reference(*operands)


def lora_training_reference(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None,
    slot_a: Tensor,
    slot_b: Tensor,
    master_a: Tensor,
    master_b: Tensor,
    scale: float,
    parts: tuple[LoraPart, ...],
) -> Tensor:
    """`lora_training` as the frozen linear followed by `lora_add_`."""
    return lora_add_(frozen_linear(x, weight, bias), x, slot_a, slot_b, master_a, master_b, scale, parts)


def kernel_fits(
    x: Tensor, weight: FrozenWeight, bias: Tensor | None, slot_a: Tensor, slot_b: Tensor, parts: Sequence[LoraPart]
) -> bool:
    """Whether the kernel takes this linear: one dtype it knows, rows contiguous, at most three ranges of columns.

    Any rank, number of tokens and width of a part will do.
    """
    from .lora_training_triton import MAX_RANGES

    operands = [x, slot_a, slot_b, *(operand for operand in (weight, bias) if isinstance(operand, Tensor))]
    one_dtype = x.dtype in KERNEL_DTYPES and all(operand.dtype == x.dtype for operand in operands)
    rows_contiguous = all(operand.stride(-1) == 1 for operand in operands[1:])
    return one_dtype and rows_contiguous and len(_column_ranges(parts, weight.shape[0])) <= MAX_RANGES


class LoraTraining(torch.autograd.Function):
    """`lora_training` with the kernel; takes its arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: FrozenWeight,
        bias: Tensor | None,
        slot_a: Tensor,
        slot_b: Tensor,
        master_a: Tensor,
        master_b: Tensor,
        scale: float,
        parts: tuple[LoraPart, ...],
    ) -> Tensor:
        from .lora_training_triton import low_rank

        down = x @ slot_a.T
        y = x.new_empty(x.shape[0], weight.shape[0])
        low_rank(down, slot_b, bias, y, _column_ranges(parts, weight.shape[0]), slot_b.shape[1])
        add_product_(y, x, weight)
        ctx.save_for_backward(x, down, slot_a, slot_b)
        ctx.weight, ctx.scale, ctx.parts = weight, scale, parts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, down, slot_a, slot_b = ctx.saved_tensors
        needs_x, needs_a, needs_b = (ctx.needs_input_grad[index] for index in (0, 5, 6))
        grad_x = grad_a = grad_b = None
        if needs_b:
            grad_b = _grad_b(grad_y, down, ctx.parts, ctx.scale)
        if needs_x or needs_a:
            grad_down = _grad_down(grad_y, slot_b, torch.empty_like(down), ctx.parts)
            if needs_a:
                grad_a = _fp32_product(grad_down.T, x)
            if needs_x:
                grad_x = _grad_input(grad_y, grad_down, ctx.weight, slot_a)
        return grad_x, None, None, None, None, grad_a, grad_b, None, None


def _grad_b(grad_y: Tensor, down: Tensor, parts: Sequence[LoraPart], scale: float) -> Tensor:
    """scale g_p^T u_p of every part, one beneath the other, in fp32."""
    if len(parts) == 1:
        return _fp32_product(grad_y[:, parts[0].out].T, down).mul_(scale)
    products = _fp32_product(grad_y.T, down)
    grad_b = products.new_empty(sum(part.b.stop - part.b.start for part in parts), down.shape[1] // len(parts))
    for part in parts:
        torch.mul(products[part.out, part.a], scale, out=grad_b[part.b])
    return grad_b


def _grad_down(grad_y: Tensor, slot_b: Tensor, grad_down: Tensor, parts: Sequence[LoraPart]) -> Tensor:
    """`grad_down`, overwritten with g_p B_p of every part, one beside the other."""
    from .lora_training_triton import MAX_READ_RANK, down_gradient

    if len(parts) > 1 and grad_y.shape[0] >= MANY_TOKENS and slot_b.shape[1] <= MAX_READ_RANK:
        rows = grad_y if grad_y.stride(-1) == 1 else grad_y.contiguous()
        return down_gradient(rows, slot_b, grad_down, _column_ranges(parts, rows.shape[1]))
    for part in parts:
        torch.mm(grad_y[:, part.out], slot_b[part.b], out=grad_down[:, part.a])
    return grad_down


def _grad_input(grad_y: Tensor, grad_down: Tensor, weight: FrozenWeight, slot_a: Tensor) -> Tensor:
    """grad_down A + grad_y W."""
    from .lora_training_triton import ColumnRange, low_rank

    grad_x = grad_down.new_empty(grad_down.shape[0], weight.shape[1])
    low_rank(grad_down, slot_a.T, None, grad_x, [ColumnRange(0, weight.shape[1], 0, 0)], slot_a.shape[0])
    return add_input_gradient_(grad_x, grad_y, weight)


def _fp32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with the sums kept in fp32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _column_ranges(parts: Sequence[LoraPart], out_features: int) -> "list[ColumnRange]":
    """The adapted parts in the order of their columns, and what lies between them."""
    from .lora_training_triton import ColumnRange

    ranges, stop = [], 0
    for part in sorted(parts, key=lambda part: part.out.start):
        if part.out.start > stop:
            ranges.append(ColumnRange(stop, part.out.start))
        stop = part.out.stop
        ranges.append(ColumnRange(part.out.start, stop, part.a.start, part.b.start))
    return ranges if stop == out_features else [*ranges, ColumnRange(stop, out_features)]
