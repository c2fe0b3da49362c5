"""The transformers engine on an NF4 base: it holds the shared codes alone, and what it samples from is the policy."""

from pathlib import Path

import pytest
import torch
from colora.rl.policy import load
from colora.rollout.engine import generate
from colora.rollout.transformers_engine import TransformersEngine, shared_model

from ..models import random_lora, save_checkpoint, tiny_model
from ..nf4_models import merged_model, nf4_configs, quantised_model
from ..vllm_engines import engine_logprobs, requests_of, trainer_logprobs

CONFIGS = nf4_configs()


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_and_logprobs_are_those_of_the_merged_model(name: str) -> None:
    dense = tiny_model(CONFIGS[name])
    policy = load(dense, random_lora(), device="cpu", seed=3, base="nf4")
    engine, reference = TransformersEngine(policy.weights, policy.config), merged_model(policy, dense)
    for trajectory in generate(engine, requests_of([3, 21, 40], 128, temperature=0.0)):
        prompt, count = torch.tensor([trajectory.prompt_ids]), len(trajectory.completion_ids)
        expected = reference.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None)
        assert trajectory.completion_ids == expected[0, len(trajectory.prompt_ids) :].tolist()
    sampled = list(generate(engine, requests_of([3, 21, 40], 128)))
    assert (trainer_logprobs(policy, sampled) - engine_logprobs(sampled)).abs().max() < 1e-4


def test_it_holds_no_dense_copy(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(CONFIGS["qwen3"]), tmp_path / "dense")
    directory = save_checkpoint(quantised_model(tmp_path / "dense"), tmp_path / "quantised")
    policy = load(directory, device="cpu")
    model = shared_model(policy.weights, policy.config)
    shared = {tensor.data_ptr() for tensor in policy.weights.tensors.values()}
    assert {parameter.data_ptr() for parameter in model.parameters()} == shared
    codes = policy.weights.linears["model.layers.0.self_attn.qkv_proj"].weight.tensors()["nf4_codes"]
    assert model.get_submodule("model.layers.0.self_attn.k_proj").rows.codes.data_ptr() == codes[128].data_ptr()


def test_weights_of_another_model_are_refused() -> None:
    policy = load(tiny_model(CONFIGS["qwen3"]), device="cpu", base="nf4")
    policy.config.intermediate_size = 256
    message = r"model.layers.0.mlp.gate_proj is \(192, 64\), the config says \(256, 64\); load both from the same"
    with pytest.raises(ValueError, match=message):
        shared_model(policy.weights, policy.config)
