"""Rules about several options of `GRPOConfig` at once: combinations that cannot work, or hardly do what was meant.

Each rule is a sentence. `refusals` stop the run before a model is loaded; `warnings_about` go through `warnings.warn`;
`remarks` are for whoever asks, as `colora train --dry-run` does.
"""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

from ..rollout.vllm_options import TEMPERATURES
from .option_values import is_default

logger = logging.getLogger(__name__)

TOKEN_SUMS = ("bnpo", "dapo", "dr_grpo", "cispo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # losses with the clip range [1 - epsilon, 1 + epsilon_high]
SEQUENCE_LEVELS = ("sequence", "sequence_token")
# Options that only some losses read.
_READ_BY: dict[str, tuple[str, ...]] = {
    "epsilon": (*CLIPPED, "gmpo"),
    "epsilon_high": (*CLIPPED, "gmpo", "cispo"),
    "delta": CLIPPED,
    "sapo_temperature_neg": ("sapo",),
    "sapo_temperature_pos": ("sapo",),
    "vespo_k_pos": ("vespo",),
    "vespo_lambda_pos": ("vespo",),
    "vespo_k_neg": ("vespo",),
    "vespo_lambda_neg": ("vespo",),
}
# What an advantage estimator can be scaled by, and why by nothing else.
_SCALES: dict[str, tuple[tuple[str, ...], str]] = {
    "rloo": (("none", "batch"), "divided by the group's deviation it would be the estimator `group` times n / (n - 1)"),
    "reinforce_pp": (("batch",), "it is the reward, whitened over the batch"),
    "reinforce_pp_baseline": (("batch",), "it is the reward less its group's mean, whitened over the batch"),
    "maxrl": (("none",), "it divides by the group's mean reward, not by a deviation"),
}
LONG_COMPLETION = 1024  # tokens over which a gap of some thousandths of a nat each adds up to more than a nat


def check_combinations(config: Any) -> None:
    """Raise ValueError for the first combination that cannot work."""
    for refusal in refusals(config):
        raise ValueError(refusal)


def warn_of_combinations(config: Any) -> None:
    """Warn of combinations that hardly do what was meant; a remark goes to the log, at level INFO."""
    for text in warnings_about(config):
        warnings.warn(text, stacklevel=5)  # whoever calls GRPOConfig
    for text in remarks(config):
        logger.info(text)


def refusals(config: Any) -> Iterator[str]:
    """Which options contradict each other, why, and what to do."""
    yield from _advantage_refusals(config)
    yield from _reward_refusals(config)
    yield from _ratio_refusals(config)
    low, high = TEMPERATURES
    if config.engine == "vllm" and not low <= config.temperature <= high:
        yield (
            f"temperature={config.temperature:g} with engine='vllm': vLLM samples from {low:g} to {high:g}; "
            "change the temperature, or set engine='transformers'"
        )


def warnings_about(config: Any) -> Iterator[str]:
    """What works, but hardly as it was meant."""
    yield from _unread_options(config)
    yield from _clip_warnings(config)
    yield from _kl_warnings(config)
    yield from _correction_warnings(config)
    if config.mask_truncated_completions and config.overlong_buffer:
        yield (
            "mask_truncated_completions=True with overlong_buffer: a completion that reaches the limit is not trained "
            "on, so the penalty acts on it only through the mean of its group; the papers use one of the two"
        )
    if config.preset and len(config.preset) == 1:
        yield f"algorithm={config.algorithm!r} sets nothing: all that it would set is given"
    if not config.dynamic_sampling and not is_default(config, "dynamic_sampling_max_rounds"):
        yield "dynamic_sampling_max_rounds has no effect without dynamic_sampling=True"
    if config.detector_limits and not config.detectors:
        yield "detector_limits has no effect with detectors=False"
    of_checkpointing = {"activation_offload": config.activation_offload == "true"}
    of_checkpointing["mlp_tile_tokens"] = config.mlp_tile_tokens is not None
    for name in (name for name, asked in of_checkpointing.items() if asked and not config.gradient_checkpointing):
        yield f"{name} has no effect with gradient_checkpointing=False, which keeps everything for the backward pass"


def remarks(config: Any) -> Iterator[str]:
    """What is as it should be, and worth knowing."""
    if config.updates_per_generation == 1:
        yield (
            "one update for each generation: the ratio is 1 but for the gap between engine and trainer, so clip ranges "
            "hardly act, and algorithms differ in their advantages and normalisers; steps_per_generation or "
            "num_iterations makes more updates"
        )


def _advantage_refusals(config: Any) -> Iterator[str]:
    estimator, scale = config.advantage_estimator, config.scale_rewards
    scales, why = _SCALES.get(estimator, ((scale,), ""))
    if scale not in scales:
        yield (
            f"scale_rewards={scale!r} cannot be used with advantage_estimator={estimator!r}: {why}. Set scale_rewards "
            f"to {' or '.join(scales)}, or leave it out"
        )
    if config.multi_objective_aggregation == "normalize_then_sum":
        name = "multi_objective_aggregation='normalize_then_sum' (GDPO)"
        if estimator != "group":
            yield (
                f"{name} cannot be used with advantage_estimator={estimator!r}: it has a baseline and a scale of its "
                "own. Set advantage_estimator to group, or the aggregation to sum_then_normalize"
            )
        if scale != "group":
            yield (
                f"{name} cannot be used with scale_rewards={scale!r}: it divides by each function's deviation within "
                "its group, then by the batch's. Set scale_rewards to group, or the aggregation to sum_then_normalize"
            )
        if config.kl_in_reward:
            yield (
                f"{name} cannot be used with kl_in_reward=True: the KL would be normalised like a reward, and beta "
                "lose its meaning. Set kl_in_reward to false"
            )
    if config.dynamic_sampling and estimator == "reinforce_pp":
        yield (
            "dynamic_sampling=True cannot be used with advantage_estimator='reinforce_pp': rewards are compared with "
            "the whole batch, so a group whose rewards are equal has a signal too. Set dynamic_sampling to false, or "
            "the estimator to reinforce_pp_baseline"
        )


def _reward_refusals(config: Any) -> Iterator[str]:
    if config.kl_in_reward and not config.beta:
        yield (
            "kl_in_reward=True with beta=0: nothing would be taken from the rewards. Set beta, or kl_in_reward to false"
        )
    if config.overlong_buffer >= config.max_completion_length:
        yield (
            f"overlong_buffer={config.overlong_buffer} must be less than max_completion_length="
            f"{config.max_completion_length}, of which it is the last part: lower it"
        )
    if not config.overlong_buffer and not is_default(config, "overlong_penalty"):
        yield (
            f"overlong_penalty={config.overlong_penalty:g} without overlong_buffer: nothing is penalised; set "
            "overlong_buffer to the number of tokens over which the penalty rises"
        )
    if config.advantage_estimator == "maxrl":
        negative = {"kl_in_reward": config.kl_in_reward, "overlong_buffer": config.overlong_buffer}
        for name in (name for name, value in negative.items() if value):
            yield (
                f"{name}={negative[name]} cannot be used with advantage_estimator='maxrl', which divides by the mean "
                "reward: rewards must not be negative. Leave it out; the KL can be in the loss, and "
                "mask_truncated_completions leaves overlong completions out"
            )


def _ratio_refusals(config: Any) -> Iterator[str]:
    loss, level, mode = config.loss_type, config.importance_sampling_level, config.vllm_importance_sampling_mode
    if loss in ("vespo", "gmpo") and level != "token":
        yield (
            f"importance_sampling_level={level!r} cannot be used with loss_type={loss!r}, which makes its own weight "
            "of a sequence from the tokens' ratios: leave it at token"
        )
    if loss == "vespo" and config.vllm_importance_sampling_correction and not mode.startswith("token"):
        yield (
            f"vllm_importance_sampling_mode={mode!r} cannot be used with loss_type='vespo', which takes the product "
            "over the tokens itself: set it to token_truncate or token_mask"
        )
    if loss == "cispo" and (config.epsilon_high is None or config.epsilon_high < 1):
        yield (
            f"epsilon_high={config.epsilon_high} with loss_type='cispo': there it is the largest ratio itself, so that "
            "a value below 1 would scale every token down. Set it to 5.0 (ScaleRL), or use algorithm: cispo"
        )
    least, most = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if least is not None and most is not None and least >= most:
        yield (
            f"vllm_importance_sampling_clip_min={least:g} must be below vllm_importance_sampling_clip_max={most:g}: "
            "lower it, or leave it out"
        )


def _unread_options(config: Any) -> Iterator[str]:
    for name, readers in _READ_BY.items():
        if config.loss_type not in readers and not is_default(config, name):
            yield f"{name} has no effect with loss_type={config.loss_type!r}: {', '.join(readers)} read it"
    if not config.beta:
        for name in ("kl_estimator", "use_bias_correction_kl"):
            if not is_default(config, name):
                yield f"{name} has no effect without a KL penalty: beta is 0"
    if not config.vllm_importance_sampling_correction:
        for name in ("mode", "clip_max", "clip_min"):
            if not is_default(config, f"vllm_importance_sampling_{name}"):
                yield f"vllm_importance_sampling_{name} has no effect without vllm_importance_sampling_correction"


def _clip_warnings(config: Any) -> Iterator[str]:
    loss, level = config.loss_type, config.importance_sampling_level
    widest = max(config.epsilon, config.epsilon_high or 0.0)
    if loss in CLIPPED and level in SEQUENCE_LEVELS and widest > 0.01:
        yield (
            f"epsilon={config.epsilon:g}, epsilon_high={config.epsilon_high} with importance_sampling_level={level!r}: "
            "the ratio of a sequence is a mean over its tokens and hardly leaves 1, so this never clips. GSPO has 3e-4 "
            "and 4e-4, LUSPO 2e-3 and 2.5e-3: use algorithm: gspo or luspo"
        )
    if loss in CLIPPED and level == "token" and 0 < widest < 0.01:
        yield (
            f"epsilon={config.epsilon:g} with importance_sampling_level='token': the ratio of a token leaves so narrow "
            "a range at once, and most tokens lose their gradient. It is a range for sequences (algorithm: gspo); 0.2 "
            "is usual for tokens"
        )
    if loss in CLIPPED and (config.epsilon_high or 0.0) >= 1:
        yield (
            f"epsilon_high={config.epsilon_high:g} with loss_type={loss!r}: ratios above 1 are hardly ever clipped. As "
            "the largest ratio itself it belongs to loss_type cispo; 0.2 to 0.28 is usual"
        )
    if level in SEQUENCE_LEVELS and loss in TOKEN_SUMS:
        yield (
            f"loss_type={loss!r} with importance_sampling_level={level!r}: token losses are summed, so a sequence "
            "weighs as much as it is long. GSPO has loss_type grpo; LUSPO (loss_type luspo) weighs by length on purpose"
        )
    if loss == "luspo" and level == "token":
        yield "loss_type='luspo' with importance_sampling_level='token': LUSPO has the sequence's ratio; set `sequence`"
    if config.delta is not None and loss in CLIPPED:
        top = 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
        if config.delta <= top:
            yield f"delta={config.delta:g} is not above 1 + epsilon_high = {top:g}: it clips where epsilon_high should"
    if config.old_logprobs == "engine" and level in SEQUENCE_LEVELS:
        yield (
            f"old_logprobs='engine' with importance_sampling_level={level!r}: the clip range is narrower than the gap "
            "between engine and trainer in bfloat16, so it clips that gap. Set old_logprobs to trainer"
        )


def _kl_warnings(config: Any) -> Iterator[str]:
    if not config.beta or config.kl_in_reward:
        return
    if config.kl_estimator == "k1" and not config.use_bias_correction_kl:
        yield (
            "kl_estimator='k1' in the loss without use_bias_correction_kl: its gradient is zero on average, so beta "
            "does nothing but add noise. Set kl_in_reward=True, or kl_estimator to k2"
        )
    if config.kl_estimator == "k2" and config.use_bias_correction_kl:
        yield (
            "kl_estimator='k2' with use_bias_correction_kl=True: the gradient of k2 is that of the KL divergence "
            "already, and the ratio spoils it. Set use_bias_correction_kl to false"
        )


def _correction_warnings(config: Any) -> Iterator[str]:
    """Of `vllm_importance_sampling_...`."""
    if not config.vllm_importance_sampling_correction:
        return
    mode, least = config.vllm_importance_sampling_mode, config.vllm_importance_sampling_clip_min
    if mode in ("sequence_truncate", "sequence_mask") and config.max_completion_length > LONG_COMPLETION:
        yield (
            f"vllm_importance_sampling_mode={mode!r} with max_completion_length={config.max_completion_length}: the "
            "gap between engine and trainer adds up over a completion, and long ones leave the bounds for that alone. "
            "token_truncate (the default) and the sequence_mean modes do not depend on the length"
        )
    if mode.endswith("_truncate") and least is not None:
        yield (
            f"vllm_importance_sampling_clip_min={least:g} with mode {mode!r}: weights below it are raised to it, so "
            "what the trainer finds unlikely counts for more than it should. To leave such tokens out use a `_mask` "
            "mode"
        )
