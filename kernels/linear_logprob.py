"""Log-probability of given tokens from hidden states, through the head, without ever holding all the logits.

For hidden state h, head W, temperature t and token j: logits z = softcap(W h) / t, log p_j = z_j - logsumexp(z), and
on request the entropy H = -sum_k p_k log p_k. Tiles of tokens are taken through the whole vocabulary, so the memory is
that of one tile, `TILE_ELEMENTS` fp32 logits and their gradient in the head's dtype, whatever the number of tokens.

What a loss will multiply a token's log-prob by is not known in the forward pass, but it is one number a token, and so
d log p_j / dh, a row of hidden_size, is computed there, while the tile's logits are at hand; the backward pass only
multiplies. That takes two products with the head in all, where computing the logits again takes three. Kept for the
backward pass: those rows instead of the hidden states, as many bytes (and as many again for the entropy's gradient).
On a GPU each pass over a tile is one kernel (linear_logprob_triton).

Products for T tokens: 4 T hidden_size vocab FLOPs with a gradient, half of that without. Error, with u the unit
roundoff of the dtype: logits are fp32 sums; of the gradient p and the sums with the head's rows are rounded once to u
relative each, and so is the final product.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    entropies: Tensor | None,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """The reference of `linear_logprob_triton.row_gradients`.

    d log p_j / dz = onehot(j) - p and d H / dz = -p (log p + H).
    """
    z = _scaled(logits, temperature, softcap)
    log_p = z - logsumexps[:, None]
    grad = -torch.exp(log_p)
    if entropies is not None:
        grad *= log_p + entropies[:, None]
    else:
        grad.scatter_add_(-1, targets[:, None], torch.ones_like(logsumexps)[:, None])
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
        entropy_gradient: bool,
        trained: bool,
        fp32_head: bool,
        reference: bool,
    ) -> Any:
        tokens = hidden.shape[0]
        tile = max(1, TILE_ELEMENTS // head.shape[0])
        statistics, gradients = _passes(hidden, reference)
        logprobs = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        entropies = torch.empty(tokens if entropy else 0, dtype=torch.float32, device=hidden.device)
        of_logprobs = torch.empty_like(hidden) if trained else None
        of_entropies = torch.empty_like(hidden) if trained and entropy_gradient else None
        for start in range(0, tokens, tile):
            rows = slice(start, start + tile)
            logits = head_logits(hidden[rows], head, fp32_head)
            logprobs[rows], logsumexps, tile_entropies = statistics(
                logits, targets[rows], temperature, softcap, entropy
            )
            entropies[rows] = tile_entropies
            for out, wanted in ((of_logprobs, None), (of_entropies, tile_entropies)):
                if out is not None:
                    grad = gradients(logits, targets[rows], logsumexps, wanted, temperature, softcap, head.dtype)
                    torch.mm(grad, head, out=out[rows])
        ctx.save_for_backward(of_logprobs, of_entropies)
        ctx.set_materialize_grads(False)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> Any:
        of_logprobs, of_entropies = ctx.saved_tensors
        grad_hidden = None
        for rows, factors in ((of_logprobs, grad_logprobs), (of_entropies, grad_entropies)):
            if rows is not None and factors is not None:
                term = torch.mul(rows, factors[:, None], out=torch.empty_like(rows))
                grad_hidden = term if grad_hidden is None else grad_hidden.add_(term)
        return grad_hidden, None, None, None, None, None, None, None, None, None


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
    entropy_gradient: bool = False,
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
        entropy_gradient: those entropies are differentiable, for one more product with the head.
        fp32_head: logits are fp32 sums (kernels.head_logits); False: rounded to the dtype of the head.
        reference: plain torch instead of the kernels.

    Returns:
        logprobs (tokens,) fp32, natural logarithm, differentiable in `hidden`; entropies (tokens,) fp32 or None.

    Raises:
        ValueError: a temperature that is not above 0; the gradient of entropies that are not asked for.
    """
    if temperature <= 0:
        raise ValueError(f"linear_logprob: temperature must be above 0, got {temperature}")
    if entropy_gradient and not entropy:
        raise ValueError("linear_logprob: entropy_gradient without entropy; set entropy as well")
    trained = hidden.requires_grad and torch.is_grad_enabled()  # inside of `forward` gradients are always off
    logprobs, entropies = _LinearLogprob.apply(
        hidden, head, targets, temperature, softcap, entropy, entropy_gradient, trained, fp32_head, reference
    )
    return logprobs, entropies if entropy else None
