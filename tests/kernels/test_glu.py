"""Gated linear units against their formulas and against finite differences, in double precision."""

import math

import pytest
import torch
from colora.kernels.glu import glu
from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh")


def random_gate_up(tokens: int = 5) -> Tensor:
    return 2 * torch.randn(tokens, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def written_out(gate_up: Tensor, activation: str) -> Tensor:
    """Swish (arXiv 1710.05941, eq. 1 with beta 1), or the tanh form of GELU (arXiv 1606.08415, section 2), times up."""
    gate, up = gate_up[:, :3], gate_up[:, 3:]
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


@pytest.mark.parametrize("tokens", [5, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_formula(activation: str, tokens: int) -> None:
    gate_up = random_gate_up(tokens)
    torch.testing.assert_close(glu(gate_up, activation), written_out(gate_up, activation), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str) -> None:
    assert torch.autograd.gradcheck(lambda gate_up: glu(gate_up, activation), random_gate_up().requires_grad_())


@pytest.mark.parametrize("column", [1, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_in_gate_or_up_is_nan_out(activation: str, column: int) -> None:
    gate_up = random_gate_up()
    gate_up[2, column] = torch.nan
    expected = torch.zeros(5, 3, dtype=torch.bool)
    expected[2, 1] = True
    assert torch.equal(glu(gate_up, activation).isnan(), expected)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown activation 'relu'; known: 'silu', 'gelu_tanh'"):
        glu(random_gate_up(), "relu")
