"""Advantages from rewards: how much better a completion is than those it is compared with.

Pure functions of the rewards, in whatever floating-point type these have. R_i is the reward of completion i, a group is
the n scored completions of one prompt, the batch is all groups. A reward of NaN was not scored: it enters no mean and
no deviation, and its advantage is 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-4  # added to a standard deviation, as in TRL


@dataclass(frozen=True)
class Advantages:
    """All (completions,) in the order of the rewards.

    Attributes:
        advantages: 0 where no reward function scored the completion.
        rewards: weighted sum over the functions, NaN where none scored.
        zero_std: whether the deviation that is divided by, or would be, is 0 (TRL's `frac_reward_zero_std`).
        informative: False where the completion cannot move the policy, so that it need not be forwarded: its advantage
            is 0, or is a rounding error because all that it is compared with got the same reward.
    """

    advantages: Tensor
    rewards: Tensor
    zero_std: Tensor
    informative: Tensor


def nanstd(values: Tensor, dim: int | None = None) -> Tensor:
    """Unbiased standard deviation that ignores NaN; NaN where fewer than two values are left."""
    mean = torch.nanmean(values, dim=dim, keepdim=True)
    variance = torch.nanmean((values - mean) ** 2, dim=dim, keepdim=True)
    count = (~torch.isnan(values)).sum(dim=dim, keepdim=True).to(values.dtype)
    bessel = torch.where(count > 1, count / (count - 1), torch.nan)
    std = torch.sqrt(variance * bessel)
    return std.squeeze() if dim is None else std.squeeze(dim)


def total_rewards(values: Tensor, weights: Tensor) -> Tensor:
    """(completions,) weighted sums of `values` (completions, functions) over those that scored; NaN where none did."""
    total = (values * weights).nansum(dim=1)
    total[torch.isnan(values).all(dim=1)] = torch.nan
    return total


def compute_advantages(
    values: Tensor,
    weights: Tensor,
    num_generations: int,
    scale: str = "group",
    aggregation: str = "sum_then_normalize",
    estimator: str = "group",
) -> Advantages:
    """The advantage of every completion of a batch.

    Args:
        values: (completions, functions), each group's completions consecutive; NaN: the function did not score.
        weights: (functions,).
        num_generations: completions of a group, at least 1.
        scale: what the centred reward is divided by: the standard deviation of its `group` or of the `batch`, or 1
            (`none`). Which of them an estimator takes is in its docstring.
        aggregation: `sum_then_normalize` weighs and sums the functions first; `normalize_then_sum` is GDPO.
        estimator: `group`, `rloo`, `reinforce_pp`, `reinforce_pp_baseline` or `maxrl`; see the functions below.

    Raises:
        ValueError: an unknown name, a combination that the estimator does not define, or a negative reward for maxrl.
    """
    if estimator not in _ESTIMATORS:
        raise ValueError(f"advantage_estimator={estimator!r}: known are {', '.join(map(repr, _ESTIMATORS))}")
    estimate, scales = _ESTIMATORS[estimator]
    if scale not in scales:
        raise ValueError(f"scale_rewards={scale!r}: advantage_estimator={estimator!r} takes {' or '.join(scales)}")
    if aggregation == "normalize_then_sum":
        if estimator != "group":
            raise ValueError(
                f"multi_objective_aggregation={aggregation!r} defines its own baseline and cannot be combined with "
                f"advantage_estimator={estimator!r}"
            )
        return _normalize_then_sum(values, weights, num_generations)
    if aggregation != "sum_then_normalize":
        raise ValueError(
            f"multi_objective_aggregation={aggregation!r}: known are 'sum_then_normalize', 'normalize_then_sum'"
        )
    rewards = total_rewards(values, weights)
    advantages, std = estimate(rewards, num_generations, scale)
    advantages = torch.nan_to_num(advantages, nan=0.0)
    compared = rewards.numel() if estimator == "reinforce_pp" else num_generations
    informative = (advantages != 0) & ~_all_equal(rewards, compared)
    return Advantages(advantages, rewards, torch.isclose(std, torch.zeros_like(std)), informative)


def _group(rewards: Tensor, num_generations: int, scale: str) -> tuple[Tensor, Tensor]:
    """A_i = (R_i - mean R) / (std R + 1e-4) over the group (GRPO, DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    `batch` takes the standard deviation of the rewards over the batch instead; `none` does not divide (Dr. GRPO, arXiv
    2503.20783, section 3.2).
    """
    std = _batch_std(rewards) if scale == "batch" else _group_std(rewards, num_generations)
    advantages = rewards - _group_mean(rewards, num_generations)
    return (advantages if scale == "none" else advantages / (std + EPSILON)), std


def _rloo(rewards: Tensor, num_generations: int, scale: str) -> tuple[Tensor, Tensor]:
    """A_i = R_i - mean of the group's other R_j, which is n / (n - 1) (R_i - mean R) (RLOO, arXiv 2402.14740).

    `none` is the paper's; `batch` whitens these advantages over the batch, TRL's `normalize_advantages`. (Divided by
    the group's deviation it would be the estimator `group` times n / (n - 1).)
    """
    groups = rewards.view(-1, num_generations)
    count = (~torch.isnan(groups)).sum(dim=1, keepdim=True)
    others = (torch.nansum(groups, dim=1, keepdim=True) - groups) / (count - 1)
    advantages = rewards - torch.where(count > 1, others, torch.nan).view(-1)
    return (_whiten(advantages) if scale == "batch" else advantages), _group_std(rewards, num_generations)


def _reinforce_pp(rewards: Tensor, num_generations: int, scale: str) -> tuple[Tensor, Tensor]:
    """A_i = (R_i - mean R) / (std R + 1e-4) over the batch (REINFORCE++, arXiv 2501.03262).

    A group whose rewards are all equal still has a signal: it is better or worse than the rest of the batch.

    With `kl_in_reward` R_i is the return from the first token on, R - beta sum_t KL_t, for all tokens of a completion.
    The paper leaves out of the return of token t the KL of the tokens before it. These do not depend on token
    t, so that the expected gradient is the same; the group estimators need one return for each completion anyway.
    """
    return _whiten(rewards), _batch_std(rewards)


def _reinforce_pp_baseline(rewards: Tensor, num_generations: int, scale: str) -> tuple[Tensor, Tensor]:
    """R_i less the group's mean, whitened over the batch (REINFORCE++ with baseline, arXiv 2501.03262).

    The deviation is that of the centred rewards, not of the rewards as in `group` with scale `batch`.
    """
    centred = rewards - _group_mean(rewards, num_generations)
    return _whiten(centred), _batch_std(centred)


def _maxrl(rewards: Tensor, num_generations: int, scale: str) -> tuple[Tensor, Tensor]:
    """A_i = (R_i - mean R) / mean R over the group, 0 where mean R is 0 (MaxRL, arXiv 2602.02710, algorithm 1).

    The paper derives it for rewards of 0 and 1. It keeps its meaning for others that are not negative; a negative mean
    would turn every advantage around.
    """
    if (rewards < 0).any():
        lowest = torch.nan_to_num(rewards, nan=0.0).min().item()
        raise ValueError(
            f"advantage_estimator='maxrl' divides by the mean reward and needs rewards of at least 0, got {lowest:g}: "
            "shift the reward function or choose another estimator"
        )
    mean = _group_mean(rewards, num_generations)
    return torch.where(mean == 0, 0.0, (rewards - mean) / mean), _group_std(rewards, num_generations)


_Estimator = Callable[[Tensor, int, str], tuple[Tensor, Tensor]]  # (rewards, n, scale) -> advantages, deviation
_ESTIMATORS: dict[str, tuple[_Estimator, tuple[str, ...]]] = {
    "group": (_group, ("group", "batch", "none")),
    "rloo": (_rloo, ("none", "batch")),
    "reinforce_pp": (_reinforce_pp, ("batch",)),
    "reinforce_pp_baseline": (_reinforce_pp_baseline, ("batch",)),
    "maxrl": (_maxrl, ("none",)),
}


def _normalize_then_sum(values: Tensor, weights: Tensor, num_generations: int) -> Advantages:
    """GDPO (arXiv 2601.05242): each function whitened within its group, summed, whitened over the batch."""
    grouped = values.view(-1, num_generations, values.shape[1])
    std = nanstd(grouped, dim=1)[:, None] if num_generations > 1 else torch.zeros_like(grouped)
    each = ((grouped - torch.nanmean(grouped, dim=1, keepdim=True)) / (std + EPSILON)).view(values.shape)
    total = (each * weights).nansum(dim=1)
    total[torch.isnan(values).all(dim=1)] = torch.nan
    total_std = _batch_std(total)
    advantages = torch.nan_to_num((total - torch.nanmean(total)) / (total_std + EPSILON), nan=0.0)
    # The sums of a group add up to 0, and so do those of the batch: a completion without a part in the spread of any
    # function gets 0, up to rounding.
    flat = torch.stack([_all_equal(column, num_generations) for column in values.unbind(dim=1)], dim=1)
    signal = (each.masked_fill(flat, 0.0) * weights).nansum(dim=1) != 0
    zero_std = torch.isclose(total_std, torch.zeros_like(total_std))
    return Advantages(advantages, total_rewards(values, weights), zero_std, (advantages != 0) & signal)


def _group_mean(rewards: Tensor, num_generations: int) -> Tensor:
    return torch.nanmean(rewards.view(-1, num_generations), dim=1).repeat_interleave(num_generations)


def _group_std(rewards: Tensor, num_generations: int) -> Tensor:
    if num_generations == 1:
        return torch.zeros_like(rewards)
    return nanstd(rewards.view(-1, num_generations), dim=1).repeat_interleave(num_generations)


def _batch_std(rewards: Tensor) -> Tensor:
    return nanstd(rewards).expand_as(rewards) if rewards.numel() > 1 else torch.zeros_like(rewards)


def _whiten(values: Tensor) -> Tensor:
    return (values - torch.nanmean(values)) / (_batch_std(values) + EPSILON)


def _all_equal(rewards: Tensor, size: int) -> Tensor:
    """(completions,): whether the scored rewards of each `size` consecutive ones are all the same number."""
    groups, unscored = rewards.view(-1, size), torch.isnan(rewards).view(-1, size)
    highest = groups.masked_fill(unscored, -torch.inf).amax(dim=1)
    lowest = groups.masked_fill(unscored, torch.inf).amin(dim=1)
    return (highest <= lowest).repeat_interleave(size)
