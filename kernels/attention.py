"""Causal grouped-query attention over a packed row: several sequences side by side, none sees another.

On a GPU `attention_plan` cuts a row into segments, each for the kernel that is fastest for it:

    dense: cuDNN's attention (flash where cuDNN has no kernel), which knows "causal" and equal lengths and nothing else:
        a sequence that stands alone, one of at least DENSE_FROM tokens, or a row of equal sequences of at least
        EQUAL_FROM tokens, which is a batch as it lies there. cuDNN makes a plan for each new shape, which takes as long
        as many attentions: so lengths are padded to `padded_tokens`, a copy where they are not that already.
    packed: FlexAttention, for runs of shorter sequences and for sliding windows; see attention_flex.py.

A row whose total is `padded_tokens` of itself, its last sequence prolonged with tokens that are thrown away, is copied
by neither where it is one segment: being causal, nothing before them changes.

FLOPs, with D = head_dim, over all visible pairs of query and key: 4 D per query head forward, 10 D backward.
Bytes kept for the backward pass: q, k, v, the output and 4 per token and query head.

Error: scores and sums are fp32, the probabilities are rounded to the dtype of unit roundoff u before the product with
the values: |error| <= 4 u max |v| over the visible keys (and rounding of the scores' sums, far below that in bf16).
NaN and infinities come out as NaN wherever they are seen. Dense segments and the reference keep them in their sequence;
FlexAttention multiplies hidden values of the same 128 tokens by 0, so there they also reach neighbours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_flex import BLOCK, flex_packed_attention

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
DENSE_FROM = 1024  # a sequence of so many tokens gets a call of its own (benchmarks/attention.py, uneven_*)
EQUAL_FROM = 512  # equal sequences of so many tokens are one batch
DENSE_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
BUCKETS_PER_OCTAVE = 64


@dataclass(frozen=True)
class Segment:
    """Adjacent sequences of a row that one kernel takes in one call; `dense` ones have equal lengths."""

    lengths: tuple[int, ...]
    dense: bool

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    dense_from: int = DENSE_FROM,
) -> Tensor:
    """Attention of each packed sequence to itself, causal, optionally within a sliding window.

    The reference on the CPU and in fp32 and fp64; the kernels of this page on a GPU in bf16 and fp16.

    Args:
        q: (tokens, heads, head_dim).
        k, v: (tokens, kv_heads, head_dim); heads is a multiple of kv_heads.
        lengths: tokens of each sequence, in order, each at least 1; their sum is `tokens`.
        scale: factor on the scores.
        window: a token attends to itself and the window - 1 tokens before it; None for all.
        dense_from: see `attention_plan`.

    Returns:
        (tokens, heads, head_dim), the dtype of `q`.

    Raises:
        ValueError: lengths that do not fill the row, heads that do not divide, a window below 1.
    """
    _check(q, k, v, lengths, window)
    if not q.is_cuda or q.dtype not in KERNEL_DTYPES:
        return packed_attention_reference(q, k, v, lengths, scale, window)
    if window is not None and window >= max(lengths):
        window = None
    plan = attention_plan(tuple(lengths), window, dense_from)
    if len(plan) == 1:
        return _attend(q, k, v, plan[0], scale, window)
    sizes = [segment.tokens for segment in plan]  # split, not slices: its backward is one concatenation
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), plan, strict=True)
    return torch.cat([_attend(*part, scale, window) for part in parts])


@lru_cache(maxsize=64)
def attention_plan(
    lengths: tuple[int, ...], window: int | None = None, dense_from: int = DENSE_FROM
) -> tuple[Segment, ...]:
    """Cut a row into segments; the rule is at the top of the page.

    Args:
        lengths: tokens of each sequence.
        window: of fewer tokens than the longest sequence, or None.
        dense_from: tokens from which a sequence among others gets a dense call of its own.
    """
    if window is not None:
        return (Segment(lengths, dense=False),)
    if len(set(lengths)) == 1 and lengths[0] >= EQUAL_FROM:
        return (Segment(lengths, dense=True),)
    segments: list[Segment] = []
    run: list[int] = []
    for length in (*lengths, None):
        if length is not None and length < dense_from:
            run.append(length)
            continue
        if run:
            segments.append(Segment(tuple(run), dense=len(run) == 1))
            run = []
        if length is not None:
            segments.append(Segment((length,), dense=True))
    return tuple(segments)


def padded_tokens(tokens: int) -> int:
    """`tokens` rounded up to a multiple of 128, from 16K tokens on to a 64th of the power of two below."""
    step = max(BLOCK, 2 ** int(math.log2(tokens)) // BUCKETS_PER_OCTAVE)
    return -(-tokens // step) * step


def _attend(q: Tensor, k: Tensor, v: Tensor, segment: Segment, scale: float, window: int | None) -> Tensor:
    if segment.dense:
        return _dense_attention(q, k, v, len(segment.lengths), scale)
    return flex_packed_attention(q, k, v, segment.lengths, scale, window)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, sequences: int, scale: float) -> Tensor:
    """Causal attention of `sequences` equal sequences, which fill (tokens, heads, head_dim)."""
    length = q.shape[0] // sequences
    padding = padded_tokens(length) - length
    batch = [x.unflatten(0, (sequences, length)) for x in (q, k, v)]
    if padding:
        batch = [F.pad(x, (0, 0, 0, 0, 0, padding)) for x in batch]
    q_b, k_b, v_b = (x.transpose(1, 2) for x in batch)
    with sdpa_kernel(DENSE_BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(
            q_b, k_b, v_b, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2)[:, :length].flatten(0, 1)


def packed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, window: int | None = None
) -> Tensor:
    """`packed_attention` in plain torch, sequence by sequence."""
    _check(q, k, v, lengths, window)
    pieces, sizes = [], list(lengths)
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
            enable_gqa=q.shape[1] != k.shape[1],
        )
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """(length, length) bool, True where query row may see key column."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None) -> None:
    if min(lengths, default=0) < 1:
        raise ValueError(f"packed_attention: each sequence has at least 1 token, lengths are {list(lengths)}")
    if sum(lengths) != q.shape[0]:
        raise ValueError(f"packed_attention: lengths add up to {sum(lengths)}, the row has {q.shape[0]} tokens")
    if k.shape != v.shape or k.shape[::2] != q.shape[::2] or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"packed_attention: q, k, v have shapes {shapes}; expected (tokens, heads, head_dim) and twice "
            "(tokens, kv_heads, head_dim), heads a multiple of kv_heads"
        )
    if window is not None and window < 1:
        raise ValueError(f"packed_attention: a window of {window} tokens, but a token sees at least itself")
