"""The text of `colora train --help`, and help texts where TRL's do not hold for this trainer."""

import textwrap
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

import trl

from .config import GRPOConfig
from .options import HONOURED_BY_TRANSFORMERS, HONOURED_HERE
from .run_config import run_fields

OWN_HELP: dict[str, str] = {
    "output_dir": "Directory for checkpoints, rollouts and logs. Must be given.",
    "per_device_train_batch_size": "Completions in one optimizer step, times gradient_accumulation_steps. Memory "
    "is set by tokens_per_microbatch, not by this.",
    "gradient_accumulation_steps": "Factor of per_device_train_batch_size: only the product of the two counts.",
    "generation_batch_size": "Completions generated at a time; by default those of one optimizer step. Instead of "
    "steps_per_generation.",
    "steps_per_generation": "Generate for so many batches of per_device_train_batch_size at once; by default "
    "gradient_accumulation_steps, that is one optimizer step for each generation.",
    "num_generations": "Completions of one prompt, its group, at least 2. Must divide the completions of a generation.",
    "num_generations_eval": "Completions of one prompt in evaluations; by default num_generations.",
    "num_iterations": "Optimizer steps on each part of a generation (the method's mu).",
    "max_completion_length": "Most tokens in a completion; with tools, those that the model samples of it.",
    "max_tool_calling_iterations": "How often a conversation's calls are answered; not given: always.",
    "temperature": "Temperature of sampling, above 0; the log-probs of training are at the same temperature.",
    "model_init_kwargs": "For scripts written for TRL: a mapping with `dtype`, nothing else.",
    "bf16": "For scripts written for TRL: the same as dtype bfloat16.",
    "fp16": "For scripts written for TRL: the same as dtype float16.",
    "use_cpu": "The same as device cpu. True where there is no CUDA card.",
    "use_vllm": "For scripts written for TRL: the same as engine vllm.",
    "gradient_checkpointing": "Keep only the input of each block for the backward pass and compute the block again: "
    "less memory, one more forward.",
    "shuffle_dataset": "Draw prompts in an order that seed and epoch decide, instead of the dataset's.",
    "loss_type": "The objective and how its tokens are added up: `grpo` (mean of each completion, then over "
    "completions), `bnpo` and `dapo` (mean over the tokens of the step), `dr_grpo` (sum divided by "
    "max_completion_length), `cispo`, `sapo`, `luspo`, `vespo`, `gmpo`; docs/algorithms.md has the equations. "
    "`algorithm` sets it together with what belongs to it.",
    "importance_sampling_level": "Whose ratio of new to old probability: each `token`'s, or the geometric mean over "
    "its `sequence` (GSPO), or that with the gradient of the token's, `sequence_token` (GSPO-token).",
    "sapo_temperature_neg": "Of loss_type sapo: how soon the gate closes for completions worse than average.",
    "sapo_temperature_pos": "Of loss_type sapo: how soon the gate closes for completions better than average.",
    "vespo_k_pos": "Of loss_type vespo, advantages of 0 and more: k in the weight W^k exp(lambda (1 - W)).",
    "vespo_lambda_pos": "Of loss_type vespo, advantages of 0 and more: lambda in that weight.",
    "vespo_k_neg": "Of loss_type vespo, advantages below 0: k in that weight.",
    "vespo_lambda_neg": "Of loss_type vespo, advantages below 0: lambda in that weight.",
    "top_entropy_quantile": "Share of the step's tokens, those of highest entropy, that the policy loss acts on; 1: "
    "all. Below 1 it takes another forward.",
    "entropy_coef": "Weight of the mean entropy of the step's tokens, which is taken from the loss.",
    "off_policy_mask_threshold": "Leave out completions worse than average that the policy has become less likely to "
    "write by more than so many nats a token (DeepSeek-V3.2); null: none.",
    "vllm_importance_sampling_clip_min": "Lower bound of the weight that vllm_importance_sampling_mode names.",
    "beta": "Weight of the KL divergence to the base model. 0: none, and no forward of the base model.",
    "epsilon": "The ratio of new to old probability is clipped below 1 - epsilon, and above 1 + epsilon_high.",
    "epsilon_high": "Upper clip range; by default epsilon. The DAPO paper uses 0.28. With loss_type cispo the largest "
    "ratio itself.",
    "delta": "Also cap the ratio at this value where the advantage is negative (INTELLECT-2's two-sided clipping). "
    "Should be above 1 + epsilon_high.",
    "use_bias_correction_kl": "Multiply the KL term by the ratio, which makes its gradient that of the reverse KL "
    "divergence (DeepSeek-V3.2). Matters where beta is above 0, and not with kl_estimator k2.",
    "reward_weights": "Weight of each reward function, in the order of reward_funcs; by default 1 each.",
    "multi_objective_aggregation": "`sum_then_normalize`: add up the weighted rewards, then scale. "
    "`normalize_then_sum`: scale each function's rewards within a group first (GDPO).",
    "scale_rewards": "Divide advantages by the standard deviation of the `group` or the `batch`, or `none` (Dr. GRPO).",
    "vllm_importance_sampling_correction": "Weight tokens by the ratio of the trainer's to the engine's probability, "
    "to make up for their different arithmetic. Holds for every engine, not only vLLM.",
    "log_completions": "Print completions with their rewards at each generation.",
    "num_completions_to_print": "How many completions log_completions prints; by default all.",
    "metric_for_best_model": "Metric of evaluations that tells the best checkpoint; by default `reward`.",
    "disable_tqdm": "Show no progress bar.",
    "logging_nan_inf_filter": "Leave NaN and infinite losses out of the logged mean.",
    "resume_from_checkpoint": "The same as resume, which counts where both are given.",
    "report_to": "Where metrics go: tensorboard, wandb, trackio and others that transformers knows; `all`, or `none`.",
    "seed": "Decides the adapter's first values, the order of prompts and every sampled token.",
    "full_determinism": "Use deterministic kernels only, which is slow: for debugging.",
}


