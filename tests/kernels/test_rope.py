"""Rotary embedding as what it is, a rotation in the complex plane, in double precision."""

import pytest
import torch
from colora.kernels.rope import apply_rope, rope_table
from torch import Tensor

HEAD_DIM = 8
FREQUENCIES = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def random_heads(tokens: int) -> Tensor:
    """(tokens, 3, HEAD_DIM) double."""
    return torch.randn(tokens, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rotated(x: Tensor, positions: Tensor, scaling: float) -> Tensor:
    """Dimensions i and i + HEAD_DIM / 2 as one complex number, turned by position * frequency."""
    half = HEAD_DIM // 2
    angles = positions[:, None, None].double() * FREQUENCIES.double()
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.full_like(angles, scaling), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("scaling", [1.0, 1.2])
@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 0, 1, 29], [5]])
def test_equals_a_complex_rotation(positions: list[int], scaling: float) -> None:
    where = torch.tensor(positions)
    x = random_heads(len(positions))
    cos, sin = rope_table(where, FREQUENCIES, scaling, torch.float64)
    assert cos.shape == sin.shape == (len(positions), HEAD_DIM)
    torch.testing.assert_close(apply_rope(x, cos, sin), rotated(x, where, scaling), rtol=0, atol=2e-5)


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = random_heads(2)
    scores = []
    for shift in (0, 11, 50):
        cos, sin = rope_table(torch.tensor([7 + shift, 3 + shift]), FREQUENCIES, 1.0, torch.float64)
        turned_q, turned_k = apply_rope(torch.stack((q, k)), cos, sin)
        scores.append((turned_q * turned_k).sum(-1))
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(scores[2], scores[0], rtol=0, atol=1e-4)


def test_gradients() -> None:
    cos, sin = rope_table(torch.arange(4), FREQUENCIES, 1.0, torch.float64)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin), random_heads(4).requires_grad_())


def test_far_positions_survive_half_precision() -> None:
    positions = torch.tensor([30_001, 131_071])  # neither is a bfloat16 number
    exact = positions[:, None].double() * FREQUENCIES.double()
    for table, expected in zip(
        rope_table(positions, FREQUENCIES, 1.0, torch.bfloat16), (exact.cos(), exact.sin()), strict=True
    ):
        assert table.dtype == torch.bfloat16
        # Angles in fp32 are right within 131071 * 2**-24 = 0.008, the table within 2**-9 of its value.
        torch.testing.assert_close(table.double(), torch.cat((expected, expected), -1), rtol=0, atol=0.01)


def test_nan_stays_in_its_pair() -> None:
    x = random_heads(3)
    x[1, 2, 1] = torch.nan
    out = apply_rope(x, *rope_table(torch.arange(3), FREQUENCIES, 1.0, torch.float64))
    assert out.isnan().nonzero().tolist() == [[1, 2, 1], [1, 2, 1 + HEAD_DIM // 2]]
