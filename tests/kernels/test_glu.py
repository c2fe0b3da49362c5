"""Gated linear units against their formulas and against finite differences, in double precision."""

import math
from importlib.util import find_spec

import pytest
import torch
from colora.kernels.glu import GLU, glu
from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh")


def random_gate_up(tokens: int = 5) -> Tensor:
    return 2 * torch.randn(tokens, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def written_out(gate_up: Tensor, activation: str) -> Tensor:
    """Swish (arXiv 1710.05941, eq. 1 with beta 1), or the tanh form of GELU (arXiv 1606.08415, section 2), times up."""
    gate, up = gate_up.tensor_split(2, dim=1)
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


def test_columns_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gate_up \(5, 5\) does not split"):
        glu(random_gate_up()[:, :5], "silu")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU the kernels run in Triton's interpreter
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
SMALL = {"one_token": (1, 3), "odd": (5, 999), "one_tile": (2, 2048), "one_above_a_tile": (3, 2049), "two": (2, 4096)}
LARGE = {"qwen3-4b": (1025, 9728), "qwen3-8b": (4097, 12288), "odd": (513, 10001)}


def make(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gate_up (tokens, 2 * width), and the gradient of the output."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    gate_up = 3 * torch.randn(shape[0], 2 * shape[1], generator=generator, device=DEVICE)
    return gate_up.to(dtype), torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def run(gate_up: Tensor, activation: str, grad_out: Tensor, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Output and gradient, by the kernels."""
    leaf = gate_up.detach().clone().requires_grad_()
    out = GLU.apply(leaf * 1, activation, overwrite)
    out.backward(grad_out)
    return out.detach(), leaf.grad


def exact(gate_up: Tensor, activation: str, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    leaf = gate_up.double().requires_grad_()
    out = written_out(leaf, activation)
    out.backward(grad_out.double())
    return out.detach(), leaf.grad


def assert_within_the_bounds(gate_up: Tensor, activation: str, grad_out: Tensor) -> None:
    out, grad = run(gate_up, activation, grad_out)
    expected, expected_grad = exact(gate_up, activation, grad_out)
    unit = torch.finfo(out.dtype).eps / (2 if out.is_cuda else 1)  # Triton's interpreter cuts bf16 off
    # Below 2^-126 the card flushes, and so far down (1 + tanh) of the formula cancels in double as well. Subnormal
    # numbers of fp16 lie this far apart:
    spacing = max(torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps, 1e-12)
    up, grad_out_size = gate_up[:, grad_out.shape[1] :].double().abs(), grad_out.double().abs()
    assert ((out.double() - expected).abs() <= (2 * unit + 2**-18) * expected.abs() + spacing * (1 + up)).all()
    size = grad_out_size * up
    (grad_gate, grad_up), (expected_gate, expected_up) = (t.chunk(2, dim=1) for t in (grad.double(), expected_grad))
    assert (
        (grad_up - expected_up).abs() <= (2 * unit + 2**-18) * expected_up.abs() + spacing * (1 + grad_out_size)
    ).all()
    assert ((grad_gate - expected_gate).abs() <= unit * expected_gate.abs() + 2**-18 * size + spacing).all()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_kernels_within_the_stated_bounds(shape: tuple[int, int], activation: str, dtype: torch.dtype) -> None:
    gate_up, grad_out = make(shape, dtype)
    assert_within_the_bounds(gate_up, activation, grad_out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_kernels_on_a_gpu(shape: tuple[int, int], activation: str, dtype: torch.dtype) -> None:
    gate_up, grad_out = make(shape, dtype)
    assert_within_the_bounds(gate_up, activation, grad_out)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """The last token of over 2^31 elements is as it is alone; the gradient is written in place to save memory."""
    gate_up, grad_out = make((1, 12288), torch.bfloat16)
    tokens = 2**31 // gate_up.shape[1] + 2
    out, grad = run(gate_up.expand(tokens, -1), "silu", grad_out.expand(tokens, -1).contiguous(), overwrite=True)
    alone, grad_alone = run(gate_up, "silu", grad_out)
    assert torch.equal(out[-1], alone[0]) and torch.equal(grad[-1], grad_alone[0])


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_overwriting_gives_the_same_and_is_heard_of(activation: str) -> None:
    gate_up, grad_out = make((3, 40), torch.float32)
    leaf = gate_up.clone().requires_grad_()
    product = leaf * 1
    out = GLU.apply(product, activation, True)
    (grad,) = torch.autograd.grad(out, product, grad_out, retain_graph=True)
    assert grad.data_ptr() == product.data_ptr()
    assert torch.equal(grad, run(gate_up, activation, grad_out)[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, product, grad_out)


@needs_triton
def test_kept_inputs_survive_backward() -> None:
    gate_up, grad_out = make((3, 40), torch.float32)
    leaf = gate_up.clone().requires_grad_()
    out = GLU.apply(leaf, "silu", False)
    first, second = (torch.autograd.grad(out, leaf, grad_out, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(leaf, gate_up)


@needs_triton
def test_rows_of_any_strides() -> None:
    gate_up, grad_out = make((4, 24), torch.float32)
    expected = run(gate_up, "silu", grad_out)
    wide = torch.full((4, 60), torch.nan, device=DEVICE)
    wide[:, 5:53] = gate_up
    for strided in (wide[:, 5:53], gate_up.T.contiguous().T):
        leaf = strided.detach().requires_grad_()
        out = GLU.apply(leaf, "silu", False)
        (grad,) = torch.autograd.grad(out, leaf, grad_out.T.contiguous().T)
        assert torch.equal(out, expected[0]) and torch.equal(grad, expected[1])


@needs_triton
def test_no_tokens() -> None:
    out, grad = run(*make((0, 8), torch.float32)[:1], "silu", make((0, 8), torch.float32)[1])
    assert out.shape == (0, 8) and grad.shape == (0, 16)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38, -3e38])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_pass_on_what_is_not_finite(activation: str, bad: float, dtype: torch.dtype) -> None:
    gate_up, grad_out = make((4, 8), dtype)
    gate_up[1, 3] = gate_up[2, 8 + 5] = grad_out[3, 6] = bad
    leaf = gate_up.clone().requires_grad_()
    expected = glu(leaf.cpu(), activation)
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad_out.cpu().to(expected.device))
    out, grad = run(gate_up, activation, grad_out)
    for ours, theirs in ((out, expected), (grad, expected_grad)):
        assert torch.equal(ours.isfinite().cpu(), theirs.isfinite().cpu())
