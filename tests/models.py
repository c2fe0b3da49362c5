"""Tiny models of every family, made on the spot, and the packed rows they are tried on."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from colora.weightshare.linear import OutputPart, SharedLinear
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

SMALL = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ODD = SMALL | {
    "vocab_size": 101,
    "hidden_size": 39,
    "intermediate_size": 67,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
SLIDING_FULL = ["sliding_attention", "full_attention"]
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
}


def tiny_configs() -> dict[str, PreTrainedConfig]:
    """At least two shapes of each family: head counts, head sizes, ties, biases, windows and ropes differ."""
    return {
        "llama-llama3_rope": LlamaConfig(**SMALL, rope_parameters=dict(LLAMA3_ROPE)),
        "llama-odd_biased_tied": LlamaConfig(
            **ODD,
            head_dim=22,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            rope_parameters=dict(LINEAR_ROPE),
        ),
        "mistral-window": MistralConfig(**SMALL | {"num_key_value_heads": 4}, sliding_window=5),
        "mistral-odd_tied": MistralConfig(**ODD, head_dim=16, sliding_window=None, tie_word_embeddings=True),
        "qwen2-tied": Qwen2Config(**SMALL | {"num_key_value_heads": 1}, tie_word_embeddings=True),
        "qwen2-half_windows_yarn": Qwen2Config(
            **ODD | {"hidden_size": 42},
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=1,
            rope_parameters=dict(YARN_ROPE),
        ),
        "qwen3-wide_heads": Qwen3Config(**SMALL, head_dim=24, tie_word_embeddings=True),
        "qwen3-odd_biased_windows": Qwen3Config(
            **ODD,
            head_dim=10,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=6,
            layer_types=list(SLIDING_FULL),
        ),
        "gemma3_text-tied": Gemma3TextConfig(
            **SMALL, head_dim=16, sliding_window=5, layer_types=list(SLIDING_FULL), query_pre_attn_scalar=24
        ),
        "gemma3_text-odd_biased_softcap": Gemma3TextConfig(
            **ODD | {"num_hidden_layers": 3},
            head_dim=14,
            sliding_window=3,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            query_pre_attn_scalar=14,
            attention_bias=True,
            final_logit_softcapping=5.0,
            tie_word_embeddings=False,
            rope_parameters={kind: dict(parameters) for kind, parameters in TWO_ROPES.items()},
        ),
    }


def tiny_model(config: PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model in eval mode whose every parameter (norms and biases too) is random and large enough to matter."""
    model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype).eval()
    return _randomise(model, seed)


def tiny_llama(seed: int = 0) -> PreTrainedModel:
    """The plainest of them, where the family does not matter."""
    return tiny_model(LlamaConfig(**SMALL), seed)


def tiny_multimodal(seed: int = 0) -> PreTrainedModel:
    """Gemma 3 with a vision tower around the decoder."""
    text = dict(SMALL, head_dim=16, sliding_window=5, layer_types=list(SLIDING_FULL), query_pre_attn_scalar=24)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 16, "patch_size": 8}
    tokens = {"image_token_index": 127, "boi_token_index": 126, "eoi_token_index": 125, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, **tokens)
    return _randomise(Gemma3ForConditionalGeneration(config).eval(), seed)


def _randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    gemma = model.config.model_type.startswith("gemma")
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.2
        if "norm" in name and not gemma:  # Gemma's norms scale by 1 + weight themselves
            values += 1.0
        parameter.data.copy_(values)
    return model.requires_grad_(False)


def random_lora(**options: Any) -> LoraConfig:
    """An adapter on every linear whose B is random, so that it matters and every gradient is nonzero."""
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(**(defaults | options))


def save_checkpoint(model: PreTrainedModel, directory: Path, shard_size: str = "5GB") -> Path:
    """Write a transformers checkpoint, in several shards where `shard_size` is below the model's."""
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def random_sequences(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[Tensor]:
    """Token ids, one (length,) int64 tensor a sequence; never the last few ids, which may mean images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size - 4, (length,), generator=generator) for length in lengths]


def next_token_rows(sequences: Sequence[Tensor]) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """Pack sequences: (tokens, lengths, rows, targets) such that every token but each first one is predicted."""
    lengths = [len(sequence) for sequence in sequences]
    rows, start = [], 0
    for length in lengths:
        rows.append(torch.arange(start, start + length - 1))
        start += length
    return torch.cat(list(sequences)), lengths, torch.cat(rows), torch.cat([sequence[1:] for sequence in sequences])


def plain_logprobs(model: torch.nn.Module, sequences: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of every token but each first one by a transformers (or PEFT) model, one sequence at a time."""
    pieces = []
    for sequence in sequences:
        logits = model(input_ids=sequence[None]).logits[0, :-1].float() / temperature
        pieces.append(logits.log_softmax(-1).gather(-1, sequence[1:, None])[:, 0])
    return torch.cat(pieces)


def merged_weight(linear: SharedLinear, part: OutputPart) -> Tensor:
    """The part's weight with the adapter added, in fp32, (rows, in)."""
    weight = linear.weight.rows(part.start, part.stop).to(torch.float32, copy=True)
    slot = linear.slot_of(part)
    return weight if slot is None else weight.addmm_(slot[1].float(), slot[0].float())
