"""Log-probability of given tokens from hidden states, through the head, without ever holding all the logits.

For hidden state h, head W, temperature t and token j: logits z = softcap(W h) / t, log p_j = z_j - logsumexp(z).
Tiles of tokens are taken through the whole vocabulary; the backward pass computes each tile again, so the memory is
that of one tile, `TILE_ELEMENTS` fp32 logits, whatever the number of tokens.
"""

from typing import Any

import torch
from torch import Tensor

TILE_ELEMENTS = 2**26  # logits of one tile: 256 MiB in fp32


def _tile_logits(hidden: Tensor, head: Tensor, temperature: float, softcap: float | None) -> Tensor:
    logits = (hidden @ head.T).float()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits if temperature == 1.0 else logits / temperature


def _entropy(logits: Tensor, logsumexp: Tensor) -> Tensor:
    """H = logsumexp(z) - sum_j p_j z_j, (tokens,)."""
    return logsumexp - (torch.exp(logits - logsumexp[:, None]) * logits).sum(-1)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        entropy: bool,
    ) -> Any:
        tokens = hidden.shape[0]
        tile = max(1, TILE_ELEMENTS // head.shape[0])
        logprobs = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        entropies = torch.empty(tokens if entropy else 0, dtype=torch.float32, device=hidden.device)
        for start in range(0, tokens, tile):
            rows = slice(start, start + tile)
            logits = _tile_logits(hidden[rows], head, temperature, softcap)
            logsumexp = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(-1, targets[rows, None])[:, 0] - logsumexp
            if entropy:
                entropies[rows] = _entropy(logits, logsumexp)
        ctx.save_for_backward(hidden, head, targets)
        ctx.temperature, ctx.softcap, ctx.tile = temperature, softcap, tile
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _grad_entropies: Tensor) -> Any:
        hidden, head, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        for start in range(0, hidden.shape[0], ctx.tile):
            rows = slice(start, start + ctx.tile)
            logits = _tile_logits(hidden[rows], head, ctx.temperature, ctx.softcap)
            # d log p_j / dz = onehot(j) - softmax(z)
            grad = torch.softmax(logits, dim=-1).neg_()
            grad.scatter_add_(-1, targets[rows, None], torch.ones_like(grad[:, :1]))
            grad *= grad_logprobs[rows, None] / ctx.temperature
            if ctx.softcap is not None:
                grad *= 1.0 - (logits * ctx.temperature / ctx.softcap) ** 2
            grad_hidden[rows] = (grad.to(head.dtype) @ head).to(hidden.dtype)
        return grad_hidden, None, None, None, None, None


def linear_logprob(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `targets` and, on request, the entropy of each distribution.

    Args:
        hidden: (tokens, hidden_size), after the final norm.
        head: (vocab, hidden_size), frozen: it gets no gradient.
        targets: (tokens,) int64 token ids below `vocab`.
        temperature: the sampling temperature, above 0.
        softcap: Gemma's cap on the logits, if any.
        entropy: also return entropies (nats, not differentiable).

    Returns:
        logprobs (tokens,) fp32, natural logarithm; entropies (tokens,) fp32 or None.
    """
    if temperature <= 0:
        raise ValueError(f"linear_logprob: temperature must be above 0, got {temperature}")
    logprobs, entropies = _LinearLogprob.apply(hidden, head, targets, temperature, softcap, entropy)
    return logprobs, entropies if entropy else None
