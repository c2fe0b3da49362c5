"""Which values an option of `GRPOConfig` may have: choices, and the range and kind of numbers."""

import math
from collections.abc import Iterable
from dataclasses import MISSING, fields
from importlib.util import find_spec
from typing import Any

import torch
from transformers import get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import trainer_log_levels

from ..weightshare.base_format import BASES
from .options import ALSO_ACCEPTED

DTYPES = ("float32", "bfloat16", "float16")

_CHOICES: dict[str, tuple[str, ...]] = {
    "engine": ("auto", "vllm", "transformers"),
    "dtype": ("auto", *DTYPES),
    "base": BASES,
    "activation_offload": ("auto", "true", "false"),
    "kernels": ("auto", "reference"),
    "reward_errors": ("stop", "none"),
    "log_level": tuple(trainer_log_levels),
    "log_level_replica": tuple(trainer_log_levels),
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo", "gmpo"),
    "importance_sampling_level": ("token", "sequence", "sequence_token"),
    "advantage_estimator": ("group", "rloo", "reinforce_pp", "reinforce_pp_baseline", "maxrl"),
    "kl_estimator": ("k1", "k2", "k3"),
    "old_logprobs": ("auto", "engine", "trainer"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_importance_sampling_mode": (
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
        "sequence_mean_truncate",
        "sequence_mean_mask",
    ),
}

# Name, whether it must be whole, the least value, whether that value itself is allowed. None is allowed where it is the
# default, and where it switches a limit off.
_LIMITS: tuple[tuple[str, bool, float, bool], ...] = (
    ("per_device_train_batch_size", True, 1, True),
    ("per_device_eval_batch_size", True, 1, True),
    ("gradient_accumulation_steps", True, 1, True),
    ("generation_batch_size", True, 1, True),
    ("steps_per_generation", True, 1, True),
    ("num_generations", True, 2, True),
    ("num_generations_eval", True, 1, True),
    ("num_iterations", True, 1, True),
    ("max_completion_length", True, 1, True),
    ("max_prompt_length", True, 1, True),
    ("max_context", True, 2, True),
    ("tokens_per_microbatch", True, 1, True),
    ("mlp_tile_tokens", True, 1, True),
    ("num_completions_to_print", True, 0, True),
    ("learning_rate", False, 0, False),
    ("weight_decay", False, 0, True),
    ("max_grad_norm", False, 0, True),
    ("num_train_epochs", False, 0, False),
    ("temperature", False, 0, False),
    ("beta", False, 0, True),
    ("epsilon", False, 0, True),
    ("epsilon_high", False, 0, True),
    ("delta", False, 0, False),
    ("sapo_temperature_neg", False, 0, False),
    ("sapo_temperature_pos", False, 0, False),
    ("vespo_k_pos", False, 0, True),
    ("vespo_lambda_pos", False, 0, True),
    ("vespo_k_neg", False, 0, True),
    ("vespo_lambda_neg", False, 0, True),
    ("top_entropy_quantile", False, 0, True),
    ("entropy_coef", False, -math.inf, False),
    ("off_policy_mask_threshold", False, 0, False),
    ("vllm_importance_sampling_clip_max", False, 0, False),
    ("vllm_importance_sampling_clip_min", False, 0, True),
    ("max_sequence_gap", False, 0, False),
    ("dynamic_sampling_max_rounds", True, 1, True),
    ("overlong_buffer", True, 0, True),
    ("overlong_penalty", False, 0, True),
    ("parity_limit", False, 0, False),
    ("reward_workers", True, 0, True),
    ("reward_timeout", False, 0, False),
    ("reward_memory_gib", False, 0, False),
    ("reward_failure_share", False, 0, True),
    ("reward_concurrency", True, 1, True),
    ("max_tool_calling_iterations", True, 0, True),
    ("tool_timeout", False, 0, False),
    ("tool_threads", True, 1, True),
    ("conversation_timeout", False, 0, False),
    ("seed", True, 0, True),
)

_NONE_FOR_NO_LIMIT = ("max_sequence_gap", "vllm_importance_sampling_clip_max")

