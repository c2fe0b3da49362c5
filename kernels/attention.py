"""Causal grouped-query attention over a packed row: several sequences side by side, none sees another, and
continuations that share a prompt (row_layout.py, attention_shared.py).

On a GPU `attention_plan` cuts a row into segments, each for the kernel that is fastest for it (the figures are those of
benchmarks/attention.py):

    dense: cuDNN's attention (flash where cuDNN has no kernel), which knows "causal" and equal lengths and nothing else:
        a sequence of at least DENSE_FROM tokens, or a row of equal sequences of at least EQUAL_FROM tokens, which is a
        batch as it lies there. From about 2K tokens on it beats `varlen` although each sequence is a call (uneven_*).
    varlen: FlashAttention-2, which takes a run of shorter sequences in one call (all of them where the row begins with
        its longest), and rows with sliding windows; see attention_varlen.py. FlexAttention is about as fast only where
        it is compiled, for seconds, for the very length of the row (peers of grpo_* and window*).

cuDNN makes a plan for each new shape, which takes as long as many attentions (second_length_dense_ms), and in each
thread: that of the forward pass, and the one where autograd runs the backward pass and checkpointing repeats the
forward. Trained sequences hardly ever have a length twice, so dense calls have the few lengths of `dense_bucket`: those
in between are copied, with zeros behind their end. No token sees what comes after it, and no gradient comes back
from behind the end, so nothing changes but the time. A new length in a known bucket needs no plan
(second_length_in_bucket_ms), and `varlen` needs none at all (second_length_ms).

FLOPs, with D = head_dim, over all visible pairs of query and key: 4 D per query head forward, 10 D backward.
Bytes kept for the backward pass: q, k, v (of a dense call its padded ones), the output and 4 per token and query head.

Error: scores and sums are fp32, the probabilities are rounded to the dtype of unit roundoff u before the product with
the values: |error| <= 4 u max |v| over the visible keys (and rounding of the scores' sums, far below that in bf16).
NaN and infinities come out as NaN wherever they are seen, and stay in their sequence. Kernels multiply hidden values of
the same tile by 0, so that there they also reach earlier tokens of the sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_shared import continued_attention, continued_attention_reference
from .attention_varlen import has_kernel, sequence_reference, varlen_attention
from .row_layout import Entry, Layout, entry_tokens, is_layout, row_tokens

DENSE_FROM = 2048  # a sequence of so many tokens gets a call of its own (benchmarks/attention.py, uneven_*)
EQUAL_FROM = 1024  # equal sequences of so many tokens are one batch
DENSE_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
BLOCK = 128  # lengths of rows and of dense calls are multiples of it


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
    layout: Layout,
    scale: float,
    window: int | None = None,
    dense_from: int = DENSE_FROM,
) -> Tensor:
    """Attention of each packed sequence to itself, causal, optionally within a sliding window.

    The kernels of this page on a GPU in bf16 and fp16, with heads of up to 256 whose dimension is a multiple of 8; the
    reference for all else.

    Args:
        q: (tokens, heads, head_dim).
        k, v: (tokens, kv_heads, head_dim); heads is a multiple of kv_heads.
        layout: tokens of each sequence, or of a prompt and its continuations, in order; together they are `tokens`.
        scale: factor on the scores.
        window: a token attends to itself and the window - 1 tokens before it; None for all.
        dense_from: see `attention_plan`.

    Returns:
        (tokens, heads, head_dim), the dtype of `q`.

    Raises:
        ValueError: a layout that does not fill the row, heads that do not divide, a window below 1.
    """
    _check(q, k, v, layout, window)
    if not has_kernel(q):
        return packed_attention_reference(q, k, v, layout, scale, window)
    pieces = []
    for entries, (q_run, k_run, v_run) in _runs(q, k, v, layout):
        family = entries[0]
        if isinstance(family, int):
            lengths = tuple(map(entry_tokens, entries))
            pieces.append(_sequences(q_run, k_run, v_run, lengths, scale, window, dense_from))
            continue
        prompt, *continuations = family
        sizes = [prompt, sum(continuations)]
        (q_p, q_c), (k_p, k_c), (v_p, v_c) = (x.split(sizes) for x in (q_run, k_run, v_run))
        pieces.append(_sequences(q_p, k_p, v_p, (prompt,), scale, window, dense_from))
        narrow = None if window is None or window >= prompt + max(continuations) else window
        pieces.append(continued_attention(q_c, (k_p, v_p), (k_c, v_c), continuations, scale, narrow))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _runs(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout
) -> Iterator[tuple[list[Entry], tuple[Tensor, Tensor, Tensor]]]:
    """Neighbouring sequences together, and every prompt with its continuations, with their q, k and v."""
    runs: list[list[Entry]] = []
    for entry in layout:
        if isinstance(entry, int) and runs and isinstance(runs[-1][0], int):
            runs[-1].append(entry)
        else:
            runs.append([entry])
    sizes = [row_tokens(run) for run in runs]  # split, not slices: its backward is one concatenation
    yield from zip(runs, zip(*(x.split(sizes) for x in (q, k, v)), strict=True), strict=True)


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None, dense_from: int
) -> Tensor:
    """`packed_attention` of sequences, on a GPU."""
    if window is not None and window >= max(lengths):
        window = None
    plan = attention_plan(lengths, window, dense_from)
    if len(plan) == 1:
        return _attend(q, k, v, plan[0], scale, window)
    sizes = [segment.tokens for segment in plan]
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
    if len(lengths) > 1 and len(set(lengths)) == 1 and lengths[0] >= EQUAL_FROM:
        return (Segment(lengths, dense=True),)
    segments: list[Segment] = []
    for dense, group in groupby(lengths, lambda length: length >= dense_from):
        run = tuple(group)
        segments += [Segment((length,), dense=True) for length in run] if dense else [Segment(run, dense=False)]
    return tuple(segments)


def padded_tokens(tokens: int) -> int:
    """What to prolong a row to, with tokens at its end that are thrown away: being causal, nothing before them changes.

    A multiple of 128, from 16K tokens on of a 64th of the power of two below: finer than `dense_bucket`, as all of a
    model runs on these tokens. From 32K on they are the same, and a sequence that has such a row to itself is not
    copied.
    """
    return _round_up(tokens, max(BLOCK, _power_of_two_below(tokens) // 64))


def dense_bucket(tokens: int) -> int:
    """Of a sequence in a dense call: `tokens` rounded up to one of 16 lengths between two powers of two.

    From 16K tokens on there are 32, from 32K on 64 of them, and below 2K they are multiples of 128: a plan takes the
    same time for all lengths, but what it saves grows with their square. Of a sequence of at least 2K tokens at most a
    16th is added, on the average a 50th.
    """
    octave = _power_of_two_below(tokens)
    return _round_up(tokens, max(BLOCK, min(octave // 16, 512), octave // 64))


def _power_of_two_below(tokens: int) -> int:
    """The greatest power of two that is no greater than `tokens`, which is at least 1."""
    return 1 << (tokens.bit_length() - 1)


def _round_up(tokens: int, step: int) -> int:
    return -(-tokens // step) * step


def _attend(q: Tensor, k: Tensor, v: Tensor, segment: Segment, scale: float, window: int | None) -> Tensor:
    if segment.dense:
        return dense_attention(q, k, v, len(segment.lengths), scale)
    return varlen_attention(q, k, v, segment.lengths, scale, window)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, sequences: int, scale: float) -> Tensor:
    """`packed_attention` of `sequences` sequences of the same length, padded to `dense_bucket`."""
    length = q.shape[0] // sequences
    padding = dense_bucket(length) - length
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
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None = None
) -> Tensor:
    """`packed_attention` in plain torch, sequence by sequence."""
    _check(q, k, v, layout, window)
    pieces, sizes = [], [entry_tokens(entry) for entry in layout]
    for q_s, k_s, v_s, entry in zip(q.split(sizes), k.split(sizes), v.split(sizes), layout, strict=True):
        if isinstance(entry, int):
            pieces.append(sequence_reference(q_s, k_s, v_s, scale, window))
            continue
        prompt, *continuations = entry
        (q_p, q_c), (k_p, k_c), (v_p, v_c) = (x.split([prompt, sum(continuations)]) for x in (q_s, k_s, v_s))
        pieces.append(sequence_reference(q_p, k_p, v_p, scale, window))
        pieces.append(continued_attention_reference(q_c, (k_p, v_p), (k_c, v_c), continuations, scale, window))
    return torch.cat(pieces)


def _check(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> None:
    if not is_layout(layout):
        raise ValueError(f"packed_attention: each sequence has at least 1 token, lengths are {list(layout)}")
    if row_tokens(layout) != q.shape[0]:
        raise ValueError(f"packed_attention: lengths add up to {row_tokens(layout)}, the row has {q.shape[0]} tokens")
    if k.shape != v.shape or k.shape[::2] != q.shape[::2] or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"packed_attention: q, k, v have shapes {shapes}; expected (tokens, heads, head_dim) and twice "
            "(tokens, kv_heads, head_dim), heads a multiple of kv_heads"
        )
    if window is not None and window < 1:
        raise ValueError(f"packed_attention: a window of {window} tokens, but a token sees at least itself")
