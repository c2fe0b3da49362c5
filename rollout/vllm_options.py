"""What of `engine_kwargs` may be passed on to vLLM, what would contradict the sharing of weights, and which attention
decode steps have."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..kernels.decode_attention import DecodeShape
from ..weightshare.memory import KVLayout, head_dim

TEMPERATURES = (0.01, 2.0)  # vLLM would raise lower ones to 0.01 without a word

_OURS = {"max_sequences": "max_num_seqs", "kv_cache_bytes": "kv_cache_memory_bytes"}  # our names for vLLM's options
_SHARED = "the engine holds the weights that are trained"
_ONE_GPU = "engine and trainer share the tensors of one process on one device"
_LEDGER = "the trainer needs every token with its log-prob, by id"
CONFLICTS = {
    "model": "it is the model that is trained: pass `model` to the trainer",
    "model_weights": "it is the model that is trained: pass `model` to the trainer",
    "tokenizer": "the engine gets and gives token ids; pass `processing_class` to the trainer",
    "revision": "pass the checkpoint's directory as `model`",
    "hf_overrides": "policy and engine must read the same config.json",
    "config_format": "policy and engine must read the same config.json",
    "model_class_overrides": _SHARED,
    "model_impl": "only vLLM's own model classes run linears that can be shared",
    "dtype": "set the trainer's `dtype`",
    "seed": "set the trainer's `seed`",
    "max_model_len": "set the trainer's `max_context`",
    "quantization": f"{_SHARED}, through a quantization method of its own",
    "quantization_config": f"{_SHARED}, through a quantization method of its own",
    "enable_lora": "the adapter is part of the shared linears; vLLM's own LoRA would be a second one",
    "lora_dtype": "the adapter is part of the shared linears",
    "speculative_config": "drafted tokens have no log-probs of the policy to train on",
    "spec_method": "drafted tokens have no log-probs of the policy to train on",
    "spec_model": "drafted tokens have no log-probs of the policy to train on",
    "tensor_parallel_size": _ONE_GPU,
    "pipeline_parallel_size": _ONE_GPU,
    "data_parallel_size": _ONE_GPU,
    "prefill_context_parallel_size": _ONE_GPU,
    "decode_context_parallel_size": _ONE_GPU,
    "distributed_executor_backend": _ONE_GPU,
    "cpu_offload_gb": "offloaded weights have no fixed address to share",
    "offload_backend": "offloaded weights have no fixed address to share",
    "offload_group_size": "offloaded weights have no fixed address to share",
    "gpu_memory_utilization": "the KV cache is sized from what is free; set kv_cache_memory_bytes to override",
    "worker_cls": "a worker that lets only the KV cache sleep is in its place",
    "worker_extension_cls": "the worker runs in the trainer's process: reach it from there",
    "enable_sleep_mode": "the KV cache sleeps while training in any case",
    "enable_cumem_allocator": "the KV cache sleeps while training in any case",
    "skip_tokenizer_init": _LEDGER,
    "logprobs_mode": "the importance ratio needs the log-probs that tokens were sampled with",
    "logits_processors": "tokens would be sampled from another distribution than the policy's",
    "generation_config": "sampling and stop tokens are the trainer's options",
    "override_generation_config": "sampling and stop tokens are the trainer's options",
    "runner": "the model generates",
    "convert": "the model generates",
}
LOAD_FORMATS = ("auto", "safetensors")
_PIECES = ("enable_chunked_prefill", "long_prefill_token_threshold")  # read a prompt in several forwards
ATTENTION_OPTIONS = ("attention_backend", "attention_config", "compilation_config", "kv_cache_dtype")
LONG_PROMPT = 2048  # tokens from which on it is worth a plan a step that a shared prompt is read once
BLOCK_SIZE = 16  # tokens of vLLM's KV blocks on a GPU
# Whole numbers that the engine's memory is computed from: they may be left out, but not be None or text.
_COUNTS = ("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes")


def check_engine_kwargs(kwargs: Mapping[str, Any], arguments: type, device: str) -> dict[str, Any]:
    """`engine_kwargs` in vLLM's names.

    Args:
        kwargs: what the user gave.
        arguments: `vllm.EngineArgs`, whose fields are the names that exist.
        device: the kind of device: `cuda` or `cpu`.

    Raises:
        ValueError: a name that vLLM does not have (with the nearest ones), one that conflicts with sharing (with the
            reason) or would stop a run on a CPU later, the same option under two names, or a value of another type
            than is computed with.
    """
    known = {entry.name for entry in fields(arguments) if not entry.name.startswith("_")}
    checked: dict[str, Any] = {}
    for given, value in kwargs.items():
        name = _OURS.get(given, given)
        if name not in known:
            close = get_close_matches(given, [*known - CONFLICTS.keys(), *_OURS], n=3)
            near = f"did you mean {', '.join(close)}?" if close else "see vllm.EngineArgs for the names"
            raise ValueError(f"engine_kwargs: vLLM has no option {given!r}; {near}")
        if name in CONFLICTS:
            raise ValueError(f"engine_kwargs: {given}={value!r} cannot be set: {CONFLICTS[name]}")
        if name in _PIECES and device == "cpu" and value:
            raise ValueError(
                f"engine_kwargs: {given}={value!r} cannot be set on a CPU: of a seeded prompt in pieces vLLM takes "
                "random numbers back, which a CPU's generator cannot do"
            )
        if name in checked:
            raise ValueError(f"engine_kwargs: {name} is given twice, also under the name {given}")
        if name in _COUNTS:
            value = _count(given, value)
        if name == "additional_config" and not isinstance(value, dict):
            raise ValueError(f"engine_kwargs: {given}={value!r} must be a mapping")
        checked[name] = value
    load_format = checked.pop("load_format", "auto")
    if load_format not in LOAD_FORMATS:
        raise ValueError(
            f"engine_kwargs: load_format={load_format!r} cannot be set: the weights that are trained are read from "
            f"safetensors ({' or '.join(LOAD_FORMATS)})"
        )
    return checked


def shared_prompt_shape(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    prompt_tokens: int,
    given: Mapping[str, Any],
) -> DecodeShape | None:
    """The shape that decode steps read shared prompts once in (`vllm_attention`); None: vLLM chooses the attention.

    Args:
        config: the model's; it needs layers that attend to everything.
        dtype: of the model and the KV cache.
        capability: the GPU's, of which 10 is not tried; None on a CPU.
        prompt_tokens: of a usual prompt; sequences that share little are slower than with FlashAttention.
        given: the user's options in vLLM's names; those that say how attention is computed stand.
    """
    if capability is None or capability[0] < 8 or capability[0] == 10:
        return None
    if prompt_tokens < LONG_PROMPT or any(name in given for name in ATTENTION_OPTIONS):
        return None
    if not given.get("enable_prefix_caching", True):  # sequences have no blocks in common
        return None
    if None not in KVLayout.of(config, dtype.itemsize, BLOCK_SIZE).windows:
        return None
    shape = DecodeShape(config.num_attention_heads, config.num_key_value_heads, head_dim(config), BLOCK_SIZE, dtype)
    return shape if shape.supported else None


def _count(name: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():  # 4e9, as YAML reads it
        value = int(value)
    if type(value) is not int or value < 1:
        raise ValueError(f"engine_kwargs: {name}={value!r} must be a whole number of at least 1, or left out")
    return value
