"""Models with random weights and an adapter on all linears, to train: ours, and transformers with PEFT as its peer."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

LORA = {"r": 32, "lora_alpha": 32, "target_modules": "all-linear"}
Step = Callable[[Tensor], None]  # forward and backward of one row of token ids


def random_policy(
    config: PreTrainedConfig, device: str = "cuda", base: str = "auto", dtype: torch.dtype = torch.bfloat16
) -> Any:
    """A policy that recomputes its blocks in the backward pass; its base dense, or quantised to NF4."""
    from colora.rl.families import block_spec, model_layout
    from colora.rl.policy import build
    from colora.weightshare.base_format import base_format
    from colora.weightshare.weights import SharedWeights

    layout = model_layout(block_spec(config))
    weights = SharedWeights.empty(layout, dtype, device, base_format(base, ()))
    for name, tensor in weights.tensors.items():
        tensor.fill_(1.0) if name.endswith("norm.weight") else tensor.normal_(0.0, 0.02)
    for linear in weights.linears.values():
        for part in linear.parts:
            rows = torch.empty(part.stop - part.start, linear.weight.in_features, dtype=dtype, device=device)
            linear.weight.load_rows(part.start, rows.normal_(0.0, 0.02))
        if linear.bias is not None:
            linear.bias.zero_()
    policy = build(weights, config, LoraConfig(**LORA, init_lora_weights=False), seed=0)
    policy.gradient_checkpointing = True
    return policy


@torch.no_grad()
def exact_policy(policy: Any, config: PreTrainedConfig) -> Any:
    """The same values in fp32, a quantised base dense."""
    exact = random_policy(config, dtype=torch.float32)
    for name, tensor in policy.weights.tensors.items():
        exact.weights.tensors[name].copy_(tensor)
    for name, linear in policy.weights.linears.items():
        for part in linear.parts:
            exact.weights.linears[name].weight.load_rows(part.start, linear.weight.rows(part.start, part.stop))
    for ours, given in zip(exact.parameters(), policy.parameters(), strict=True):
        ours.copy_(given)
    return exact


def policy_step(policy: Any) -> Step:
    """The mean log-prob of a row's tokens after the first, differentiated."""

    def step(tokens: Tensor) -> None:
        rows = torch.arange(len(tokens) - 1, device=tokens.device)
        logprobs, _ = policy.logprobs(tokens, [len(tokens)], rows, tokens[1:])
        logprobs.mean().backward()

    return step


def transformers_step(config: PreTrainedConfig, liger: bool) -> Step:
    """The same by transformers with PEFT, gradient checkpointing and SDPA, patched by Liger on request."""
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3()
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()

    def step(tokens: Tensor) -> None:
        model(input_ids=tokens[None], labels=tokens[None], use_cache=False).loss.backward()

    return step
