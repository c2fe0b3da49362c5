"""cuDNN's attention, which knows "causal" and equal lengths and nothing else: a long sequence, some of one length, or
all of some tokens to all of some keys.

cuDNN makes a plan for each new shape, which takes as long as many attentions (second_length_dense_ms of
benchmarks/attention.py), and in each thread: that of the forward pass, and the one where autograd runs the backward
pass. Trained sequences hardly ever have a length twice, so calls have the few lengths of `dense_bucket`: those in
between are copied, with zeros behind their end. No token sees what comes after it, and no gradient comes back from
behind the end, so nothing changes but the time.

torch's operators are called as they are: what is left of a forward pass, output and log-sum-exp, can then be handed to
a backward pass that is not autograd's. torch keeps cuDNN's plans by the shapes and strides of q, k and v alone, so the
other tensors of a backward pass must always lie the same way: contiguous.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
BLOCK = 128  # lengths of rows and of dense calls are multiples of it


def has_dense_kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> bool:
    """Whether `dense` and `dense_backward` take (tokens, heads, head_dim) queries and such keys and values.

    Whatever torch's switch says of cuDNN, which is for its own choice of a kernel: importing vLLM turns it off.
    """
    q_b, k_b, v_b = (x.detach()[None].transpose(1, 2) for x in (q, k, v))
    q_b.requires_grad_()  # no heads that have a forward kernel only: a backward pass may follow
    with torch.enable_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return can_use_cudnn_attention(SDPAParams(q_b, k_b, v_b, None, 0.0, causal, True))


def dense(q: Tensor, k: Tensor, v: Tensor, sequences: int, scale: float, causal: bool = True) -> tuple[Tensor, Tensor]:
    """Attention of `sequences` sequences of the same length, where `has_dense_kernel`.

    Args:
        q: (tokens, heads, head_dim).
        k, v: (keys, kv_heads, head_dim).
        sequences: that lie side by side.
        scale: factor on the scores.
        causal: as many keys as tokens, each token sees those up to itself. Not: all of its sequence's, however many;
            each number of them wants a plan (`dense_floor`).

    Returns:
        (tokens, heads, head_dim), and (heads, tokens) fp32, the logarithms of the sums of exponentials.
    """
    length = q.shape[0] // sequences
    keys = (_batch(x, sequences, padded=causal) for x in (k, v))
    out, log_sum, *_ = _forward(_batch(q, sequences), *keys, None, True, 0.0, causal, False, scale=scale)
    log_sum = log_sum.reshape(sequences, q.shape[1], -1)[:, :, :length]
    return _row(out, length), log_sum.transpose(0, 1).flatten(1).contiguous()


def dense_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor,
    sequences: int, scale: float, causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, given the output and log-sum-exp of all keys, these or also others."""
    length, heads = q.shape[0] // sequences, q.shape[1]
    grad_b, q_b, out_b = (_batch(x, sequences) for x in (grad.contiguous(), q, out.contiguous()))
    k_b, v_b = (_batch(x, sequences, padded=causal) for x in (k, v))
    padded = q_b.shape[2]
    # Behind the end the gradient is 0, and with it all that comes from there, whatever finite log-sum-exp it has.
    log_sum_b = log_sum.new_zeros(sequences, heads, padded, 1)
    log_sum_b[:, :, :length, 0] = log_sum.unflatten(1, (sequences, length)).transpose(0, 1)
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients = _backward(
        grad_b, q_b, k_b, v_b, out_b, log_sum_b, no_dropout, no_dropout,
        None, None, None, padded, k_b.shape[2], 0.0, causal, scale=scale,
    )  # fmt: skip
    grad_q, grad_k, grad_v = (_row(x, like.shape[0] // sequences) for x, like in zip(gradients, (q, k, v), strict=True))
    return grad_q, grad_k, grad_v


def dense_bucket(tokens: int) -> int:
    """Of a sequence in a dense call: `tokens` rounded up to one of 16 lengths between two powers of two.

    From 16K tokens on there are 32, from 32K on 64 of them, and below 2K they are multiples of 128: a plan takes the
    same time for all lengths, but what it saves grows with their square. Of a sequence of at least 2K tokens at most a
    16th is added, on the average a 50th.
    """
    return _round_up(tokens, _bucket_step(tokens))


def dense_floor(tokens: int) -> int:
    """`tokens` rounded down to the lengths of `dense_bucket`."""
    return tokens - tokens % _bucket_step(tokens)


def _bucket_step(tokens: int) -> int:
    octave = _power_of_two_below(tokens)
    return max(BLOCK, min(octave // 16, 512), octave // 64)


def padded_tokens(tokens: int) -> int:
    """What to prolong a row to, with tokens at its end that are thrown away: being causal, nothing before them changes.

    A multiple of 128, from 16K tokens on of a 64th of the power of two below: finer than `dense_bucket`, as all of a
    model runs on these tokens. From 32K on they are the same, and a sequence that has such a row to itself is not
    copied.
    """
    return _round_up(tokens, max(BLOCK, _power_of_two_below(tokens) // 64))


def _power_of_two_below(tokens: int) -> int:
    """The greatest power of two that is no greater than `tokens`, which is at least 1."""
    return 1 << (tokens.bit_length() - 1)


def _round_up(tokens: int, step: int) -> int:
    return -(-tokens // step) * step


def _batch(x: Tensor, sequences: int, padded: bool = True) -> Tensor:
    """(tokens, heads, dim) -> (sequences, heads, padded length, dim), zeros behind the end."""
    batch = x.unflatten(0, (sequences, -1))
    padding = dense_bucket(batch.shape[1]) - batch.shape[1] if padded else 0
    return (F.pad(batch, (0, 0, 0, 0, 0, padding)) if padding else batch).transpose(1, 2)


def _row(x: Tensor, length: int) -> Tensor:
    """The opposite of `_batch`."""
    return x.transpose(1, 2)[:, :length].flatten(0, 1)
