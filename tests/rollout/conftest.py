"""Tiny models of every family, made on the spot."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from colora.rl.policy import Policy, load
from colora.rollout.engine import RolloutRequest, SamplingParams
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

from ..models import merged_weight

DEVICE = "cpu"
WINDOW = 8
SHAPE: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,  # distributions far from uniform
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "gemma3_text": (
        Gemma3TextConfig,
        {
            "tie_word_embeddings": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"sliding_attention": ROPE, "full_attention": {**ROPE, "rope_theta": 1e6}},
        },
    ),
}


@pytest.fixture
def make_policy() -> Callable[..., Policy]:
    """A policy of a family with a random adapter whose update is not zero."""

    def make(family: str, dtype: str = "float32", lora: bool = True, **overrides: Any) -> Policy:
        config_class, settings = FAMILIES[family]
        set_seed(7)
        model = AutoModelForCausalLM.from_config(config_class(**{**SHAPE, **settings, **overrides}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
        return load(model, lora=config if lora else None, dtype=dtype, device=DEVICE, seed=3)

    return make


@pytest.fixture
def merged_model() -> Callable[[Policy], PreTrainedModel]:
    """A plain transformers model with the adapter merged into copies of the weights, in fp32."""

    def merge(policy: Policy) -> PreTrainedModel:
        weights = policy.weights
        state = {name: tensor.clone() for name, tensor in weights.dense_parameters()}
        for linear in weights.linears.values():
            for part in linear.parts:
                state[f"{linear.part_name(part)}.weight"] = merged_weight(linear, part)
        model = AutoModelForCausalLM.from_config(policy.config, attn_implementation="eager")
        model.load_state_dict(state)
        return model.eval()

    return merge


@pytest.fixture
def make_requests() -> Callable[..., list[RolloutRequest]]:
    """Requests `r0`, `r1`, ... with prompts of the given lengths, distinct and fixed."""

    def make(
        lengths: list[int], max_tokens: int | list[int] = 12, temperature: float = 1.0, stop: tuple[int, ...] = ()
    ):
        limits = [max_tokens] * len(lengths) if isinstance(max_tokens, int) else max_tokens
        generator = torch.Generator().manual_seed(11)
        return [
            RolloutRequest(
                request_id=f"r{number}",
                prompt_ids=tuple(torch.randint(37, (length,), generator=generator).tolist()),
                seed=100 + number,
                sampling=SamplingParams(limit, temperature, stop),
            )
            for number, (length, limit) in enumerate(zip(lengths, limits, strict=True))
        ]

    return make
