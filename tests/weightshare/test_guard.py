"""The parity guard: figures against hand-made cases, limits, and storage that is not shared."""

import math

import pytest
import torch
from colora.rl.families import block_spec, model_layout
from colora.weightshare.adapter import Adapter
from colora.weightshare.guard import DEFAULT_LIMITS, ParityError, ParityGuard, check_storage
from colora.weightshare.weights import SharedWeights
from torch import Tensor

from ..models import random_lora, tiny_configs


def test_figures() -> None:
    trainer, engine = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.2, -2.0, -2.7])
    report = ParityGuard(1.0, torch.bfloat16).observe(4, engine, trainer)
    ratios = [math.exp(0.2), 1.0, math.exp(-0.3)]
    assert report.tokens == 3
    assert report.mean_abs == pytest.approx(0.5 / 3, rel=1e-5)
    assert report.max_abs == pytest.approx(0.3, rel=1e-5)
    assert report.ratio_mean == pytest.approx(sum(ratios) / 3, rel=1e-5)
    assert report.k3 == pytest.approx((ratios[0] - 1.2 + ratios[2] - 0.7) / 3, rel=1e-5)
    assert report.metrics()["parity/k3"] == report.k3


def test_k3_estimates_the_kl_divergence_of_the_engine_from_the_trainer() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 50, generator=generator)
    engine, trainer = (logits[0].log_softmax(-1), (logits[0] + 0.2 * logits[1]).log_softmax(-1))
    tokens = torch.multinomial(engine.exp(), 200_000, replacement=True, generator=generator)
    exact = (engine.exp() * (engine - trainer)).sum().item()
    report = ParityGuard(1.0, torch.float32).observe(1, engine[tokens], trainer[tokens])
    assert report.k3 == pytest.approx(exact, rel=0.02)
    assert report.ratio_mean == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize(("dtype", "limit"), DEFAULT_LIMITS.items())
def test_default_limits_by_dtype(dtype: torch.dtype, limit: float) -> None:
    guard, engine = ParityGuard(None, dtype), torch.full((10,), -2.0)
    guard.observe(1, engine, engine + 0.9 * limit)
    with pytest.raises(ParityError, match=r"step 7: .* is over the limit"):
        guard.observe(7, engine, engine - 1.1 * limit)


def test_one_bad_token_in_many_is_no_reason_to_stop_and_the_message_says_what_to_check() -> None:
    guard, engine = ParityGuard(None, torch.bfloat16), torch.full((1000,), -1.0)
    trainer = engine.clone()
    trainer[3] = -20.0
    assert guard.observe(1, engine, trainer).max_abs == pytest.approx(19.0)
    with pytest.raises(ParityError) as caught:
        guard.observe(2, engine, engine - 1.0)
    for hint in ("adapter's slots", "prefix cache", "dtype", "attention", "engine_kwargs", "parity_limit"):
        assert hint in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    good, bad = torch.full((5,), -1.0), torch.tensor([-1.0, -1.0, value, -1.0, value])
    guard = ParityGuard(math.inf, torch.float32)
    with pytest.raises(ParityError, match=r"step 3: 2 of the 5 log-probs of the engine are not finite.*at token 2"):
        guard.observe(3, bad, good)
    with pytest.raises(ParityError, match="log-probs of the trainer"):
        guard.observe(3, good, bad)


def test_nothing_sampled_and_bad_arguments() -> None:
    guard = ParityGuard(None, torch.float32)
    assert guard.observe(1, torch.empty(0), torch.empty(0)).tokens == 0
    with pytest.raises(ValueError, match=r"shapes \(3,\) \(engine\) and \(2,\)"):
        guard.observe(1, torch.zeros(3), torch.zeros(2))
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be above 0"):
            ParityGuard(limit, torch.float32)


def tensors_of(weights: SharedWeights) -> dict[str, Tensor]:
    """What an engine that shares everything holds."""
    found = dict(weights.tensors) | {"lm_head.weight": weights.head}
    for name, linear in weights.linears.items():
        found[f"{name}.weight"] = linear.weight.rows(0, linear.weight.out_features)
        if linear.bias is not None:
            found[f"{name}.bias"] = linear.bias
        assert linear.slot is not None
        found |= {f"{name}.lora_slot_a": linear.slot.a, f"{name}.lora_slot_b": linear.slot.b}
    return found


@pytest.mark.parametrize("name", ["qwen2-tied", "llama-llama3_rope"])
def test_storage_is_compared_tensor_by_tensor(name: str) -> None:
    weights = SharedWeights.empty(model_layout(block_spec(tiny_configs()[name])), torch.float32, "cpu")
    Adapter(weights, random_lora())
    shared = tensors_of(weights)
    assert check_storage(weights, shared) == len(shared)
    for key, tensor in shared.items():
        with pytest.raises(ParityError, match=f"{key} is not shared"):
            check_storage(weights, shared | {key: tensor.clone()})
        with pytest.raises(ParityError, match=f"the engine has no tensor {key}"):
            check_storage(weights, {other: value for other, value in shared.items() if other != key})


def test_another_layout_of_the_same_memory_is_not_shared() -> None:
    weights = SharedWeights.empty(model_layout(block_spec(tiny_configs()["llama-llama3_rope"])), torch.float32, "cpu")
    Adapter(weights, random_lora())
    shared = tensors_of(weights)
    name = "model.layers.0.self_attn.o_proj.weight"
    for view in (shared[name].T, shared[name].view(torch.int32), shared[name][:-1]):
        with pytest.raises(ParityError, match="is not shared"):
            check_storage(weights, shared | {name: view})
    padded = torch.zeros(192, 48)  # an engine may hold rows beyond the vocabulary
    weights.tensors["model.embed_tokens.weight"] = padded[:128]
    check_storage(weights, shared | {"model.embed_tokens.weight": padded})
