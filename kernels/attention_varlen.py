"""FlashAttention-2 (Dao 2023, arXiv 2307.08691) over a packed row, causal, with or without a sliding window.

All sequences in one call, which knows them by where each begins: no padding, no copy, nothing compiled, and nothing
that a new length would have to wait for. torch has the kernels. They are called by their operator, which is the same
in all versions; the public function, torch.nn.attention.varlen.varlen_attn, refuses grouped queries in PyTorch 2.11.

The backward pass adds up the gradient of q in fp32, and has those of k and v for each query head before it sums
the heads of a group: for its duration it takes 4 + 2 * 2 bytes per element of q. It adds atomically, so that two
runs may differ in the last bits; not so under `torch.use_deterministic_algorithms`, where it is slower.

Forward and backward are two functions here, given to autograd together with the row's other kernels (attention.py).

Attention sinks (gpt-oss): output and log-sum-exp are rescaled as if one more key without a value had been there, and
with the rescaled ones the backward operator's gradients are right.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def has_kernel(q: Tensor) -> bool:
    """Whether `varlen` takes (tokens, heads, head_dim) queries of this device, dtype and head_dim."""
    if not q.is_cuda or q.dtype not in KERNEL_DTYPES or q.shape[2] % 8 or q.shape[2] > MAX_HEAD_DIM:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    scale: float,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence to its keys, where `has_kernel`.

    Args:
        q: (tokens, heads, head_dim), sequences of `lengths` side by side.
        k, v: (keys, kv_heads, head_dim), those of `key_lengths`.
        scale: factor on the scores.
        causal: a sequence's last token attends to its last key, the one before to the key before, and so on.
        window: to that key and the window - 1 before it.

    Returns:
        (tokens, heads, head_dim), and (heads, tokens) fp32, the logarithms of the sums of exponentials.
    """
    starts, key_starts = sequence_starts(lengths, q.device), sequence_starts(key_lengths, q.device)
    out, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, key_starts, max(lengths), max(key_lengths), 0.0, causal and window is None, False,
        scale=scale, **_window(window),
    )  # fmt: skip
    return out, log_sum


def varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor,
    lengths: tuple[int, ...], key_lengths: tuple[int, ...], scale: float,
    causal: bool = True, window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v of `varlen`, given the output and log-sum-exp of all keys, these or also others."""
    starts, key_starts = sequence_starts(lengths, q.device), sequence_starts(key_lengths, q.device)
    no_dropout = torch.empty(0, dtype=torch.uint64, device=q.device)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, log_sum, starts, key_starts, max(lengths), max(key_lengths), 0.0,
        causal and window is None, no_dropout, no_dropout, scale=scale, **_window(window),
    )  # fmt: skip
    return gradients


def _window(window: int | None) -> dict[str, int | None]:
    """A window that ends at the query is causal, too."""
    return {
        "window_size_left": None if window is None else window - 1,
        "window_size_right": None if window is None else 0,
    }


def sequence_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """`varlen` of one sequence, whose queries may be only its last tokens, in plain torch."""
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
