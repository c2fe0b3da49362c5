"""A row-wise function, such as a decoder's MLP, in tiles of the sequence: forward, and gradients without a forward.

Nothing but the input outlives a tile, so that what an MLP needs in between (gate_up, the activation, their gradients:
about 5 * intermediate elements a token) is that of `TILE_TOKENS` tokens, whatever the length of the row.

`tiled_gradients` computes each tile once more and takes its gradient at once. It wants the input and the gradient of
the output, and no output: gradient checkpointing that calls it (see block_checkpoint) computes the MLP twice in the
forward direction altogether, as it does without tiles, and not three times as a checkpoint within a checkpoint would.

Error: the same products row by row; gradients of parameters are sums over tiles, added in the parameters' dtype (fp32
for the adapter's masters), where one product over all tokens would have added in its own order.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Large enough that each product fills a GPU many times over (a 4096 x 4096 x 24576 product is 48 waves of tiles on an
# H200), small enough that the tile of an 8B model takes 0.5 GiB. Fixed, as results must not depend on free memory.
TILE_TOKENS = 4096

RowFunction = Callable[[Tensor], Tensor]


def tiles(tokens: int, tile_tokens: int) -> list[slice]:
    """Slices of nearly one length, at most `tile_tokens`, which cover `tokens` rows in order."""
    if tile_tokens < 1:
        raise ValueError(f"tiled_mlp: a tile has at least 1 token, got {tile_tokens}")
    count = -(-tokens // tile_tokens)
    bounds = [tokens * index // count for index in range(count)] + [tokens]
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


@torch.no_grad()
def tiled_add_(residual: Tensor, x: Tensor, function: RowFunction, tile_tokens: int = TILE_TOKENS) -> Tensor:
    """residual += function(x), in place and without a graph.

    Args:
        residual: (tokens, dim).
        x: (tokens, in).
        function: (rows, in) -> (rows, dim), each row for itself.
        tile_tokens: most rows at a time.

    Returns:
        `residual`.
    """
    for rows in tiles(x.shape[0], tile_tokens):
        residual[rows] += function(x[rows])
    return residual


def tiled_gradients(
    x: Tensor,
    grad_out: Tensor,
    function: RowFunction,
    parameters: Sequence[Tensor],
    tile_tokens: int = TILE_TOKENS,
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of sum(grad_out * function(x)).

    Args:
        x: (tokens, in); where it does not require a gradient, none is computed for it.
        grad_out: (tokens, dim), the gradient of the function's output.
        function: (rows, in) -> (rows, dim), each row for itself; run under enable_grad.
        parameters: leaves it depends on, each requiring a gradient.
        tile_tokens: most rows at a time.

    Returns:
        The gradient of `x`, (tokens, in) or None, and one of each parameter, in its shape and dtype.
    """
    grad_x = torch.empty_like(x) if x.requires_grad else None
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    if grad_x is None and not sums:
        return None, []
    for rows in tiles(x.shape[0], tile_tokens):
        tile = x.detach()[rows].requires_grad_(grad_x is not None)
        with torch.enable_grad():
            out = function(tile)
        wanted = [*parameters] if grad_x is None else [*parameters, tile]
        gradients = torch.autograd.grad(out, wanted, grad_out[rows])
        for total, gradient in zip(sums, gradients, strict=False):
            total += gradient
        if grad_x is not None:
            grad_x[rows] = gradients[-1]
    return grad_x, sums
