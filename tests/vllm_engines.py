"""Checkpoints that vLLM's CPU build can run, and what the tests of its engine share."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from colora.rl.policy import Policy
from colora.rollout.engine import RolloutRequest, SamplingParams
from colora.rollout.trajectory import Trajectory
from colora.rollout.vllm_engine import VLLMEngine
from colora.weightshare.weights import SharedWeights
from torch import Tensor
from transformers import PreTrainedConfig

from .models import next_token_rows, random_lora, tiny_configs, tiny_model

# One engine is open at a time in a process: all of these tests run in the same one.
VLLM_MARKS = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]


def vllm_configs() -> dict[str, PreTrainedConfig]:
    """The tiny models of every family, with heads of 32, the smallest that vLLM's CPU attention has."""
    configs = tiny_configs()
    del configs["qwen2-half_windows_yarn"]  # vLLM has no Qwen2 with windows in some layers
    for name, config in configs.items():
        config.head_dim = 32
        if name.startswith("qwen2"):
            config.hidden_size = 32 * config.num_attention_heads
        config.max_position_embeddings = 512
    mixed = configs["qwen3-odd_biased_windows"]  # nor such a Qwen3, nor one with a bias at o_proj
    mixed.layer_types, mixed.max_window_layers, mixed.attention_bias = ["sliding_attention"] * 2, 2, False
    return configs


def save_tiny(config: PreTrainedConfig, directory: Path) -> Path:
    """A checkpoint whose every parameter is random."""
    tiny_model(config).save_pretrained(directory)
    return directory


def all_slots(weights: SharedWeights) -> Tensor:
    """A copy of every slot, one after the other."""
    slots = [linear.slot for linear in weights.linears.values() if linear.slot is not None]
    return torch.cat([tensor.flatten() for slot in slots for tensor in (slot.a, slot.b)])


def open_engine(directory: Path, lora: Any = "random", **options: Any) -> VLLMEngine:
    """An engine on the CPU, in fp32, with a random adapter."""
    settings: dict[str, Any] = {
        "dtype": torch.float32,
        "max_context": 512,
        "device": "cpu",
        "seed": 3,
        "max_sequences": 8,
    }
    return VLLMEngine(directory, random_lora() if lora == "random" else lora, **settings | options)


def requests_of(
    lengths: Sequence[int], vocab_size: int, max_tokens: int | Sequence[int] = 12, **sampling: Any
) -> list[RolloutRequest]:
    """Requests `r0`, `r1`, ... with distinct, fixed prompts of these lengths."""
    generator = torch.Generator().manual_seed(11)
    limits = [max_tokens] * len(lengths) if isinstance(max_tokens, int) else max_tokens
    return [
        RolloutRequest(
            f"r{index}",
            tuple(torch.randint(vocab_size, (length,), generator=generator).tolist()),
            100 + index,
            SamplingParams(limit, **sampling),
        )
        for index, (length, limit) in enumerate(zip(lengths, limits, strict=True))
    ]


def trainer_logprobs(policy: Policy, trajectories: Sequence[Trajectory], temperature: float = 1.0) -> Tensor:
    """The policy's log-probs of every completion token, concatenated."""
    pieces = []
    for trajectory in trajectories:
        sequence = torch.tensor(trajectory.prompt_ids + trajectory.completion_ids)
        logprobs, _ = policy.logprobs(*next_token_rows([sequence]), temperature)
        pieces.append(logprobs.detach()[len(trajectory.prompt_ids) - 1 :])
    return torch.cat(pieces)


def engine_logprobs(trajectories: Sequence[Trajectory]) -> Tensor:
    """The engine's, in the same order."""
    return torch.tensor([value for trajectory in trajectories for value in trajectory.logprobs])
