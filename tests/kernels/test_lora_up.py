"""The kernel against the plain formulation, on the card."""

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

CASES = {
    "qkv_with_bias": (5, (192, 64, 64), 96, 16, (0, 1, 2), True),
    "one_of_two_parts": (1, (128, 128), 256, 8, (1,), False),
    "q_and_v": (33, (128, 64, 64), 64, 32, (0, 2), False),
    "prefill": (700, (256,), 130, 16, (0,), True),
    "odd_rank": (17, (64, 64), 64, 5, (0, 1), False),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_separate_products(case: tuple, dtype: torch.dtype) -> None:
    from colora.kernels.lora_add import LoraPart
    from colora.kernels.lora_linear import PartOffsets, lora_linear

    rows, outs, in_features, rank, adapted, with_bias = case
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda", generator=generator) * scale).to(dtype)

    parts, b_rows = [], 0
    for index, part in enumerate(adapted):
        start = sum(outs[:part])
        rank_rows = slice(index * rank, (index + 1) * rank)
        parts.append(LoraPart("", slice(start, start + outs[part]), slice(b_rows, b_rows + outs[part]), rank_rows))
        b_rows += outs[part]
    out = sum(outs)
    stacked = random(out + len(adapted) * rank, in_features, scale=0.1)
    x, b, bias = random(rows, in_features, scale=1.0), random(b_rows, rank, scale=0.3), random(out, scale=1.0)
    operands = (stacked[:out], bias if with_bias else None, stacked[out:], b, PartOffsets(tuple(parts)))
    ours = lora_linear(x, *operands, stacked)
    exact = lora_linear(x.double(), *(t.double() if isinstance(t, torch.Tensor) else t for t in operands))
    assert (ours.double() - exact).norm() / exact.norm() < (5e-3 if dtype == torch.bfloat16 else 7e-4)
