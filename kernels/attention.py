"""Causal grouped-query attention over a packed row: several sequences side by side, none sees another, and
continuations that share a prompt (row_layout.py, attention_shared.py).

On a GPU the row is cut into segments, each for the kernel that is fastest for it (attention_plan.py).

FLOPs, with D = head_dim, over all visible pairs of query and key: 4 D per query head forward, 10 D backward.
Bytes kept for the backward pass: q, k, v, the output and 4 per token and query head. A backward pass that has computed
q, k and v again needs no second forward pass of attention, only the other two (`KeptAttention`).

Error: scores and sums are fp32, the probabilities are rounded to the dtype of unit roundoff u before the product with
the values: |error| <= 4 u max |v| over the visible keys (and rounding of the scores' sums, far below that in bf16).
NaN comes out as NaN wherever it is seen, an infinite value as an infinity or NaN, and both stay in their sequence.
Kernels multiply hidden values of the same tile by 0, so that there they also reach earlier tokens of the sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_dense import dense, dense_backward, has_dense_kernel
from .attention_plan import DENSE_FROM, Plan, Segment, attention_plan
from .attention_shared import add_prompt, add_prompt_backward, continued_reference, windowed, windowed_backward
from .attention_varlen import has_kernel, sequence_reference, varlen, varlen_backward
from .row_layout import Layout, entry_tokens, is_layout, row_tokens


@dataclass
class KeptAttention:
    """What `packed_attention` leaves where kernels run: given to it again with the same q, k and v, it starts there.

    Attributes:
        out: (tokens, heads, head_dim), its result.
        log_sum: (heads, tokens) fp32, the logarithms of the sums of exponentials.
        load: gives both where they are elsewhere, or nothing; called once, and only when they are needed.
    """

    out: Tensor | None = None
    log_sum: Tensor | None = None
    load: Callable[[], Sequence[Tensor]] | None = None

    def fill(self) -> None:
        """With what `load` gives, if there is one."""
        if self.load is not None:
            self.out, self.log_sum = self.load() or (None, None)
            self.load = None


def kept_attention(x: Tensor, heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Tensors like those of `KeptAttention`, on the meta device, for a row x (tokens, hidden); none without kernels."""
    if not has_kernel(x.new_empty(0, heads, head_dim)):
        return ()
    tokens = x.shape[0]
    out = torch.empty(tokens, heads, head_dim, dtype=x.dtype, device="meta")
    return out, torch.empty(heads, tokens, dtype=torch.float32, device="meta")


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float,
    window: int | None = None,
    dense_from: int = DENSE_FROM,
    kept: KeptAttention | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v, each query over the keys up to itself of its own sequence.

    Query head h attends to key-value head h // (heads / kv_heads). Differentiable once on a GPU. The heads may be
    slices of one fused tensor; the last dimension is contiguous.

    Args:
        q: (tokens, heads, head_dim).
        k, v: (tokens, kv_heads, head_dim); heads is a multiple of kv_heads.
        layout: tokens of each sequence, or of a prompt and its continuations, in order; together they are `tokens`.
        scale: factor on the scores.
        window: a token attends to itself and the window - 1 tokens before it; None for all.
        dense_from: see `attention_plan`.
        kept: filled where kernels run; if it is already, or `load` does it, that is the result, and only a backward
            pass is to come.

    Returns:
        (tokens, heads, head_dim), the dtype of `q`.

    Raises:
        ValueError: a layout that does not fill the row, heads that do not divide, a window below 1.
    """
    _check(q, k, v, layout, window)
    if not has_kernel(q):
        return packed_attention_reference(q, k, v, layout, scale, window)
    plan = attention_plan(tuple(layout), window, dense_from)
    kept = kept or KeptAttention()
    kept.fill()
    if kept.out is None or kept.log_sum is None:
        with torch.no_grad():
            kept.out, kept.log_sum = _attend(q, k, v, plan, scale)
    out: Tensor = _Differentiable.apply(q, k, v, kept.out, kept.log_sum, plan, scale)
    return out


class _Differentiable(torch.autograd.Function):
    """The output of attention that was computed before, as a function of q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, plan: Plan, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.plan, ctx.scale = plan, scale
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        gradients = _attend_backward(grad.contiguous(), q, k, v, out, log_sum, ctx.plan, ctx.scale)
        return *gradients, None, None, None, None


