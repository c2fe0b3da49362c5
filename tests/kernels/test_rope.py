"""Rotary embedding as what it is, a rotation in the complex plane, and the kernels against it in double precision."""

from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch
from colora.kernels.rope import QKNorm, RotateQKV, apply_rope, rope_table, rotate_qkv, rotate_qkv_reference
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


@dataclass(frozen=True)
class Shape:
    """A fused projection."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def columns(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


SHAPES = {
    "llama": Shape(3, 8, 2, 64),
    "phi": Shape(2, 4, 4, 80),
    "odd_heads": Shape(2, 7, 1, 96),
    "qwen": Shape(3, 16, 8, 128),
    "gemma": Shape(2, 4, 1, 256),
    "above_a_tile": Shape(1, 17, 17, 128),
}
LARGE = {
    "qwen3-8b": Shape(4097, 32, 8, 128),
    "qwen2-7b": Shape(1025, 28, 4, 128),
    "gemma3-4b": Shape(1025, 8, 4, 256),
    "offsets_beyond_int32": Shape(360_000, 32, 8, 128),
}
NORMS = {"no_norm": None, "norm": False, "norm_of_gemma": True}  # the value: weights as 1 + w
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU the kernels run in Triton's interpreter
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


@dataclass
class Inputs:
    """A projection, its tables and norms, and the gradients that come back from attention."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    norm: QKNorm | None
    grads: tuple[Tensor, Tensor, Tensor]


def make(shape: Shape, dtype: torch.dtype, one_plus_weight: bool | None, device: str = DEVICE) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    positions = torch.arange(shape.tokens, device=device) * 7 + 1
    frequencies = 10000.0 ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
    norm = None
    if one_plus_weight is not None:
        norm = QKNorm(random(shape.head_dim), random(shape.head_dim), 1e-6, one_plus_weight)
    # As attention returns them: q's heads before its tokens, k's tokens before its heads, v's one for all tokens.
    grads = (
        random(shape.heads, shape.tokens, shape.head_dim).transpose(0, 1),
        random(shape.tokens, shape.kv_heads, shape.head_dim),
        random(1, shape.kv_heads, shape.head_dim).expand(shape.tokens, -1, -1),
    )
    return Inputs(random(shape.tokens, shape.columns), *rope_table(positions, frequencies, 1.2, dtype), norm, grads)


@dataclass
class Exact:
    """What double precision gives: the rotated heads of q and k (tokens, heads + kv_heads, head_dim), the gradient of
    the projection (tokens, all heads, head_dim), and the bounds on both but for the last rounding."""

    turned: Tensor
    grad: Tensor
    turned_slack: Tensor
    grad_slack: Tensor


def exact(inputs: Inputs, shape: Shape) -> Exact:
    rows = inputs.qkv.double().view(shape.tokens, -1, shape.head_dim).requires_grad_()
    rotary = shape.heads + shape.kv_heads
    both = rows[:, :rotary]
    inverse_rms, weight = torch.ones_like(both), torch.ones_like(both)
    if inputs.norm is not None:
        weights = [inputs.norm.q_weight] * shape.heads + [inputs.norm.k_weight] * shape.kv_heads
        weight = torch.stack(weights).double() + (1.0 if inputs.norm.one_plus_weight else 0.0)
        inverse_rms = (both.square().mean(-1, keepdim=True) + inputs.norm.eps).rsqrt()
    normed = both * inverse_rms
    scaled = normed * weight
    turned = apply_rope(scaled, inputs.cos.double(), inputs.sin.double())
    incoming = torch.cat(inputs.grads[:2], 1).double()
    (at_scaled,) = torch.autograd.grad(turned, scaled, incoming, retain_graph=True)
    torch.autograd.backward([turned, rows[:, rotary:]], [incoming, inputs.grads[2].double()])
    if inputs.norm is None:
        grad_slack = 2**-20 * pair_size(incoming)
    else:
        pairs, size = pair_size(at_scaled * weight), normed.abs()
        grad_slack = 2**-18 * inverse_rms * (pairs + size * (pairs * size).mean(-1, keepdim=True))
    return Exact(turned.detach(), rows.grad, 2**-20 * pair_size(scaled.detach()), grad_slack.detach())


