"""RMSNorm against its formula in double precision, and bit for bit against the two forms of transformers."""

from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from colora.kernels.rms_norm import AddRMSNorm, RMSNorm, add_rms_norm, rms_norm
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


def test_the_fused_add_is_an_add_and_a_norm() -> None:
    x, weight = random_inputs(4, 6)
    residual = x.flip(0) + 1
    normed, summed = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(summed, x + residual)
    assert torch.equal(normed, rms_norm(x + residual, weight, EPS))


def test_operands_that_are_not_alike_are_refused() -> None:
    x, weight = random_inputs(4, 6)
    with pytest.raises(ValueError, match=r"x is \(4, 6\) torch.float32 and residual \(1, 6\) torch.float32"):
        add_rms_norm(x, x[:1], weight, EPS)
    with pytest.raises(ValueError, match="residual .* torch.float16; they must be alike"):
        add_rms_norm(x, x.half(), weight, EPS)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU the kernels run in Triton's interpreter
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
SMALL = {
    "one_row": (1, 7),
    "odd": (5, 1001),
    "one_above_a_tile": (2, 2049),
    "no_power_of_two": (3, 2560),
    "one_above_the_rows_of_a_program": (17, 128),
    "three_dimensions": (4, 3, 96),
    "four_dimensions": (2, 2, 3, 8),
    "one_dimension": (33,),
}
LARGE = {
    "hidden": (4097, 4096),
    "gemma": (1025, 2560),
    "heads": (2049, 32, 128),
    "wide": (129, 12289),
    "very_wide": (17, 65536),
}


