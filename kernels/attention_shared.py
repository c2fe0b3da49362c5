"""Causal attention of continuations to themselves and to the prompt that they share.

The softmax over prompt and continuation is put together from that over either (as FlashAttention-2 puts its tiles
together, Dao 2023, arXiv 2307.08691, section 3.1): with l_p and l_c the logarithms of the sums of exponentials,
    l = log(e^l_p + e^l_c),   out = e^(l_p - l) out_p + e^(l_c - l) out_c.
Given `out` and l, FlashAttention's backward operator gives each part's share of the gradients, as the probabilities
that it computes again are e^(score - l). The prompt's keys and values are read by all continuations in one call and
never copied. Sliding windows see little of the prompt: its end is put in front of each continuation instead.

FLOPs: 4 D a visible pair and query head forward, 10 D backward, as for sequences of their own. Bytes kept: q, k, v, the
output and 4 per token and query head; with a window the prompt's end in k and v once for each continuation instead of
once. Error: that of `packed_attention`, and two roundings of the parts' outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_varlen import flash, flash_backward, sequence_reference, varlen_attention


def continued_attention(
    q: Tensor,
    prompt: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """On a GPU, where attention_varlen `has_kernel`.

    Args:
        q: (tokens, heads, head_dim), of the continuations side by side.
        prompt: k and v, (prompt's tokens, kv_heads, head_dim).
        own: k and v, (tokens, kv_heads, head_dim).
        lengths: tokens of each continuation.
        scale: factor on the scores.
        window: a token attends to itself and the window - 1 tokens before it; None for all.

    Returns:
        (tokens, heads, head_dim).
    """
    if window is None:
        return _Continued.apply(q, *prompt, *own, tuple(lengths), scale)
    first = max(0, prompt[0].shape[0] - window + 1)  # of the prompt's tokens that the window reaches
    k, v = (
        torch.cat([part for piece in pieces.split(list(lengths)) for part in (whole[first:], piece)])
        for whole, pieces in zip(prompt, own, strict=True)
    )
    key_lengths = tuple(prompt[0].shape[0] - first + length for length in lengths)
    return varlen_attention(q, k, v, tuple(lengths), scale, window, key_lengths)


def continued_attention_reference(
    q: Tensor,
    prompt: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """`continued_attention` in plain torch, each continuation behind a prompt of its own."""
    (k, v), pieces = prompt, []
    for q_c, k_c, v_c in zip(*(x.split(list(lengths)) for x in (q, *own)), strict=True):
        pieces.append(sequence_reference(q_c, torch.cat((k, k_c)), torch.cat((v, v_c)), scale, window))
    return torch.cat(pieces)


class _Continued(torch.autograd.Function):
    """`continued_attention` without a window."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k_p: Tensor, v_p: Tensor, k_c: Tensor, v_c: Tensor, lengths: tuple[int, ...], scale: float
    ) -> Tensor:
        ctx.lengths, ctx.scale = lengths, scale
        ctx.all, ctx.prompt = (q.shape[0],), (k_p.shape[0],)
        out_p, log_p = flash(q, k_p, v_p, ctx.all, ctx.prompt, False, scale)
        out, log_c = flash(q, k_c, v_c, lengths, lengths, True, scale)
        log_sum = torch.logaddexp(log_p, log_c)
        of_prompt = torch.exp(log_p - log_sum).float().T[..., None]  # (tokens, heads, 1)
        out = out.float().lerp_(out_p.float(), of_prompt).to(q.dtype)
        ctx.save_for_backward(q, k_p, v_p, k_c, v_c, out, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k_p, v_p, k_c, v_c, out, log_sum = ctx.saved_tensors
        same = (out, log_sum, grad.contiguous())
        grad_q_p, grad_k_p, grad_v_p = flash_backward(q, k_p, v_p, *same, ctx.all, ctx.prompt, False, ctx.scale)
        grad_q, grad_k, grad_v = flash_backward(q, k_c, v_c, *same, ctx.lengths, ctx.lengths, True, ctx.scale)
        return grad_q.add_(grad_q_p), grad_k_p, grad_v_p, grad_k, grad_v, None, None
