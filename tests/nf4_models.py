"""Tiny models that NF4 can hold, and checkpoints of them that bitsandbytes has quantised."""

from pathlib import Path
from typing import Any

import torch
from colora.rl.policy import Policy
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from .models import merged_weight

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def nf4_configs() -> dict[str, PreTrainedConfig]:
    """Rows of 64, 128 and 192 inputs; biases and a tied head in one of them."""
    return {
        "qwen3": Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=False),
        "qwen2_biased_tied": Qwen2Config(**SHAPE | {"hidden_size": 128}, tie_word_embeddings=True),
    }


def quantised_model(dense: Path, **options: Any) -> PreTrainedModel:
    """A checkpoint as transformers loads it with bitsandbytes: by default NF4 with nested scales."""
    defaults = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = BitsAndBytesConfig(**(defaults | options))
    return AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings, dtype=torch.float32)


def merged_model(policy: Policy, dense: PreTrainedModel) -> PreTrainedModel:
    """A plain transformers model in fp32 with the decoded weights, the adapter merged into them."""
    state = dense.state_dict()
    for linear in policy.weights.linears.values():
        state |= {f"{linear.part_name(part)}.weight": merged_weight(linear, part) for part in linear.parts}
    model = AutoModelForCausalLM.from_config(dense.config)
    model.load_state_dict(state)
    return model.eval()
