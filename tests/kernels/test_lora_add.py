"""The low-rank update, in place, against the dense matrices it stands for and against finite differences."""

import pytest
import torch
from colora.kernels.lora_add import LoraPart, lora_add_
from torch import Tensor

IN, OUT, RANK, SCALE = 6, 12, 2, 1.5
# Two adapted outputs of a fused projection of three: rows 0-4 and 7-11; the one between has no adapter.
PARTS = (
    LoraPart("q_proj", out=slice(0, 5), b=slice(0, 5), a=slice(0, 2)),
    LoraPart("v_proj", out=slice(7, 12), b=slice(5, 10), a=slice(2, 4)),
)


def random_inputs(tokens: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (tokens, OUT), x (tokens, IN), masters A (4, IN) and B (10, RANK)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, OUT), (tokens, IN), (2 * RANK, IN), (10, RANK))
    y, x, a, b = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return y, x, a, b


def with_slots(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The op, its slots cast from the masters as `publish` does it."""
    return lora_add_(y.clone(), x, a.detach(), b.detach() * SCALE, a, b, SCALE, PARTS)


def dense_update(a: Tensor, b: Tensor) -> Tensor:
    """(OUT, IN): scale B A of each adapted output, zero between."""
    zero = torch.zeros(2, IN, dtype=a.dtype)
    return SCALE * torch.cat([b[:5] @ a[:2], zero, b[5:] @ a[2:]])


@pytest.mark.parametrize("tokens", [4, 1])
def test_equals_the_dense_matrices(tokens: int) -> None:
    y, x, a, b = random_inputs(tokens)
    torch.testing.assert_close(with_slots(y, x, a, b), y + x @ dense_update(a, b).T, rtol=1e-12, atol=1e-12)


def test_gradients() -> None:
    inputs = [tensor.requires_grad_() for tensor in random_inputs()]
    # The masters' gradients are rounded to fp32 on their way.
    assert torch.autograd.gradcheck(with_slots, inputs, atol=1e-5)


def test_masters_get_float32_gradients_of_half_precision_slots() -> None:
    y, x, _, _ = random_inputs(dtype=torch.bfloat16)
    _, _, a, b = (tensor.requires_grad_() for tensor in random_inputs(dtype=torch.float32))
    slot_a, slot_b = a.detach().bfloat16(), (b.detach() * SCALE).bfloat16()
    lora_add_(y, x, slot_a, slot_b, a, b, SCALE, PARTS).sum().backward()

    plain_a, plain_b = (tensor.detach().double().requires_grad_() for tensor in (slot_a, slot_b / SCALE))
    (x.double() @ dense_update(plain_a, plain_b).T).sum().backward()
    for master, plain in ((a, plain_a), (b, plain_b)):
        assert master.grad is not None and plain.grad is not None
        assert master.grad.dtype == torch.float32
        torch.testing.assert_close(master.grad.double(), plain.grad, rtol=0.03, atol=0.03)


def test_works_in_place_and_leaves_the_unadapted_rows_alone() -> None:
    y, x, a, b = random_inputs()
    before = y.clone()
    out = lora_add_(y, x, a, b * SCALE, a, b, SCALE, PARTS)
    assert out.data_ptr() == y.data_ptr()
    assert torch.equal(y[:, 5:7], before[:, 5:7])
    assert not torch.isclose(y[:, :5], before[:, :5]).any()


@pytest.mark.parametrize("name", ["y", "x", "a", "b"])
def test_nan_in_is_nan_out(name: str) -> None:
    inputs = dict(zip(("y", "x", "a", "b"), random_inputs(), strict=True))
    inputs[name][1, 1] = torch.nan
    where = {
        "y": (slice(1, 2), slice(1, 2)),
        "x": (slice(1, 2), [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]),  # one token, every adapted output
        "a": (slice(None), slice(0, 5)),  # every token, the outputs of q_proj
        "b": (slice(None), slice(1, 2)),  # every token, one output
    }
    expected = torch.zeros(4, OUT, dtype=torch.bool)
    expected[where[name]] = True
    assert torch.equal(with_slots(**inputs).isnan(), expected)
