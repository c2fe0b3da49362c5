"""Log-probability of given tokens from hidden states, through the head, without ever holding all the logits.

For hidden state h, head W, temperature t and token j: logits z = softcap(W h) / t, log p_j = z_j - logsumexp(z), and
on request the entropy H = -sum_k p_k log p_k. Tiles of tokens are taken through the whole vocabulary; the backward
pass computes each tile again, so the memory is that of one tile, `TILE_ELEMENTS` fp32 logits and their gradient in the
head's dtype, whatever the number of tokens. On a GPU each pass over a tile is one kernel (linear_logprob_triton).
"""

from typing import Any

import torch
from torch import Tensor

from .head_logits import head_logits

TILE_ELEMENTS = 2**26  # logits of one tile: 256 MiB in fp32


def _scaled(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits if temperature == 1.0 else logits / temperature


def _row_statistics(
    logits: Tensor, targets: Tensor, temperature: float, softcap: float | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference of `linear_logprob_triton.row_statistics`."""
    z = _scaled(logits, temperature, softcap)
    logsumexps = z.logsumexp(-1)
    logprobs = z.gather(-1, targets[:, None])[:, 0] - logsumexps
    if not entropy:
        return logprobs, logsumexps, logits.new_empty(0)
    return logprobs, logsumexps, logsumexps - (torch.exp(z - logsumexps[:, None]) * z).sum(-1)


def _row_gradients(
    logits: Tensor,
    targets: Tensor,
    logsumexps: Tensor,
    entropies: Tensor,
    grad_logprobs: Tensor,
    grad_entropies: Tensor | None,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """The reference of `linear_logprob_triton.row_gradients`.

    d log p_j / dz = onehot(j) - p and d H / dz = -p (log p + H).
    """
    z = _scaled(logits, temperature, softcap)
    log_p = z - logsumexps[:, None]
    p = torch.exp(log_p)
    grad = p * -grad_logprobs[:, None]
    if grad_entropies is not None:
        grad -= p * (log_p + entropies[:, None]) * grad_entropies[:, None]
    grad.scatter_add_(-1, targets[:, None], grad_logprobs[:, None])
    grad /= temperature
    if softcap is not None:
        grad *= 1.0 - (z * temperature / softcap) ** 2
    return grad.to(dtype)


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
        fp32_head: bool,
        reference: bool,
    ) -> Any:
        tokens = hidden.shape[0]
        tile = max(1, TILE_ELEMENTS // head.shape[0])
        statistics = _passes(hidden, reference)[0]
        logprobs, logsumexps = (torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(2))
        entropies = torch.empty(tokens if entropy else 0, dtype=torch.float32, device=hidden.device)
        for start in range(0, tokens, tile):
            rows = slice(start, start + tile)
            logits = head_logits(hidden[rows], head, fp32_head)
            logprobs[rows], logsumexps[rows], entropies[rows] = statistics(
                logits, targets[rows], temperature, softcap, entropy
            )
        ctx.save_for_backward(hidden, head, targets, logsumexps, entropies)
        ctx.temperature, ctx.softcap, ctx.tile, ctx.fp32_head = temperature, softcap, tile, fp32_head
        ctx.reference = reference
        ctx.set_materialize_grads(False)  # entropies that are only logged cost nothing in the backward pass
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> Any:
        hidden, head, targets, logsumexps, entropies = ctx.saved_tensors
        gradients = _passes(hidden, ctx.reference)[1]
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(logsumexps)
        grad_hidden = torch.empty_like(hidden)
        for start in range(0, hidden.shape[0], ctx.tile):
            rows = slice(start, start + ctx.tile)
            grad_logits = gradients(
                head_logits(hidden[rows], head, ctx.fp32_head),
                targets[rows],
                logsumexps[rows],
                entropies[rows],
                grad_logprobs[rows],
                None if grad_entropies is None else grad_entropies[rows],
                ctx.temperature,
                ctx.softcap,
                head.dtype,
            )
            torch.mm(grad_logits, head, out=grad_hidden[rows])
        return grad_hidden, None, None, None, None, None, None, None


def _passes(hidden: Tensor, reference: bool) -> tuple[Any, Any]:
    """The two passes over a tile of logits: Triton's on a GPU, the references elsewhere or on request."""
    if reference or not hidden.is_cuda:
        return _row_statistics, _row_gradients
    from .linear_logprob_triton import row_gradients, row_statistics

    return row_statistics, row_gradients


def linear_logprob(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    fp32_head: bool = True,
    reference: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `targets` and, on request, the entropy of each distribution.

    Args:
        hidden: (tokens, hidden_size), after the final norm.
        head: (vocab, hidden_size), frozen: it gets no gradient; the dtype of `hidden`.
        targets: (tokens,) int64 token ids below `vocab`.
        temperature: the sampling temperature, above 0.
        softcap: Gemma's cap on the logits, if any.
        entropy: also return entropies, in nats.
        fp32_head: logits are fp32 sums (kernels.head_logits); False: rounded to the dtype of the head.
        reference: plain torch instead of the kernels.

    Returns:
        logprobs (tokens,) fp32, natural logarithm; entropies (tokens,) fp32 or None. Both differentiable in `hidden`.
    """
    if temperature <= 0:
        raise ValueError(f"linear_logprob: temperature must be above 0, got {temperature}")
    logprobs, entropies = _LinearLogprob.apply(
        hidden, head, targets, temperature, softcap, entropy, fp32_head, reference
    )
    return logprobs, entropies if entropy else None
