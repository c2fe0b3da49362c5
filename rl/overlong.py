"""DAPO's soft punishment of completions that come near the length limit."""

from collections.abc import Mapping

from ..rewards.length import linear_penalty
from ..rollout.trajectory import Trajectory

OVERLONG = "overlong"  # its name among the rewards of records and metrics


def overlong_reward(sampled_tokens: int, max_tokens: int, buffer: int) -> float:
    """0 up to `max_tokens - buffer` tokens, then falling linearly to -1 at `max_tokens` (DAPO, 2503.14476, eq. 13).

    Args:
        sampled_tokens: what the model sampled of the completion; tokens of an environment do not count.
        max_tokens: the limit on a completion's tokens; more give -1 as well.
        buffer: length of the fall in tokens, above 0.
    """
    return linear_penalty(sampled_tokens, max_tokens - buffer, max_tokens)


def with_overlong(
    rewards: Mapping[str, float | None], trajectory: Trajectory, max_tokens: int, buffer: int
) -> dict[str, float | None]:
    """The rewards and, where `buffer` is above 0, `overlong`: None where no reward function scored the completion."""
    if not buffer:
        return dict(rewards)
    scored = any(value is not None for value in rewards.values())
    shaped = overlong_reward(trajectory.num_sampled, max_tokens, buffer)
    return {**rewards, OVERLONG: shaped if scored else None}
