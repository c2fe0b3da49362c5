"""RMSNorm against its formula in double precision, and bit for bit against the two forms of transformers."""

import pytest
import torch
from colora.kernels.rms_norm import rms_norm
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

EPS = 1e-5


def random_inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x (*shape), weight (shape[-1],)."""
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(shape, generator=generator).to(dtype), torch.randn(shape[-1], generator=generator).to(dtype)


def formula(x: Tensor, weight: Tensor, one_plus_weight: bool) -> Tensor:
    """a / RMS(a) g, arXiv 1910.07467, eq. 4, with eps under the root."""
    gain = weight + 1 if one_plus_weight else weight
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt() * gain


@pytest.mark.parametrize("one_plus_weight", [False, True])
@pytest.mark.parametrize("shape", [(5, 12), (1, 7), (4, 3, 8)])
def test_equals_the_formula_and_its_gradients(shape: tuple[int, ...], one_plus_weight: bool) -> None:
    inputs = [tensor.requires_grad_() for tensor in random_inputs(*shape)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, expected = rms_norm(*inputs, EPS, one_plus_weight), formula(*exact, one_plus_weight)
    factors = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    (out * factors).sum().backward()
    (expected * factors).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for tensor, reference in zip(inputs, exact, strict=True):
        assert tensor.grad is not None and reference.grad is not None
        torch.testing.assert_close(tensor.grad.double(), reference.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("theirs", "one_plus_weight"), [(LlamaRMSNorm, False), (Gemma3RMSNorm, True)])
def test_rounds_as_transformers_does(theirs: type[torch.nn.Module], one_plus_weight: bool) -> None:
    x, weight = random_inputs(64, 96, dtype=torch.bfloat16)
    norm = theirs(96, eps=EPS).bfloat16()
    norm.load_state_dict({"weight": weight})
    assert torch.equal(rms_norm(x, weight, EPS, one_plus_weight), norm(x))


def test_squares_beyond_the_range_of_half_precision() -> None:
    x = torch.full((1, 16), 3e4, dtype=torch.float16)  # the square is 9e8, the largest float16 65504
    assert torch.equal(rms_norm(x, torch.ones(16, dtype=torch.float16), EPS), torch.ones_like(x))


@pytest.mark.parametrize("one_plus_weight", [False, True])
def test_nan_fills_its_row(one_plus_weight: bool) -> None:
    x, weight = random_inputs(4, 6)
    x[2, 3] = torch.nan
    nan = rms_norm(x, weight, EPS, one_plus_weight).isnan()
    assert nan.all(-1).tolist() == nan.any(-1).tolist() == [False, False, True, False]


def test_a_row_of_zeros_stays_zero() -> None:
    _, weight = random_inputs(4, 6)
    assert torch.equal(rms_norm(torch.zeros(1, 6), weight, EPS), torch.zeros(1, 6))
