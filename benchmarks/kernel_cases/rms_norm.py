"""RMSNorm of hidden states and of heads, Gemma's form, and the norm after a residual add."""

from collections.abc import Iterator
from functools import partial

import torch
from colora.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from torch import Tensor

from . import Case, Implementation

EPS = 1e-6
HIDDEN, GEMMA_HIDDEN = 4096, 2560
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _add_reference(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return rms_norm_reference(summed, weight, EPS), summed


def _norm(figure: str, x: Tensor, gemma: bool = False) -> Case:
    functions = {
        "ours": partial(rms_norm, eps=EPS, one_plus_weight=gemma),
        "reference": partial(rms_norm_reference, eps=EPS, one_plus_weight=gemma),
    }
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        mode = (1.0, "gemma") if gemma else (0.0, "llama")
        functions["liger"] = lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, *mode)
    except ImportError:
        print("liger-kernel is not installed: no peer")
    implementations = {name: Implementation(function) for name, function in functions.items()}
    inputs = (x.requires_grad_(), _random(x.shape[-1]))
    return Case(figure, inputs, implementations, 2 * 2 * x.numel(), 3 * 2 * x.numel())


def _add_norm(tokens: int) -> Case:
    functions = {"ours": partial(add_rms_norm, eps=EPS), "reference": _add_reference}
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        functions["liger"] = lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS)
    except ImportError:
        print("liger-kernel is not installed: no peer")
    implementations = {name: Implementation(function) for name, function in functions.items()}
    x, residual = (_random(tokens, HIDDEN).requires_grad_() for _ in range(2))
    moved = 4 * 2 * x.numel()
    return Case("rms_norm.add", (x, residual, _random(HIDDEN)), implementations, moved, moved)


def cases(tokens: int) -> Iterator[Case]:
    """With `tokens` rows, bfloat16."""
    yield _norm("rms_norm", _random(tokens, HIDDEN))
    yield _add_norm(tokens)
    yield _norm("rms_norm.gemma", _random(tokens, GEMMA_HIDDEN), gemma=True)
    yield _norm("rms_norm.heads", _random(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM)[:, :HEADS])