OF_BITSANDBYTES = (
    *("adamw_8bit", "adamw_bnb_8bit", "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit"),
    *("paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)

# Values that optimizers keep of each parameter, by a part of their names, where there are not two.
_MOMENTS = {"ademamix": 3, "grokadamw": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "adafactor": 1, "sgd": 1}

_WHY = {
    "num_generations": "advantages compare the completions of one prompt, so a group needs at least two",
    "max_steps": "-1 or not given: as many as num_train_epochs gives",
    "temperature": "greedy decoding explores nothing and has no log-probs to learn from",
    "loss_type": "GSPO is loss_type grpo with importance_sampling_level sequence, or algorithm gspo",
    "reward_errors": "`stop` ends the run with the last checkpoint intact, `none` leaves the sample out and goes on",
}


def check_choices(config: Any) -> None:
    """Raise ValueError where an option has a value that is not one of its choices."""
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose {' or '.join(choices)}{_because(name)}")


# Optimizers that transformers takes from other packages, and the module.
_PACKAGE_OF_OPTIM = {
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "adamw_anyprecision": "torchdistx",
    "stable_adamw": "optimi",
    "grokadamw": "grokadamw",
}
# What a chat template is called with here: prompts would be cut, padded or no token ids otherwise.
_CALL_OF_TEMPLATE = frozenset(
    (
        *("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "tokenizer_kwargs"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    )
)


def check_template_kwargs(kwargs: dict[str, Any] | None) -> None:
    """Raise ValueError for `chat_template_kwargs` that are no variables of a template."""
    wrong = sorted(_CALL_OF_TEMPLATE & (kwargs or {}).keys())
    if wrong:
        raise ValueError(
            f"chat_template_kwargs: {', '.join(wrong)} cannot be set: prompts are encoded whole, to lists of token "
            "ids, up to where the model's turn starts; give variables of the chat template, such as enable_thinking"
        )


def check_schedule(config: Any) -> None:
    """Raise ValueError for a schedule of the learning rate that transformers could not make when training starts."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    kwargs = dict(config.lr_scheduler_kwargs or {})
    try:
        get_scheduler(config.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as error:
        name = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
        raise ValueError(f"lr_scheduler_type={name!r} with lr_scheduler_kwargs={kwargs}: {error}") from error


def check_reports(names: Iterable[str]) -> None:
    """Raise ValueError for a service to report to whose package is not installed."""
    available = get_available_reporting_integrations()
    missing = [name for name in names if name not in available]
    if missing:
        raise ValueError(
            f"report_to: {', '.join(missing)} cannot be used: no such service is known, or its package is not "
            "installed; install it, or set report_to to none"
        )


def check_optimizer(optim: Any) -> None:
    """Raise ValueError for an optimizer that cannot be used, or whose package is not installed."""
    name = str(getattr(optim, "value", optim))
    if name in ("lomo", "adalomo"):
        raise ValueError(f"optim={name!r} updates inside the backward pass, of which a step has several")
    if name.startswith(("galore", "apollo")):
        raise ValueError(
            f"optim={name!r} projects the gradients of large matrices (optim_target_modules), and only LoRA's small "
            "ones are trained: set optim to adamw_torch"
        )
    if name.startswith("schedule_free"):
        raise ValueError(
            f"optim={name!r} has other weights while it trains than for use, and rollouts would be sampled from the "
            "wrong ones: set optim to adamw_torch, with lr_scheduler_type constant"
        )
    package = _PACKAGE_OF_OPTIM.get(name)
    if package is not None and find_spec(package) is None:
        raise ValueError(f"optim={name!r} is of {package}, which is not installed: set optim to adamw_torch")
    if name in OF_BITSANDBYTES and find_spec("bitsandbytes") is None:
        raise ValueError(
            f'optim={name!r} is of bitsandbytes, which is not installed: pip install "colora[bnb]", or set optim to '
            "adamw_torch"
        )


def optimizer_state_bytes(optim: Any) -> int:
    """Bytes that an optimizer keeps of each parameter on the GPU, rounded up.

    What is paged is counted as if it stayed there. Tensors of less than 4096 elements, which bitsandbytes keeps in fp32
    however many bits are asked for, are not told apart: a model has some hundreds of them at most, so a few MiB.
    """
    name = str(getattr(optim, "value", optim))
    moments = next((count for part, count in _MOMENTS.items() if part in name), 2)  # Adam and what comes of it
    if name in OF_BITSANDBYTES and name.endswith("8bit"):
        return moments + 1  # a byte each, and a scale every 256
    return 4 * moments


def check_numbers(config: Any) -> None:
    """Raise ValueError where an option is not a finite number of the right kind and size, or None by default."""
    for name, whole, least, inclusive in _LIMITS:
        value = getattr(config, name)
        if value is None and name in _NONE_FOR_NO_LIMIT:
            continue
        if value is not None or not is_default(config, name):
            _check_number(name, value, whole, least, inclusive)
    if config.max_steps != -1:
        _check_number("max_steps", config.max_steps, True, 1, True)
    if config.top_entropy_quantile > 1:
        raise ValueError(
            f"top_entropy_quantile={config.top_entropy_quantile!r} must be a share of the tokens, from 0 to 1 (all)"
        )
    if config.reward_failure_share > 1:
        raise ValueError(
            f"reward_failure_share={config.reward_failure_share!r} is no share of the completions: from 0 to 1 (all)"
        )
    if config.seed >= 2**32:
        raise ValueError(f"seed={config.seed!r} is more than NumPy's random numbers take: lower it below 2^32")
    weights = config.reward_weights
    if weights is not None and (isinstance(weights, str) or not isinstance(weights, Iterable)):
        raise ValueError(f"reward_weights={weights!r} must be a list of numbers, one for each reward function")
    for weight in weights or []:
        _check_number("reward_weights", weight, False, -math.inf, False)


def is_default(config: Any, name: str) -> bool:
    """Whether `config`'s value of the dataclass field `name` asks for nothing but what happens anyway."""
    value = getattr(config, name)
    option = next(option for option in fields(config) if option.name == name)
    default = option.default_factory() if option.default_factory is not MISSING else option.default
    if name == "accelerator_config":  # transformers replaces None by the object, and to_dict() that by a dict
        given = value.to_dict() if isinstance(value, AcceleratorConfig) else value
        default = AcceleratorConfig().to_dict()
        return value is None or (isinstance(given, dict) and all(default.get(key) == given[key] for key in given))
    return value == default or value in ALSO_ACCEPTED.get(name, ())


def _because(name: str) -> str:
    return f" ({_WHY[name]})" if name in _WHY else ""


def _check_number(name: str, value: object, whole: bool, least: float, inclusive: bool) -> None:
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{name}={value!r} must be {kind}, not {type(value).__name__}{_because(name)}")
    if not math.isfinite(value) or value < least or (value == least and not inclusive):
        bound = (f" of at least {least:g}" if inclusive else f" above {least:g}") if math.isfinite(least) else ""
        raise ValueError(f"{name}={value!r} must be {kind}{bound}{_because(name)}")
