"""Products with a frozen matrix: an NF4 one gives what the decoded matrix gives, forward and backward, in any tiles."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from colora.kernels import frozen, nf4
from colora.kernels.frozen import frozen_linear
from colora.kernels.lora_add import LoraPart
from colora.kernels.lora_training import LoraTraining, lora_training_reference
from torch import Tensor

OUT, IN, TOKENS, RANK = 200, 320, 33, 4
PARTS = (
    LoraPart("a", slice(0, 120), slice(0, 120), slice(0, 4)),
    LoraPart("b", slice(120, 200), slice(120, 200), slice(4, 8)),
)
# Of the buffer: everything in one tile; tiles of 16 rows and of one block of columns at a time; less than that fits.
TILE_BYTES = {"one_tile": 2**20, "tiles": 200 * 64 * 4, "too_small": 100}


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=TILE_BYTES.values(), ids=TILE_BYTES)
def tile_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(frozen, "TILE_BYTES", request.param)
    monkeypatch.setattr(frozen, "_scratch", {})
    return int(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_and_its_gradient(tile_bytes: int, dtype: torch.dtype, biased: bool) -> None:
    stored = nf4.quantize(randn(OUT, IN, seed=0))
    decoded = nf4.dequantize(stored, dtype)
    bias = randn(OUT, seed=1, dtype=dtype) if biased else None
    grad, results = randn(3, 11, OUT, seed=2, dtype=dtype), []
    for weight in (stored, decoded):
        x = randn(3, 11, IN, seed=3, dtype=dtype).requires_grad_()
        y = frozen_linear(x, weight, bias)
        y.backward(grad)
        results.append((y.detach(), x.grad))
    tolerance = 1e-4 if dtype == torch.float32 else 0.2  # sums of 320 products of numbers around 1; one rounding
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == dtype and ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


def lora_operands(weight: frozen.FrozenWeight) -> tuple[Any, ...]:
    slot_a, slot_b = randn(2 * RANK, IN, seed=4) / 18, randn(OUT, RANK, seed=5)
    masters = slot_a.clone().requires_grad_(), (slot_b / 2).requires_grad_()
    return weight, randn(OUT, seed=6), slot_a, slot_b, *masters, 2.0, PARTS


@pytest.mark.parametrize("path", [LoraTraining.apply, lora_training_reference], ids=["kernel", "reference"])
def test_with_an_adapter(tile_bytes: int, path: Callable[..., Tensor]) -> None:
    stored = nf4.quantize(randn(OUT, IN, seed=0))
    results = []
    for weight in (stored, nf4.dequantize(stored, torch.float32)):
        x, operands = randn(TOKENS, IN, seed=3).requires_grad_(), lora_operands(weight)
        y = path(x, *operands)
        y.backward(randn(TOKENS, OUT, seed=7))
        results.append((y.detach(), x.grad, operands[4].grad, operands[5].grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)


def test_without_a_gradient_for_the_input() -> None:
    x = randn(TOKENS, IN, seed=3)
    operands = lora_operands(nf4.quantize(randn(OUT, IN, seed=0)))
    lora_training_reference(x, *operands).sum().backward()
    assert operands[4].grad is not None and x.grad is None


def test_one_buffer_serves_every_matrix_and_inference_leaves_it_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "_scratch", {})
    stored = [nf4.quantize(randn(OUT, IN, seed=seed)) for seed in (0, 1)]
    with torch.inference_mode():
        frozen_linear(randn(TOKENS, IN, seed=3), stored[0])
    (buffer,) = frozen._scratch.values()
    x = randn(TOKENS, IN, seed=3).requires_grad_()
    (frozen_linear(x, stored[0]) + frozen_linear(x, stored[1])).sum().backward()
    assert frozen._scratch == {torch.device("cpu"): buffer} and not buffer.is_inference()
    assert buffer.nbytes == frozen.TILE_BYTES
