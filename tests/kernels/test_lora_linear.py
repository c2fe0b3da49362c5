"""The engine's fused linear against the merged weight, and as an operator that compilers can trace."""

import pytest
import torch
from colora.kernels.lora_add import LoraPart
from colora.kernels.lora_linear import PartOffsets, lora_linear
from torch import Tensor

PARTS = (
    LoraPart("q_proj", slice(0, 6), slice(0, 6), slice(0, 2)),
    LoraPart("v_proj", slice(10, 12), slice(6, 8), slice(2, 4)),
)


def case(dtype: torch.dtype, *leading: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, A, B of a fused projection of 12 rows, of which q and v are adapted."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*leading, 8), (12, 8), (12,), (4, 8), (8, 2))
    x, weight, bias, a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight, bias, a, b


def merged(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    total = weight.double()
    for part in PARTS:
        total[part.out] += b[part.b].double() @ a[part.a].double()
    return total


@pytest.mark.parametrize("leading", [(7,), (2, 3), (1,), (0,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_merged_weight(
    leading: tuple[int, ...], dtype: torch.dtype, tolerance: float, with_bias: bool
) -> None:
    x, weight, bias, a, b = case(dtype, *leading)
    used = bias if with_bias else None
    y = lora_linear(x, weight, used, a, b, PartOffsets(PARTS))
    expected = x.double() @ merged(weight, a, b).T + (bias.double() if with_bias else 0)
    assert y.shape == (*leading, 12) and y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


def test_is_a_well_formed_operator() -> None:
    x, weight, bias, a, b = case(torch.float32, 2, 3)
    offsets = PartOffsets(PARTS)
    lists = (offsets.out_starts, offsets.out_stops, offsets.a_starts, offsets.b_starts)
    torch.library.opcheck(torch.ops.colora.lora_linear.default, (x, weight, bias, a, b, None, *lists))
    torch.library.opcheck(torch.ops.colora.lora_linear.default, (x, weight, None, a, b, None, *lists))


def test_reads_the_slots_anew_at_every_call() -> None:
    x, weight, _, a, b = case(torch.float32, 5)
    offsets = PartOffsets(PARTS)
    before = lora_linear(x, weight, None, a, b, offsets)
    b.mul_(2)
    twice = lora_linear(x, weight, None, a, b, offsets)
    base = x @ weight.T
    torch.testing.assert_close(twice - base, 2 * (before - base))
