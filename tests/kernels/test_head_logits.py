"""fp32 logits of a 16-bit head: the sums are kept, not rounded to 16 bits."""

import pytest
import torch
from colora.kernels.head_logits import head_logits

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_the_exact_products_up_to_the_order_of_fp32_sums(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(7, 96).to(device, dtype), torch.randn(130, 96).to(device, dtype)
    exact = hidden.double() @ head.double().T
    logits = head_logits(hidden, head)
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-4  # logits of about 30, fp32 sums of 96 products


def test_rounding_first_is_what_a_plain_linear_does() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(7, 96).bfloat16(), torch.randn(130, 96).bfloat16()
    rounded = head_logits(hidden, head, fp32=False)
    assert torch.equal(rounded, torch.nn.functional.linear(hidden, head).float())
    assert (rounded - head_logits(hidden, head)).abs().max() > 1e-2
