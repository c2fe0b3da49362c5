"""Advantages from rewards: how much better a completion is than the others of its group."""

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-4  # added to the standard deviation, as in TRL


@dataclass(frozen=True)
class Advantages:
    """All (completions,) fp32, in the order of the rewards.

    Attributes:
        advantages: 0 where no reward function scored the completion.
        rewards: weighted sum over the functions, NaN where none scored.
        zero_std: whether the completion's group (or batch) has no spread in its rewards.
        informative: False where the completion cannot move the policy, so that it need not be forwarded.
    """

    advantages: Tensor
    rewards: Tensor
    zero_std: Tensor
    informative: Tensor


def nanstd(values: Tensor, dim: int | None = None) -> Tensor:
    """Unbiased standard deviation that ignores NaN; NaN where fewer than two values are left."""
    mean = torch.nanmean(values, dim=dim, keepdim=True)
    variance = torch.nanmean((values - mean) ** 2, dim=dim, keepdim=True)
    count = (~torch.isnan(values)).sum(dim=dim, keepdim=True)
    bessel = torch.where(count > 1, count / (count - 1), torch.nan)
    std = torch.sqrt(variance * bessel)
    return std.squeeze() if dim is None else std.squeeze(dim)


def compute_advantages(
    values: Tensor, weights: Tensor, num_generations: int, scale: str = "group", aggregation: str = "sum_then_normalize"
) -> Advantages:
    """Group-relative advantages (DeepSeekMath, arXiv 2402.03300, section 4.1.2), A_i = (R_i - mean R) / (std R + 1e-4).

    Args:
        values: (completions, functions) fp32, each group's completions consecutive; NaN: the function did not score.
        weights: (functions,).
        num_generations: completions of a group, at least 1.
        scale: `group` and `batch` divide by the standard deviation over the group or over all completions; `none`
            does not divide (Dr. GRPO, arXiv 2503.20783, section 3.2).
        aggregation: `sum_then_normalize` weighs and sums the functions first; `normalize_then_sum` normalises each
            function within its group, sums, and normalises the sum over the batch (GDPO, arXiv 2601.05242).
    """
    unscored = torch.isnan(values).all(dim=1)
    rewards = (values * weights).nansum(dim=1)
    rewards[unscored] = torch.nan
    if aggregation == "normalize_then_sum":
        grouped = values.view(-1, num_generations, values.shape[1])
        std = nanstd(grouped, dim=1)[:, None] if num_generations > 1 else torch.zeros_like(grouped)
        each = ((grouped - torch.nanmean(grouped, dim=1, keepdim=True)) / (std + EPSILON)).view(values.shape)
        total = (each * weights).nansum(dim=1)
        total[unscored] = torch.nan
        total_std = nanstd(total).expand_as(total) if total.numel() > 1 else torch.zeros_like(total)
        advantages = torch.nan_to_num((total - torch.nanmean(total)) / (total_std + EPSILON), nan=0.0)
        return Advantages(advantages, rewards, torch.isclose(total_std, torch.zeros_like(total_std)), advantages != 0)
    if aggregation != "sum_then_normalize":
        raise ValueError(
            f"multi_objective_aggregation={aggregation!r}: known are 'sum_then_normalize', 'normalize_then_sum'"
        )

    groups = rewards.view(-1, num_generations)
    group_std = nanstd(groups, dim=1) if num_generations > 1 else torch.zeros(len(groups))
    group_std = group_std.repeat_interleave(num_generations)
    std = nanstd(rewards).expand_as(rewards) if scale == "batch" and rewards.numel() > 1 else group_std
    advantages = rewards - torch.nanmean(groups, dim=1).repeat_interleave(num_generations)
    if scale in ("group", "batch"):
        advantages = advantages / (std + EPSILON)
    elif scale != "none":
        raise ValueError(f"scale_rewards={scale!r}: known are 'group', 'batch', 'none'")
    advantages = torch.nan_to_num(advantages, nan=0.0)
    flat_group = torch.isclose(group_std, torch.zeros_like(group_std))
    return Advantages(advantages, rewards, torch.isclose(std, torch.zeros_like(std)), (advantages != 0) & ~flat_group)
