"""vLLM's tensors are the policy's: the same memory, the same log-probs, for every family."""

from pathlib import Path

import pytest
import torch
from colora.rl.families import block_spec, model_layout
from colora.rl.policy import Policy, load
from colora.rollout.engine import generate
from colora.weightshare.guard import DEFAULT_LIMITS, check_storage
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..models import random_lora
from ..vllm_engines import (
    VLLM_MARKS,
    all_slots,
    engine_logprobs,
    open_engine,
    requests_of,
    save_tiny,
    trainer_logprobs,
    vllm_configs,
)

pytestmark = VLLM_MARKS
CONFIGS = vllm_configs()
PLAIN = "qwen3-wide_heads"


def rewrite(directory: Path, **changes: Tensor | None) -> None:
    """Replace tensors of a checkpoint; None removes one."""
    file = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in (load_file(file) | changes).items() if tensor is not None}
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_shares_its_tensors_and_computes_the_same(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    directory = save_tiny(config, tmp_path)
    engine = open_engine(directory)
    try:
        assert engine.weights.layout == model_layout(block_spec(config))
        policy = Policy(engine.weights, engine.config, engine.adapter)
        engine_tensors = engine.named_tensors()
        assert check_storage(policy.weights, engine_tensors) >= len(dict(policy.weights.tensors)) + 4 * 2 * 3
        assert {tensor.data_ptr() for tensor in engine_tensors.values()} == {
            tensor.data_ptr()
            for linear in policy.weights.linears.values()
            for tensor in (linear.weight.rows(0, 1), linear.bias, linear.slot.a, linear.slot.b)
            if tensor is not None
        } | {tensor.data_ptr() for tensor in policy.weights.tensors.values()}
        stored = load(directory, random_lora(), dtype="float32", device="cpu", seed=3)
        shared = dict(policy.weights.dense_parameters())
        assert all(torch.equal(shared[key], tensor) for key, tensor in stored.weights.dense_parameters())
        assert torch.equal(all_slots(stored.weights), all_slots(policy.weights))

        trajectories = list(generate(engine, requests_of([3, 21, 40], config.vocab_size)))
        gap = (trainer_logprobs(policy, trajectories) - engine_logprobs(trajectories)).abs().max()
        assert gap < 1e-4
    finally:
        engine.close()
    assert torch.isfinite(trainer_logprobs(policy, trajectories)).all()  # the weights outlive the engine


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_bases_and_a_part_of_the_targets(dtype: torch.dtype, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    engine = open_engine(save_tiny(CONFIGS[PLAIN], tmp_path), lora, dtype=dtype)
    try:
        policy = Policy(engine.weights, engine.config, engine.adapter)
        assert policy.dtype == dtype
        trajectories = list(generate(engine, requests_of([5, 30], 128)))
        gap = (trainer_logprobs(policy, trajectories) - engine_logprobs(trajectories)).abs().mean()
        assert gap < DEFAULT_LIMITS[dtype]
    finally:
        engine.close()


def test_bare_base(tmp_path: Path) -> None:
    engine = open_engine(save_tiny(CONFIGS[PLAIN], tmp_path), None)
    try:
        assert engine.adapter is None
        trajectories = list(generate(engine, requests_of([5], 128)))
        gap = trainer_logprobs(Policy(engine.weights, engine.config), trajectories) - engine_logprobs(trajectories)
        assert gap.abs().max() < 1e-4
    finally:
        engine.close()


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    directory = save_tiny(CONFIGS[PLAIN], tmp_path)
    rewrite(directory, **{"model.layers.1.self_attn.k_proj.weight": None})
    with pytest.raises(ValueError, match=r"lacks 1 tensors .* model.layers.1.self_attn.k_proj.weight"):
        open_engine(directory)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    directory = save_tiny(CONFIGS[PLAIN], tmp_path)
    rewrite(directory, **{"model.layers.0.mlp.down_proj.weight": torch.zeros(48, 65)})
    with pytest.raises(ValueError, match=r"mlp.down_proj.weight has shape \(48, 65\) .* says \(48, 64\)"):
        open_engine(directory)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    directory = save_tiny(CONFIGS[PLAIN], tmp_path)
    rewrite(directory, **{"lm_head.weight": torch.ones(128, 48)})
    with pytest.raises(ValueError, match="ties the head to the embedding"):
        open_engine(directory)


def test_a_tied_head_that_is_stored_twice_stays_one_tensor_and_what_is_not_the_decoders_is_passed_over(
    tmp_path: Path,
) -> None:
    directory = save_tiny(CONFIGS[PLAIN], tmp_path)
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(directory, **{"lm_head.weight": embedding.clone(), "vision_tower.patches.weight": torch.zeros(2, 2)})
    engine = open_engine(directory)
    try:
        assert engine.weights.layout.tied_head
        assert engine.named_tensors()["lm_head.weight"].data_ptr() == engine.weights.embedding.data_ptr()
    finally:
        engine.close()
