"""The two passes over a tile of logits that `linear_logprob` makes between its matrix products, one kernel each.

Forward, for row z = cap(x) / t and target j: log p_j = z_j - lse, lse = log sum_k exp(z_k), and on request the entropy
H = lse - sum_k p_k z_k; one pass with a running maximum (Milakov and Gimelshein 2018, arXiv 1805.02867).
Gradient of log p_j: dx_k = (1[k = j] - p_k) dz/dx; of the entropy: dx_k = -p_k (log p_k + H) dz/dx; both are rounded to
the head's dtype for the next product.

Bytes for n rows of V fp32 logits: 4 n V read by each; a gradient writes 2 n V in 16 bits. Error: sums in
fp32 over V terms, relative error below 1e-5 for V up to 2^18; dx is rounded once. NaN and +Inf logits give NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8


@triton.jit
def _scaled(x, softcap, inverse_temperature, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """z of logits x; tanh as 1 - 2 / (exp(2 y) + 1), which saturates instead of overflowing."""
    if CAPPED:
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
    return x * inverse_temperature


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    logits, targets, logprobs, logsumexps, entropies, softcap, inverse_temperature,
    VOCAB: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * VOCAB
    columns = tl.arange(0, BLOCK)
    # Every lane keeps its own running maximum and sums; they are brought together once, at the end.
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, VOCAB, BLOCK):
        inside = first + columns < VOCAB
        z = _scaled(tl.load(at + first + columns, mask=inside, other=0.0), softcap, inverse_temperature, CAPPED)
        new_top = tl.where(inside, tl.maximum(top, z), top)
        p = tl.where(inside, tl.exp(z - new_top), 0.0)
        shrink = tl.where(total == 0.0, 0.0, tl.exp(top - new_top))
        total = total * shrink + p
        if ENTROPY:
            weighted = weighted * shrink + tl.where(inside, p * z, 0.0)
        top = new_top
    row_top = tl.max(top, 0)
    scale = tl.where(total == 0.0, 0.0, tl.exp(top - row_top))
    row_total = tl.sum(total * scale, 0)
    logsumexp = row_top + tl.log(row_total)
    target = _scaled(tl.load(at + tl.load(targets + row)), softcap, inverse_temperature, CAPPED)
    tl.store(logprobs + row, target - logsumexp)
    tl.store(logsumexps + row, logsumexp)
    if ENTROPY:
        tl.store(entropies + row, logsumexp - tl.sum(weighted * scale, 0) / row_total)


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    logits, targets, logsumexps, entropies, out, softcap, inverse_temperature,
    VOCAB: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < VOCAB
    x = tl.load(logits + row * VOCAB + columns, mask=inside, other=0.0)
    z = _scaled(x, softcap, inverse_temperature, CAPPED)
    log_p = z - tl.load(logsumexps + row)
    p = tl.exp(log_p)
    if ENTROPY:
        grad = -p * (log_p + tl.load(entropies + row))
    else:
        grad = tl.where(columns == tl.load(targets + row), 1.0, 0.0) - p
    grad *= inverse_temperature
    if CAPPED:
        capped = z / inverse_temperature / softcap
        grad *= 1.0 - capped * capped
    tl.store(out + row * VOCAB + columns, grad.to(out.dtype.element_ty), mask=inside)


def row_statistics(
    logits: Tensor, targets: Tensor, temperature: float, softcap: float | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the targets and what the backward pass needs.

    Args:
        logits: (rows, vocab) fp32, contiguous, before softcap and temperature.
        targets: (rows,) int64 below `vocab`.

    Returns:
        log-probs, logsumexps and entropies, each (rows,) fp32; entropies are (0,) where `entropy` is False.
    """
    rows, vocab = logits.shape
    logprobs, logsumexps = logits.new_empty(rows), logits.new_empty(rows)
    entropies = logits.new_empty(rows if entropy else 0)
    _statistics[(rows,)](
        logits, targets, logprobs, logsumexps, entropies, softcap or 1.0, 1.0 / temperature,
        VOCAB=vocab, CAPPED=softcap is not None, ENTROPY=entropy, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return logprobs, logsumexps, entropies


def row_gradients(
    logits: Tensor,
    targets: Tensor,
    logsumexps: Tensor,
    entropies: Tensor | None,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """(rows, vocab) in `dtype`: how each row's log-prob changes with its logits or, given `entropies`, its entropy.

    Args:
        logits, targets: those of `row_statistics`.
        logsumexps, entropies: what it gave.
    """
    rows, vocab = logits.shape
    out = torch.empty(rows, vocab, dtype=dtype, device=logits.device)
    _gradient[(rows, triton.cdiv(vocab, BLOCK))](
        logits, targets, logsumexps, logsumexps if entropies is None else entropies,
        out, softcap or 1.0, 1.0 / temperature,
        VOCAB=vocab, CAPPED=softcap is not None, ENTROPY=entropies is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return out
