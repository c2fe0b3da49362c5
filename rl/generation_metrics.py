"""What is logged of a generation: lengths, rewards, and how dynamic sampling went."""

import logging
import math
from collections.abc import Sequence

import torch

from ..rewards.runner import RewardScores
from ..rollout.records import RolloutRecord
from ..rollout.trajectory import Trajectory
from .advantages import nanstd
from .metrics import Metrics
from .rating import reward_values

logger = logging.getLogger(__name__)


def note_rounds(metrics: Metrics, signal: Sequence[bool], wanted: int, rounds: int, step: int) -> None:
    """How dynamic sampling went, with a warning where the batch could not be filled.

    Args:
        signal: of every group that was generated.
        wanted: groups that are used.
    """
    metrics.add("dynamic_sampling/rounds", rounds)
    metrics.add("dynamic_sampling/groups_thrown_away", len(signal) - wanted)
    metrics.add("dynamic_sampling/frac_groups_without_signal", 1 - sum(signal) / len(signal))
    if sum(signal) < wanted:
        logger.warning(
            "step %d: dynamic sampling found a signal in %d of %d groups in %d rounds, %d were wanted; the batch is "
            "filled with groups without one. Look at the rewards: are the prompts too easy, too hard, or the rewards "
            "all the same? dynamic_sampling_max_rounds sets the limit",
            *(step, sum(signal), len(signal), rounds, wanted),
        )


def note_lengths(metrics: Metrics, trajectories: Sequence[Trajectory]) -> None:
    """Sampled tokens of the completions; "terminated" ones ended with a stop token."""
    lengths = [trajectory.num_sampled for trajectory in trajectories]
    terminated = [t.num_sampled for t in trajectories if t.finish_reason == "stop"] or [0]
    metrics.add("completions/mean_length", sum(lengths) / len(lengths))
    metrics.add("completions/min_length", min(lengths))
    metrics.add("completions/max_length", max(lengths))
    metrics.add("completions/clipped_ratio", sum(t.finish_reason == "length" for t in trajectories) / len(lengths))
    metrics.add("completions/mean_terminated_length", sum(terminated) / len(terminated))
    metrics.add("completions/min_terminated_length", min(terminated))
    metrics.add("completions/max_terminated_length", max(terminated))


def note_rewards(metrics: Metrics, records: Sequence[RolloutRecord], scores: Sequence[RewardScores]) -> None:
    """The reward functions' figures; `reward` is what they and `overlong` sum to, without a KL."""
    names = list(records[0].rewards)
    for name, values in zip(names, reward_values(records, names).unbind(dim=1), strict=True):
        metrics.add(f"rewards/{name}/mean", torch.nanmean(values).item())
        metrics.add(f"rewards/{name}/std", nanstd(values).item())
    for name in scores[0].seconds:
        metrics.add(f"time/reward/{name}_s", sum(part.seconds[name] for part in scores))
    metrics.add("time/reward_hidden_s", sum(part.hidden_seconds for part in scores))
    totals = torch.tensor([math.nan if record.reward is None else record.reward for record in records])
    metrics.add("reward", torch.nanmean(totals).item())
    metrics.add("reward_std", nanstd(totals).item())
    failures = [failure for part in scores for failure in part.failures]
    metrics.add("rewards/failures", len(failures))
    for kind in sorted({failure.kind for failure in failures}):
        metrics.add(f"rewards/failures/{kind}", sum(failure.kind == kind for failure in failures))
    for name in dict.fromkeys(name for part in scores for name in part.metrics):
        parts = [(part.metrics[name], len(part.values)) for part in scores if name in part.metrics]
        metrics.add(name, sum(value * count for value, count in parts) / sum(count for _, count in parts))