def pair_size(x: Tensor) -> Tensor:
    """|a| + |b| of every rotated pair, for both of its places."""
    low, high = x.abs().chunk(2, -1)
    return torch.cat((low + high, low + high), -1)


def run(inputs: Inputs, shape: Shape) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The kernels' q, k, v and the gradient of the projection."""
    leaf = inputs.qkv.clone().requires_grad_()
    out = RotateQKV.apply(leaf * 1, inputs.cos, inputs.sin, shape.heads, shape.kv_heads, inputs.norm)
    torch.autograd.backward(out, inputs.grads)
    return tuple(t.detach() for t in out), leaf.grad


def assert_within_the_bounds(inputs: Inputs, shape: Shape) -> None:
    (q, k, v), grad = run(inputs, shape)
    expected = exact(inputs, shape)
    unit = torch.finfo(inputs.qkv.dtype).eps / (2 if inputs.qkv.is_cuda else 1)  # Triton's interpreter cuts bf16 off
    spacing = torch.finfo(q.dtype).smallest_normal * torch.finfo(q.dtype).eps  # of subnormal numbers, met in fp16
    error = (torch.cat((q, k), 1).double() - expected.turned).abs()
    assert (error <= unit * expected.turned.abs() + expected.turned_slack + spacing).all()
    rotary = shape.heads + shape.kv_heads
    error = (grad.view_as(expected.grad).double() - expected.grad).abs()[:, :rotary]
    assert (error <= unit * expected.grad[:, :rotary].abs() + expected.grad_slack + spacing).all()
    assert torch.equal(v, inputs.qkv.view_as(expected.grad)[:, rotary:])
    assert torch.equal(grad.view_as(expected.grad)[:, rotary:], inputs.grads[2])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("one_plus_weight", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_within_the_stated_bounds(shape: Shape, one_plus_weight: bool | None, dtype: torch.dtype) -> None:
    assert_within_the_bounds(make(shape, dtype, one_plus_weight), shape)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("one_plus_weight", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("shape", [LARGE[name] for name in list(LARGE)[:3]], ids=list(LARGE)[:3])
def test_kernels_on_a_gpu(shape: Shape, one_plus_weight: bool | None, dtype: torch.dtype) -> None:
    assert_within_the_bounds(make(shape, dtype, one_plus_weight), shape)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """The last token of a projection of over 2^31 elements is as it is alone."""
    shape = LARGE["offsets_beyond_int32"]
    one = make(replace(shape, tokens=1), torch.bfloat16, False)
    many = make(replace(shape, tokens=1), torch.bfloat16, False)
    many.qkv, many.cos, many.sin = (t.expand(shape.tokens, -1).contiguous() for t in (one.qkv, one.cos, one.sin))
    many.grads = tuple(t.expand(shape.tokens, -1, -1) for t in one.grads)
    assert many.qkv.numel() > 2**31
    (q, k, v), grad = run(many, shape)
    (q_one, k_one, v_one), grad_one = run(one, replace(shape, tokens=1))
    for ours, alone in ((q, q_one), (k, k_one), (v, v_one), (grad, grad_one)):
        assert torch.equal(ours[-1], alone[0])


@needs_triton
@pytest.mark.parametrize("one_plus_weight", NORMS.values(), ids=NORMS)
def test_reference_equals_the_kernels_in_fp32(one_plus_weight: bool | None) -> None:
    shape = SHAPES["llama"]
    inputs = make(shape, torch.float32, one_plus_weight)
    leaf = inputs.qkv.clone().requires_grad_()
    expected = rotate_qkv_reference(leaf, inputs.cos, inputs.sin, shape.heads, shape.kv_heads, inputs.norm)
    torch.autograd.backward(expected, inputs.grads)
    out, grad = run(inputs, shape)
    for ours, theirs in zip((*out, grad), (*expected, leaf.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("one_plus_weight", NORMS.values(), ids=NORMS)
def test_no_tokens(one_plus_weight: bool | None) -> None:
    shape = replace(SHAPES["llama"], tokens=0)
    (q, k, v), grad = run(make(shape, torch.float32, one_plus_weight), shape)
    assert q.shape == (0, 8, 64) and k.shape == v.shape == (0, 2, 64) and grad.shape == (0, shape.columns)


@needs_triton
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("one_plus_weight", NORMS.values(), ids=NORMS)
def test_kernels_pass_on_what_is_not_finite(one_plus_weight: bool | None, bad: float) -> None:
    shape = SHAPES["llama"]
    inputs = make(shape, torch.float32, one_plus_weight)
    inputs.qkv[1, 64 * 3 + 5] = bad  # q, head 3
    inputs.qkv[2, 64 * 11 + 9] = bad  # v, head 1
    inputs.grads[1][0, 1, 40] = bad
    (q, k, v), grad = run(inputs, shape)
    expected = exact(inputs, shape)
    assert not expected.turned.isfinite().all() and not expected.grad.isfinite().all()
    for ours, theirs in ((torch.cat((q, k), 1), expected.turned), (grad.view_as(expected.grad), expected.grad)):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.equal(torch.cat((q, k), 1).isnan(), expected.turned.isnan())
    assert v.isfinite().logical_not().nonzero().tolist() == [[2, 1, 9]]


@needs_triton
def test_without_a_norm_the_rotation_is_in_place_and_heard_of() -> None:
    shape = SHAPES["llama"]
    inputs = make(shape, torch.float32, None)
    leaf = inputs.qkv.clone().requires_grad_()
    projection = leaf * 1
    squares = projection.square()  # keeps the projection for its backward pass
    q, k, v = RotateQKV.apply(projection, inputs.cos, inputs.sin, shape.heads, shape.kv_heads, None)
    assert {t.untyped_storage().data_ptr() for t in (q, k, v)} == {projection.untyped_storage().data_ptr()}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()


@needs_triton
def test_unused_outputs_and_odd_strides() -> None:
    shape = SHAPES["llama"]
    inputs = make(shape, torch.float32, False)
    wide = torch.stack((inputs.qkv, inputs.qkv), -1).requires_grad_()
    q, _, _ = RotateQKV.apply(wide[..., 0], inputs.cos, inputs.sin, shape.heads, shape.kv_heads, inputs.norm)
    q.backward(inputs.grads[0].contiguous().transpose(1, 2).contiguous().transpose(1, 2))
    inputs.grads = (inputs.grads[0], torch.zeros_like(inputs.grads[1]), torch.zeros_like(inputs.grads[2]))
    expected = exact(inputs, shape).grad.flatten(1)
    torch.testing.assert_close(wide.grad[..., 0].double(), expected, rtol=0, atol=1e-5)


def test_what_does_not_belong_together_is_refused() -> None:
    inputs = make(SHAPES["llama"], torch.float32, False, "cpu")
    with pytest.raises(ValueError, match=r"shape \(3, 768\) is not one of 8 query and 4 key-value heads.*\(3, 64\)"):
        rotate_qkv(inputs.qkv, inputs.cos, inputs.sin, 8, 4)
    with pytest.raises(ValueError, match="is not one of 8 query"):
        rotate_qkv(inputs.qkv[:2], inputs.cos, inputs.sin, 8, 2)
    short = QKNorm(inputs.norm.q_weight, inputs.norm.k_weight[:32], 1e-6)
    with pytest.raises(ValueError, match=r"the k norm has \(32,\) weights, head_dim is 64"):
        rotate_qkv(inputs.qkv, inputs.cos, inputs.sin, 8, 2, short)
