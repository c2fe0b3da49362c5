"""Gradient checkpointing of a decoder block (Chen et al. 2016, arXiv 1604.06174), its MLP in tiles.

A block's forward keeps its input, on the GPU or in host memory (`offload`), and where there is room what attention left
(`KeptAttention`): as much memory again, for a tenth of the time on a row of 32K tokens
(offload.step_time_ratio.32k of benchmarks/train_memory.py). The backward pass computes the attention part again, with a
graph, from what was kept of it; the MLP's gradients then come tile by tile (`tiled_mlp`) from what the attention part
gives and the gradient of the block's output. The output itself is not computed again: out = residual + mlp(normed)
hands its gradient to both summands whatever its value is.

Unlike torch.utils.checkpoint with use_reentrant=False, no hooks pack and unpack every saved tensor; unlike with
use_reentrant=True, the block's parameters are inputs of the function: torch.autograd.grad works, and an input that
needs no gradient, such as the embeddings, is no special case.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import KeptAttention
from .offload import BlockInputs
from .tiled_mlp import tiled_add_, tiled_gradients


class Block(Protocol):
    """block(x) = residual + feed_forward(normed), where normed, residual = attend(x, *context)."""

    def attend(self, x: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """(normed, residual), both in memory of their own: `residual` is overwritten in forwards without a graph.

        The last of `context` may be a `KeptAttention` for its attention: filled the first time, and given again in the
        backward pass, where it may have to be loaded (`KeptAttention.fill`): as late as possible.
        """
        ...

    def feed_forward(self, normed: Tensor) -> Tensor:
        """Each row for itself."""
        ...

    def attention_parameters(self) -> Sequence[Tensor]:
        """Leaves that require a gradient and that `attend` depends on."""
        ...

    def feed_forward_parameters(self) -> Sequence[Tensor]:
        """Leaves that require a gradient and that `feed_forward` depends on."""
        ...


class _CheckpointedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: Block,
        context: tuple[Any, ...],
        tile_tokens: int,
        inputs: BlockInputs | None,
        index: int,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.block, ctx.context, ctx.tile_tokens = block, context, tile_tokens
        ctx.inputs, ctx.index, ctx.parameters = inputs, index, len(parameters)
        if inputs is None:
            ctx.save_for_backward(x)
            return forward_tiled(block, x, context, tile_tokens)
        inputs.save(index, x)
        kept = KeptAttention() if inputs.keeps_more else None
        normed, residual = block.attend(x, *context, kept)
        if kept is not None and kept.out is not None and kept.log_sum is not None:
            inputs.save_rest(index, kept.out, kept.log_sum)  # copied while the MLP computes
        return tiled_add_(residual, normed, block.feed_forward, tile_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        block, inputs = ctx.block, ctx.inputs
        of_attention, of_mlp = block.attention_parameters(), block.feed_forward_parameters()
        if len(of_attention) + len(of_mlp) != ctx.parameters:
            raise RuntimeError(
                f"block {ctx.index}: the adapter was switched on or off between the forward pass and its backward "
                "pass, which computes the block again: call backward before `reference()` or `set_adapter`"
            )
        x = ctx.saved_tensors[0] if inputs is None else inputs.load(ctx.index)
        x = x.detach().requires_grad_(ctx.needs_input_grad[0])
        kept = None if inputs is None else KeptAttention(load=partial(inputs.load_rest, ctx.index))
        with torch.enable_grad():
            normed, residual = block.attend(x, *ctx.context, kept)
        del kept
        grad_normed, mlp_gradients = tiled_gradients(normed, grad_out, block.feed_forward, of_mlp, ctx.tile_tokens)
        wanted = [x, *of_attention] if x.requires_grad else [*of_attention]
        gradients: list[Tensor | None] = []
        if wanted:
            # Where no gradient comes through the residual (first block, the embeddings are frozen), it has no graph.
            pairs = [(normed, grad_normed), (residual, grad_out)]
            outputs, grads = zip(*[pair for pair in pairs if pair[0].requires_grad], strict=True)
            gradients = list(torch.autograd.grad(outputs, wanted, grads))
        if inputs is not None:  # not before: attention's backward, and the MLP's, are where memory is short
            inputs.fetch_rest(ctx.index - 1)
        if not x.requires_grad:
            gradients.insert(0, None)
        return gradients[0], None, None, None, None, None, *gradients[1:], *mlp_gradients


def forward_tiled(block: Block, x: Tensor, context: tuple[Any, ...], tile_tokens: int) -> Tensor:
    """The block without a graph, its MLP in tiles: what a checkpointed forward computes, bit for bit."""
    with torch.no_grad():
        normed, residual = block.attend(x, *context)
        return tiled_add_(residual, normed, block.feed_forward, tile_tokens)


def checkpointed_block(
    block: Block,
    x: Tensor,
    context: tuple[Any, ...],
    tile_tokens: int,
    inputs: BlockInputs | None = None,
    index: int = 0,
) -> Tensor:
    """The block of `x`, keeping `x` for the backward pass, and of the rest attention's result at most.

    Args:
        block: what to compute; called again in the backward pass, when its parameters must be what they are now.
        x: (tokens, hidden).
        context: further arguments of `attend`, without gradients.
        tile_tokens: tokens of one tile of the MLP, at most.
        inputs: where this is kept; None: `x` alone, where it is.
        index: the number of the block, under which `inputs` keeps it.

    Returns:
        (tokens, hidden), differentiable once in `x` and in the block's parameters.

    Raises:
        RuntimeError: in the backward pass, where the block no longer has the parameters it had.
    """
    parameters = [*block.attention_parameters(), *block.feed_forward_parameters()]
    if not torch.is_grad_enabled() or not (x.requires_grad or parameters):
        return forward_tiled(block, x, context, tile_tokens)
    out: Tensor = _CheckpointedBlock.apply(x, block, context, tile_tokens, inputs, index, *parameters)
    return out