@dataclass
class Inputs:
    """What goes into the kernels, and the gradients of their outputs; no residual: the plain norm."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    one_plus_weight: bool
    grad_out: Tensor
    grad_summed: Tensor | None

    def run(self) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """norm, sum and the gradients of x and the residual, by the kernels."""
        leaves = [t.detach().requires_grad_() for t in (self.x, self.residual) if t is not None]
        if self.residual is None:
            out = RMSNorm.apply(*leaves, self.weight, EPS, self.one_plus_weight)
            return out.detach(), None, list(torch.autograd.grad(out, leaves, self.grad_out))
        out, summed = AddRMSNorm.apply(*leaves, self.weight, EPS, self.one_plus_weight)
        grads = torch.autograd.grad((out, summed), leaves, (self.grad_out, self.grad_summed))
        return out.detach(), summed.detach(), list(grads)


def make(shape: tuple[int, ...], dtype: torch.dtype, one_plus_weight: bool, add: bool) -> Inputs:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*size: int) -> Tensor:
        return (2 * torch.randn(size, generator=generator, device=DEVICE)).to(dtype)

    weight = random(shape[-1])
    more = (random(*shape), random(*shape)) if add else (None, None)
    return Inputs(random(*shape), more[0], weight, one_plus_weight, random(*shape), more[1])


def exact(inputs: Inputs, summed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """In double, from what is normalised: the norm, the gradient, and the size of what the gradient is a sum of."""
    x = (inputs.x if summed is None else summed).double().requires_grad_()
    out = formula(x, inputs.weight.double(), inputs.one_plus_weight)
    (grad,) = torch.autograd.grad(out, x, inputs.grad_out.double())
    if inputs.grad_summed is not None:
        grad = grad + inputs.grad_summed.double()
    rstd = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    scaled, normed = inputs.grad_out * (inputs.weight.double() + inputs.one_plus_weight), x * rstd
    size = rstd * (scaled.abs() + normed.abs() * (scaled * normed).abs().mean(-1, keepdim=True))
    return out.detach(), grad, size.detach()


def assert_within_the_bounds(inputs: Inputs) -> None:
    out, summed, grads = inputs.run()
    spacing = torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps  # of subnormal numbers, met in fp16
    unit = torch.finfo(out.dtype).eps / (2 if out.is_cuda else 1)  # Triton's interpreter cuts bf16 off
    if inputs.residual is not None:
        added = inputs.x.double() + inputs.residual.double()
        assert ((summed.double() - added).abs() <= unit * added.abs() + spacing).all()
        assert not out.is_cuda or torch.equal(summed, inputs.x + inputs.residual)
    expected, expected_grad, size = exact(inputs, summed)
    roundings = (1 if inputs.one_plus_weight else 2) * unit + 2**-20
    floor = spacing * (1 + (inputs.weight.double() + inputs.one_plus_weight).abs())
    assert ((out.double() - expected).abs() <= roundings * expected.abs() + floor).all()
    for grad in grads:
        assert ((grad.double() - expected_grad).abs() <= unit * expected_grad.abs() + 2**-18 * size + spacing).all()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("add", [False, True], ids=["norm", "add_norm"])
@pytest.mark.parametrize("one_plus_weight", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_kernels_within_the_stated_bounds(
    shape: tuple[int, ...], one_plus_weight: bool, add: bool, dtype: torch.dtype
) -> None:
    assert_within_the_bounds(make(shape, dtype, one_plus_weight, add))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("add", [False, True], ids=["norm", "add_norm"])
@pytest.mark.parametrize("one_plus_weight", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_kernels_on_a_gpu(shape: tuple[int, ...], one_plus_weight: bool, add: bool, dtype: torch.dtype) -> None:
    assert_within_the_bounds(make(shape, dtype, one_plus_weight, add))


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """The last row of over 2^31 elements is as it is alone."""
    one = make((1, 4096), torch.bfloat16, False, True)
    rows = 2**31 // 4096 + 2
    many = make((1, 4096), torch.bfloat16, False, True)
    for name in ("x", "residual", "grad_out", "grad_summed"):
        setattr(many, name, getattr(one, name).expand(rows, -1).contiguous())
    (out, summed, grads), (out_one, summed_one, grads_one) = many.run(), one.run()
    for ours, alone in ((out, out_one), (summed, summed_one), (grads[0], grads_one[0])):
        assert torch.equal(ours[-1], alone[0])


@needs_triton
@pytest.mark.parametrize("add", [False, True], ids=["norm", "add_norm"])
def test_rows_of_any_strides(add: bool) -> None:
    """Heads as slices of a fused projection, gradients as attention returns them."""
    inputs = make((5, 3, 8), torch.float32, False, add)
    expected = inputs.run()
    for name in ("x", "residual", "grad_summed") if add else ("x",):
        wide = torch.full((5, 7, 8), torch.nan, device=DEVICE)
        wide[:, 2:5] = getattr(inputs, name)
        setattr(inputs, name, wide[:, 2:5])
    inputs.grad_out = inputs.grad_out.permute(2, 1, 0).contiguous().permute(2, 1, 0)  # no two dimensions alike
    out, summed, grads = inputs.run()
    for ours, contiguous in zip((out, summed, *grads), (expected[0], expected[1], *expected[2]), strict=True):
        assert ours is contiguous is None or torch.equal(ours, contiguous)


@needs_triton
@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    out, summed, grads = make(shape, torch.float32, False, True).run()
    assert {t.shape for t in (out, summed, *grads)} == {shape}


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_kernels_pass_on_what_is_not_finite(bad: float, dtype: torch.dtype) -> None:
    inputs = make((6, 8), dtype, False, True)
    inputs.x[1, 3] = inputs.residual[2, 4] = inputs.grad_out[3, 5] = inputs.grad_summed[4, 6] = bad
    out, summed, grads = inputs.run()
    expected, expected_grad, _ = exact(inputs, summed)
    for ours, theirs in ((out, expected), (grads[0], expected_grad)):
        assert not theirs.isfinite().all()
        assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.equal(out.isnan(), expected.isnan())


@needs_triton
def test_an_output_that_nobody_used() -> None:
    inputs = make((3, 8), torch.float32, False, True)
    leaf = inputs.x.clone().requires_grad_()
    out, summed = AddRMSNorm.apply(leaf, inputs.residual, inputs.weight, EPS, False)
    (through_sum,) = torch.autograd.grad(summed, leaf, inputs.grad_summed, retain_graph=True)
    assert torch.equal(through_sum, inputs.grad_summed)
    (through_norm,) = torch.autograd.grad(out, leaf, inputs.grad_out)
    plain = RMSNorm.apply(total := (leaf + inputs.residual).detach().requires_grad_(), inputs.weight, EPS, False)
    assert torch.equal(through_norm, *torch.autograd.grad(plain, total, inputs.grad_out))


@pytest.mark.gpu
def test_a_weight_that_learns_takes_the_plain_path() -> None:
    x, weight = (t.cuda().requires_grad_() for t in random_inputs(4, 6))
    rms_norm(x, weight, EPS).sum().backward()
    assert weight.grad is not None and weight.grad.any()
