"""Rotation of queries and keys of a fused projection, alone and after the norms of Qwen3 (4B and 8B) and Gemma 3 4B."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from colora.kernels.rope import QKNorm, rope_table, rotate_qkv, rotate_qkv_reference
from torch import Tensor

from . import Case, Implementation

EPS = 1e-6
QWEN3, QWEN2_7B, GEMMA3_4B = (32, 8, 128), (28, 4, 128), (8, 4, 256)  # heads, kv_heads, head_dim


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _rotate(
    function: Callable[..., tuple[Tensor, ...]],
    heads: int,
    kv_heads: int,
    gemma: bool,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *weights: Tensor,
) -> tuple[Tensor, ...]:
    norm = QKNorm(weights[0], weights[1], EPS, gemma) if weights else None
    return function(qkv, cos, sin, heads, kv_heads, norm)


def _liger(heads: int, kv_heads: int, head_dim: int, gemma: bool) -> dict[str, Implementation]:
    """Liger's norms and rotation: of the fused projection, and of q and k that are tensors of their own (less work:
    there is no gradient of v to put beside theirs)."""
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError:
        print("liger-kernel is not installed: no peer")
        return {}
    mode = (1.0, "gemma") if gemma else (0.0, "llama")

    def parts(qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.view(1, qkv.shape[0], -1, head_dim).split((heads, kv_heads, kv_heads), dim=2)

    def separate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        if weights:
            q, k = (LigerRMSNormFunction.apply(x, w, EPS, *mode) for x, w in zip((q, k), weights, strict=True))
        return LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos[None], sin[None])[:2]

    def fused(qkv: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        q, k, v = parts(qkv)
        return *separate(q, k, *others), v

    def split(qkv: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        q, k, _ = (part.detach().contiguous().requires_grad_() for part in parts(qkv))
        return q, k, *others

    return {"liger": Implementation(fused), "liger_separate": Implementation(separate, split)}


def _case(figure: str, tokens: int, shape: tuple[int, int, int], norm: bool = False, gemma: bool = False) -> Case:
    heads, kv_heads, head_dim = shape
    functions = {"ours": rotate_qkv, "reference": rotate_qkv_reference}
    implementations = {
        name: Implementation(partial(_rotate, function, heads, kv_heads, gemma)) for name, function in functions.items()
    }
    implementations |= _liger(heads, kv_heads, head_dim, gemma)
    frequencies = 1e6 ** (-torch.arange(0, head_dim, 2, device="cuda") / head_dim)
    tables = rope_table(torch.arange(tokens, device="cuda"), frequencies, 1.0, torch.bfloat16)
    weights = [_random(head_dim) for _ in range(2)] if norm else []
    qkv = _random(tokens, (heads + 2 * kv_heads) * head_dim).requires_grad_()
    head_bytes = 2 * tokens * head_dim
    forward = (2 * (heads + kv_heads) + 1) * head_bytes  # the tables' first halves are one head's worth
    backward = (2 * (heads + 2 * kv_heads) + 1 + (heads + kv_heads if norm else 0)) * head_bytes
    return Case(figure, (qkv, *tables, *weights), implementations, forward, backward, in_place=not norm)


def cases(tokens: int) -> Iterator[Case]:
    """With `tokens` rows, bfloat16."""
    yield _case("rope", tokens, QWEN3)
    yield _case("rope.qwen2_7b", tokens, QWEN2_7B)
    yield _case("rope.qk_norm", tokens, QWEN3, norm=True)
    yield _case("rope.qk_norm_gemma", tokens, GEMMA3_4B, norm=True, gemma=True)