def _rows(plan: Plan) -> Iterator[tuple[Segment, slice, slice]]:
    """Each segment, its rows and those of the prompt before them."""
    start = 0
    for segment in plan.segments:
        stop = start + sum(segment.lengths)
        yield segment, slice(start, stop), slice(start - segment.prompt, start)
        start = stop


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """(tokens, heads, head_dim), and (heads, tokens) fp32, the logarithms of the sums of exponentials."""
    out, log_sum = _attend_segments(q, k, v, plan, scale)
    for first, middle, last in plan.prompts:
        before, rows = slice(first, middle), slice(middle, last)
        own_part = (out[rows], log_sum[:, rows])
        out[rows], log_sum[:, rows] = add_prompt(q[rows], (k[before], v[before]), own_part, scale)
    return out, log_sum


def _attend_segments(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """Without the plan's `prompts`."""
    parts: list[tuple[Tensor, Tensor]] = []
    for segment, rows, before in _rows(plan):
        own, lengths, window = (q[rows], k[rows], v[rows]), segment.lengths, segment.window
        if segment.prompt and window is not None:
            parts.append(windowed(own[0], (k[before], v[before]), own[1:], lengths, scale, window))
        elif segment.dense and has_dense_kernel(*own):
            parts.append(dense(*own, len(lengths), scale))
        else:
            parts.append(varlen(*own, lengths, lengths, scale, window=window))
    outs, log_sums = zip(*parts, strict=True)
    return (torch.cat(outs), torch.cat(log_sums, 1)) if len(parts) > 1 else parts[0]


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    (grad_q, grad_k, grad_v), of_prompts = _attend_segments_backward(grad, q, k, v, out, log_sum, plan, scale)
    for first, middle, last in plan.prompts:
        before, rows = slice(first, middle), slice(middle, last)
        known = (out[rows], log_sum[:, rows].contiguous())
        more_q, more_k, more_v = add_prompt_backward(grad[rows], q[rows], (k[before], v[before]), *known, scale)
        grad_q[rows] += more_q
        of_prompts.append((before, more_k, more_v))
    for before, more_k, more_v in of_prompts:
        grad_k[before] += more_k
        grad_v[before] += more_v
    return grad_q, grad_k, grad_v


def _attend_segments_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, plan: Plan, scale: float
) -> tuple[list[Tensor], list[tuple[slice, Tensor, Tensor]]]:
    """Without the plan's `prompts`: the gradients of q, k and v, and what is to be added to those of k and v, where."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    of_prompts: list[tuple[slice, Tensor, Tensor]] = []
    for segment, rows, before in _rows(plan):
        own, lengths, window = (q[rows], k[rows], v[rows]), segment.lengths, segment.window
        known = (out[rows], log_sum[:, rows].contiguous())
        if segment.prompt and window is not None:
            prompt = (k[before], v[before])
            grad_q, of_prompt, of_own = windowed_backward(
                grad[rows], own[0], prompt, own[1:], *known, lengths, scale, window
            )
            of_prompts.append((before, *of_prompt))
            parts.append((grad_q, *of_own))
        elif segment.dense and has_dense_kernel(*own):
            parts.append(dense_backward(grad[rows], *own, *known, len(lengths), scale))
        else:
            parts.append(varlen_backward(grad[rows], *own, *known, lengths, lengths, scale, window=window))
    return [torch.cat(x) if len(x) > 1 else x[0] for x in zip(*parts, strict=True)], of_prompts


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
        pieces.append(continued_reference(q_c, (k_p, v_p), (k_c, v_c), continuations, scale, window))
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
