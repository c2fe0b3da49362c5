"""Causal grouped-query attention over a packed row: several sequences side by side, none sees another."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, window: int | None = None
) -> Tensor:
    """Attention of each packed sequence to itself, causal, optionally within a sliding window.

    Args:
        q: (tokens, heads, head_dim).
        k, v: (tokens, kv_heads, head_dim); heads is a multiple of kv_heads.
        lengths: tokens of each sequence, in order; their sum is `tokens`.
        scale: factor on the scores.
        window: a token attends to itself and the window - 1 tokens before it; None for all.

    Returns:
        (tokens, heads, head_dim), the dtype of `q`.
    """
    if sum(lengths) != q.shape[0]:
        raise ValueError(f"packed_attention: lengths add up to {sum(lengths)}, the row has {q.shape[0]} tokens")
    pieces = []
    grouped = q.shape[1] != k.shape[1]
    sizes = list(lengths)
    for q_s, k_s, v_s in zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        length = q_s.shape[0]
        mask = _window_mask(length, window, q.device) if window is not None and length > window else None
        out = F.scaled_dot_product_attention(
            q_s.transpose(0, 1)[None],
            k_s.transpose(0, 1)[None],
            v_s.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=grouped,
        )
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """(length, length) bool, True where query row may see key column."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