def option_help(name: str, metadata: Any) -> str:
    """What the option does, in this trainer."""
    return OWN_HELP.get(name) or str(metadata.get("help", "")).replace("%%", "%")


def train_help() -> str:
    """Usage of `colora train`, with every option, its default and its meaning."""
    own = {entry.name for entry in fields(GRPOConfig)} - HONOURED_HERE - HONOURED_BY_TRANSFORMERS
    trl_fields = {entry.name for entry in fields(trl.GRPOConfig)}
    groups = {
        "What is trained": run_fields(),
        "Of this trainer alone": [entry for entry in fields(GRPOConfig) if entry.name in own - trl_fields - {"preset"}],
        "As in trl.GRPOConfig": [entry for entry in fields(GRPOConfig) if entry.name in HONOURED_HERE],
        "As in transformers.TrainingArguments": [
            entry for entry in fields(GRPOConfig) if entry.name in HONOURED_BY_TRANSFORMERS
        ],
    }
    parts = [
        "usage: colora train [CONFIG.yaml] [--NAME VALUE ...] [--dry-run] [--debug]",
        "Train as CONFIG.yaml says, a file of lines `NAME: VALUE`; what is given here as --NAME VALUE counts more.\n"
        "Paths are relative to the current directory. --NAME.KEY VALUE sets one entry of a mapping: --lora.r 32.\n\n"
        "  --dry-run  print the resolved configuration as YAML, check what can be checked without loading\n"
        "             weights, and exit\n"
        "  --debug    show the traceback of an error",
    ]
    for title, entries in groups.items():
        parts.append(f"{title}:\n" + "\n".join(_entry_help(entry) for entry in entries))
    return "\n\n".join(parts)


def _entry_help(entry: Any) -> str:
    default = entry.default.value if isinstance(entry.default, Enum) else entry.default
    if isinstance(default, bool):
        default = str(default).lower()
    shown = "" if default is MISSING or default is None else f" (default: {default})"
    text = option_help(entry.name, entry.metadata)
    return textwrap.fill(
        f"  --{entry.name}{shown}  {text}", width=110, subsequent_indent=" " * 6, break_long_words=False
    )
