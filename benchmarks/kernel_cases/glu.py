"""SwiGLU and GeGLU over a fused gate_up."""

from collections.abc import Iterator

import torch
from colora.kernels.glu import glu, glu_reference
from torch import Tensor

from . import Case, Implementation

QWEN3_8B, QWEN3_4B, GEMMA3_4B = 12288, 9728, 10240


def _halves(gate_up: Tensor) -> tuple[Tensor, ...]:
    """Gate and up as tensors of their own, which is how Liger wants them."""
    return tuple(half.detach().contiguous().requires_grad_() for half in gate_up.chunk(2, dim=1))


def _case(figure: str, activation: str, tokens: int, width: int) -> Case:
    implementations = {
        "ours": Implementation(lambda gate_up: glu(gate_up, activation)),
        "reference": Implementation(lambda gate_up: glu_reference(gate_up, activation)),
    }
    try:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        theirs = LigerSiLUMulFunction if activation == "silu" else LigerGELUMulFunction
        implementations["liger"] = Implementation(theirs.apply, _halves)
    except ImportError:
        print("liger-kernel is not installed: no peer")
    gate_up = torch.randn(tokens, 2 * width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    elements = tokens * width
    return Case(figure, (gate_up,), implementations, 3 * 2 * elements, 5 * 2 * elements)


def cases(tokens: int) -> Iterator[Case]:
    """With `tokens` rows, bfloat16."""
    yield _case("glu", "silu", tokens, QWEN3_8B)
    yield _case("glu.4b", "silu", tokens, QWEN3_4B)
    yield _case("glu.gelu_tanh", "gelu_tanh", tokens, GEMMA3_4B)
