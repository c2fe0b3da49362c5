"""The token ledger: what is derived from it, and what it refuses."""

import pytest
from colora.rollout.trajectory import Segment, Trajectory


def conversation():
    segments = [
        Segment([5, 6], "model", [-0.5, -1.5]),
        Segment([7, 8, 9], "environment"),
        Segment([4], "model", [-0.25]),
    ]
    return Trajectory("a", [1, 2, 3], segments)


def test_views_of_a_turn_with_an_environment_in_between():
    trajectory = conversation()
    assert trajectory.completion_ids == [5, 6, 7, 8, 9, 4]
    assert trajectory.completion_mask == [1, 1, 0, 0, 0, 1]
    assert trajectory.logprobs == [-0.5, -1.5, 0.0, 0.0, 0.0, -0.25]
    assert trajectory.num_sampled == 3


def test_empty_completion():
    trajectory = Trajectory("a", [1])
    assert (trajectory.completion_ids, trajectory.completion_mask, trajectory.logprobs, trajectory.num_sampled) == (
        [],
        [],
        [],
        0,
    )


def test_trajectories_do_not_share_segments():
    first, second = Trajectory("a", [1]), Trajectory("b", [1])
    first.segments.append(Segment([2], "model", [-1.0]))
    assert second.segments == []


@pytest.mark.parametrize(("logprobs", "count"), [(None, "none"), ([-1.0], "1"), ([-1.0] * 3, "3")])
def test_sampled_tokens_need_their_logprobs(logprobs, count):
    with pytest.raises(ValueError, match=f"2 sampled tokens need as many log-probs, got {count}"):
        Segment([1, 2], "model", logprobs)


def test_environment_tokens_have_none():
    with pytest.raises(ValueError, match="environment tokens were not sampled"):
        Segment([1, 2], "environment", [-1.0, -2.0])
