"""Causal attention of continuations to themselves and to the prompt that they share.

The softmax over prompt and continuation is put together from that over either (as FlashAttention-2 puts its tiles
together, Dao 2023, arXiv 2307.08691, section 3.1): with l_p and l_c the logarithms of the sums of exponentials,
    l = log(e^l_p + e^l_c),   out = e^(l_p - l) out_p + e^(l_c - l) out_c.
Given `out` and l, the backward operators give each part's share of the gradients, as the probabilities that they
compute again are e^(score - l). So a continuation's own part is that of a sequence, by whatever kernel is the fastest
(attention.py). Here is the part of the prompt, whose keys and values all continuations read in one call and nobody
copies (two calls for a long prompt, as cuDNN knows few lengths), and how it is put to the other. Sliding windows see
little of the prompt: its end is put in front of each continuation instead.

FLOPs: 4 D a visible pair and query head forward, 10 D backward, as for sequences of their own. Bytes kept: q, k, v, the
output and 4 per token and query head; with a window either pass has, while it runs, the prompt's end in k and v once
for each continuation. Error: that of `packed_attention`, and the roundings of the parts' outputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention_dense import dense, dense_backward, dense_floor, has_dense_kernel
from .attention_varlen import sequence_reference, varlen, varlen_backward

Pair = tuple[Tensor, Tensor]  # k and v, or their gradients; an output and its log-sum-exp
# Tokens of prompt and continuations from which cuDNN attends to all but the last few tokens of the prompt: it is faster
# by two thirds, but each pair of lengths in a bucket wants a plan, which takes a quarter of a second.
DENSE_PROMPT_FROM = 8192


def add_prompt(q: Tensor, prompt: Pair, own: Pair, scale: float) -> Pair:
    """Attention to the keys of a prompt, put to that to others; where attention_varlen `has_kernel`.

    Args:
        q: (tokens, heads, head_dim), of all its continuations.
        prompt: k and v, (prompt's tokens, kv_heads, head_dim).
        own: (tokens, heads, head_dim) and (heads, tokens) fp32, output and log-sum-exp over the other keys.
        scale: factor on the scores.

    Returns:
        Output and log-sum-exp over all of them.
    """
    for part, is_dense in _cut(q, prompt):
        k, v = prompt[0][part], prompt[1][part]
        own = _together(
            own, dense(q, k, v, 1, scale, False) if is_dense else varlen(q, k, v, *_all(q, k), scale, False)
        )
    return own


def add_prompt_backward(
    grad: Tensor, q: Tensor, prompt: Pair, out: Tensor, log_sum: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The prompt's share of the gradient of q, and the gradients of its k and v, given what `add_prompt` returned."""
    found = []
    for part, is_dense in _cut(q, prompt):
        k, v = prompt[0][part], prompt[1][part]
        known = (grad, q, k, v, out, log_sum)
        found.append(
            dense_backward(*known, 1, scale, False) if is_dense else varlen_backward(*known, *_all(q, k), scale, False)
        )
    if len(found) == 1:
        return found[0]
    (grad_q, more_q), of_k, of_v = zip(*found, strict=True)
    return grad_q.add_(more_q), torch.cat(of_k), torch.cat(of_v)


def _cut(q: Tensor, prompt: Pair) -> list[tuple[slice, bool]]:
    """The prompt's tokens for each call, and whether it is cuDNN's."""
    tokens = prompt[0].shape[0]
    if min(tokens, q.shape[0]) < DENSE_PROMPT_FROM or not has_dense_kernel(q, *prompt, causal=False):
        return [(slice(0, tokens), False)]
    main = dense_floor(tokens)
    return [(slice(0, main), True), (slice(main, tokens), False)][: 1 if main == tokens else 2]


def _all(q: Tensor, k: Tensor) -> tuple[tuple[int], tuple[int]]:
    return (q.shape[0],), (k.shape[0],)


def _together(one: Pair, other: Pair) -> Pair:
    """Output and log-sum-exp over the keys of both."""
    log_sum = torch.logaddexp(one[1], other[1])
    of_other = torch.exp(other[1] - log_sum).T[..., None]  # (tokens, heads, 1)
    return one[0].float().lerp_(other[0].float(), of_other).to(one[0].dtype), log_sum


def windowed(
    q: Tensor, prompt: Pair, own: Pair, lengths: tuple[int, ...], scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Attention of continuations of `lengths` within a window; q, k, v and returned as for `varlen`."""
    seen = _seen(prompt, window)
    k, v = (_in_front(*parts, lengths) for parts in zip(seen, own, strict=True))
    return varlen(q, k, v, lengths, _prolonged(lengths, seen), scale, window=window)


def windowed_backward(
    grad: Tensor, q: Tensor, prompt: Pair, own: Pair, out: Tensor, log_sum: Tensor,
    lengths: tuple[int, ...], scale: float, window: int,
) -> tuple[Tensor, Pair, Pair]:  # fmt: skip
    """The gradients of q, of the prompt's k and v and of their own, given what `windowed` returned."""
    seen = _seen(prompt, window)
    k, v = (_in_front(*parts, lengths) for parts in zip(seen, own, strict=True))
    key_lengths = _prolonged(lengths, seen)
    grad_q, *of_keys = varlen_backward(grad, q, k, v, out, log_sum, lengths, key_lengths, scale, window=window)
    (k_p, k_c), (v_p, v_c) = (_taken_apart(x, lengths, prompt[0].shape[0], seen[0].shape[0]) for x in of_keys)
    return grad_q, (k_p, v_p), (k_c, v_c)


def _seen(prompt: Pair, window: int) -> Pair:
    """The prompt's end that a window on the first token behind it reaches."""
    first = max(0, prompt[0].shape[0] - window + 1)
    return prompt[0][first:], prompt[1][first:]


def _prolonged(lengths: tuple[int, ...], seen: Pair) -> tuple[int, ...]:
    return tuple(seen[0].shape[0] + length for length in lengths)


def _in_front(seen: Tensor, own: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(keys, kv_heads, head_dim): each continuation's behind a copy of `seen`."""
    return torch.cat([part for piece in own.split(lengths) for part in (seen, piece)])


def _taken_apart(grad: Tensor, lengths: tuple[int, ...], prompt: int, seen: int) -> tuple[Tensor, Tensor]:
    """Gradients of what `_in_front` made: of the prompt's tokens, of which only the last were seen, and their own."""
    pieces = grad.split([part for length in lengths for part in (seen, length)])
    of_prompt = grad.new_zeros(prompt, *grad.shape[1:])
    of_prompt[prompt - seen :] = torch.stack(pieces[::2]).sum(0, dtype=torch.float32)
    return of_prompt, torch.cat(pieces[1::2])


def continued_reference(
    q: Tensor,
    prompt: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention of continuations in plain torch, each behind a prompt of its own."""
    (k, v), pieces = prompt, []
    for q_c, k_c, v_c in zip(*(x.split(list(lengths)) for x in (q, *own)), strict=True):
        pieces.append(sequence_reference(q_c, torch.cat((k, k_c)), torch.cat((v, v_c)), scale, window))
    return torch.cat(pieces)
