"""FlashAttention-2 (Dao 2023, arXiv 2307.08691) over a packed row, causal, with or without a sliding window.

All sequences in one call, which knows them by where each begins: no padding, no copy, nothing compiled, and nothing
that a new length would have to wait for. torch has the kernels. They are called by their operator, which is the same
in all versions; the public function, torch.nn.attention.varlen.varlen_attn, refuses grouped queries in PyTorch 2.11.

The backward pass adds up the gradient of q in fp32, and has those of k and v for each query head before it sums
the heads of a group: for its duration it takes 4 + 2 * 2 bytes per element of q. It adds atomically, so that two
runs may differ in the last bits; not so under `torch.use_deterministic_algorithms`, where it is slower.

Attention sinks (gpt-oss) need an autograd function around the two operators: output and log-sum-exp are rescaled as if
one more key without a value had been there, and with the rescaled ones the backward operator's gradients are right.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def has_kernel(q: Tensor) -> bool:
    """Whether `varlen_attention` takes (tokens, heads, head_dim) queries of this device, dtype and head_dim."""
    if not q.is_cuda or q.dtype not in KERNEL_DTYPES or q.shape[2] % 8 or q.shape[2] > MAX_HEAD_DIM:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    key_lengths: tuple[int, ...] | None = None,
) -> Tensor:
    """`packed_attention` where `has_kernel`.

    Args and returns: those of `packed_attention`, which checks them; where a sequence's queries are only its last
    tokens, `key_lengths` are the tokens of its k and v.
    """
    return flash(q, k, v, lengths, key_lengths or lengths, True, scale, window)[0]


def flash(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], keys: tuple[int, ...], causal: bool, scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each sequence to its keys, (tokens, heads, head_dim), and (heads, tokens) fp32 log-sum-exp."""
    starts, key_starts = sequence_starts(lengths, q.device), sequence_starts(keys, q.device)
    limits = {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0} if causal else {}
    out, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        starts,
        key_starts,
        max(lengths),
        max(keys),
        0.0,  # no dropout
        causal and window is None,  # a window that ends at the query is causal, too
        False,  # no debug mask
        scale=scale,
        **limits,
    )
    return out, log_sum


def flash_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, grad: Tensor,
    lengths: tuple[int, ...], keys: tuple[int, ...], causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, given the output and log-sum-exp of all keys, of which these may be a part."""
    starts, key_starts = sequence_starts(lengths, q.device), sequence_starts(keys, q.device)
    no_dropout = torch.empty(0, dtype=torch.uint64, device=q.device)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, log_sum, starts, key_starts, max(lengths), max(keys), 0.0, causal, no_dropout, no_dropout,
        scale=scale,
    )  # fmt: skip
    return gradients


def sequence_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """`varlen_attention` of one sequence, whose queries may be only its last tokens, in plain torch."""
    queries, tokens = q.shape[0], k.shape[0]
    mask = None
    if queries < tokens or (window is not None and tokens > window):
        distance = torch.arange(tokens - queries, tokens, device=q.device)[:, None]
        distance = distance - torch.arange(tokens, device=q.device)[None, :]
        mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


@lru_cache(maxsize=1024)  # a row has up to four for each shared prompt
def sequence_starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(sequences + 1,) int32: where each sequence of the row begins, and where the last one ends.

    Those of the last few rows are kept: the layers of a forward pass and its repetition share them.
    """
    with torch.inference_mode(False):  # a row first seen without gradients may be trained next
        return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
