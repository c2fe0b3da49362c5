"""The numbers that detectors look at, on groups made by hand, and a course of rewards like that of the demo."""

import random

import numpy as np
import pytest
from colora.rl.detector_limits import DetectorLimits
from colora.rl.detector_signals import Components, Spread, Trend, duplicate_share
from colora.rl.detectors import Detectors
from colora.rl.metrics import Metrics
from colora.rollout.records import RolloutRecord
from colora.rollout.trajectory import Segment, Trajectory

NAN = float("nan")


def record(rewards: dict[str, float | None], tokens: list[int], total: float | None = None) -> RolloutRecord:
    trajectory = Trajectory("1/0/0", [1], [Segment(tokens, "model", [0.0] * len(tokens))])
    scored = [value for value in rewards.values() if value is not None]
    return RolloutRecord(1, 0, 0, trajectory, "1+1=", "2", rewards, sum(scored) if total is None else total, 0.0)


def test_the_spread_of_groups_leaves_out_what_was_not_scored() -> None:
    spread = Spread.of(np.array([[1.0, 3.0, NAN], [0.1, 0.1, 0.1], [5.0, NAN, NAN], [NAN, NAN, NAN]]))
    assert spread.means.tolist() == [2.0, pytest.approx(0.1)]
    assert spread.stds.tolist() == [1.0, 0.0]


def test_shares_of_the_variance_are_covariances_with_the_total() -> None:
    """By hand: a varies in the first group by (0, 2), b in both by (0, 1); with weight 3 b is (0, 3).

    Totals vary by (0, 5) and (0, 3): sums of squares 12.5 and 4.5. a shares 0.5 * 2 * 5 = 5, b 0.5 * 3 * 5 + 4.5 = 12.
    """
    values = [(0.0, 0.0), (2.0, 1.0), (7.0, 0.0), (7.0, 1.0)]
    records = [record({"a": a, "b": b, "c": None}, [1]) for a, b in values]
    found = Components.of(records, 2, {"a": 1.0, "b": 3.0, "c": 1.0, "absent": 1.0})
    assert found is not None
    assert found.shares == pytest.approx({"a": 5 / 17, "b": 12 / 17, "c": 0.0})
    assert found.varying == {"a": 0.5, "b": 1.0, "c": 0.0}


def test_components_take_two_that_weigh_and_some_variance() -> None:
    records = [record({"a": value, "b": 1.0}, [1]) for value in (0.0, 1.0)]
    assert Components.of(records, 2, {"a": 1.0, "b": 0.0}) is None
    assert Components.of(records[:1] * 2, 2, {"a": 1.0, "b": 1.0}) is None


def test_duplicates_are_those_that_came_before_in_the_group() -> None:
    texts = [[1, 2], [1, 2], [1, 2], [3], [1, 2], [4], [5], [6]]
    assert duplicate_share([record({"a": 1.0}, tokens) for tokens in texts], 4) == 2 / 8


def test_levels_are_of_the_first_and_the_last_window() -> None:
    trend = Trend(2)
    for number, value in enumerate([1.0, NAN, 3.0, 10.0], start=1):
        assert not trend.compares
        trend.add(value)
        assert trend.whole == (number >= 3)
    trend.add(20.0)
    assert trend.compares and (trend.early, trend.recent) == (2.0, 15.0)
    assert Trend(2, **trend.state()).state() == trend.state()


def observe(course, groups: int = 16, size: int = 16) -> list[str]:
    """What the detectors say of a run: `course(step, random)` gives the records of a group."""
    said: list[str] = []
    detectors = Detectors(DetectorLimits(), {"correct": 1.0}, lambda step, text: said.append(text))
    rng = random.Random(0)
    for step in range(1, 101):
        records = [each for _ in range(groups) for each in course(step, rng)]
        detectors.observe(records, size, step, Metrics())
    return said


def binary(step: int, rng: random.Random, hard: float, solved_from: int) -> list[RolloutRecord]:
    """A problem whose answers, three digits, are right with a chance that rises from 1/3 to nearly 1, or stays 0."""
    chance = 0.0 if rng.random() < hard else min(0.33 + 0.66 * step / solved_from, 0.995)
    right = [rng.random() < chance for _ in range(16)]
    return [record({"correct": float(each)}, [1, 2, 3 if each else rng.randrange(9)]) for each in right]


def test_a_task_that_is_learned_to_its_end_is_no_collapse() -> None:
    """Like the demo: at last nearly all groups are right, their rewards equal and their short answers the same."""
    assert observe(lambda step, rng: binary(step, rng, hard=0.1, solved_from=50)) == []


def test_hard_problems_alone_are_no_collapse_either() -> None:
    assert observe(lambda step, rng: binary(step, rng, hard=0.7, solved_from=200)) == []


def test_rewards_that_come_near_each_other_without_being_equal_are() -> None:
    """A reward with a little noise, and a policy that settles where it is mediocre."""

    def course(step: int, rng: random.Random) -> list[RolloutRecord]:
        spread = 1.0 if step <= 50 else 0.01
        return [record({"correct": 0.5 + spread * (rng.random() - 0.5)}, [rng.randrange(99)]) for _ in range(16)]

    (text,) = observe(course)[:1]
    assert text.startswith("reward variance collapse")


def test_a_detector_warns_again_only_after_it_has_let_go() -> None:
    def course(step: int, rng: random.Random) -> list[RolloutRecord]:
        tokens = 100 if 30 < step <= 50 or step > 80 else 20
        return [record({"correct": rng.random()}, [rng.randrange(99) for _ in range(tokens)]) for _ in range(16)]

    assert [text[:12] for text in observe(course)] == ["length drift", "length drift"]


@pytest.mark.parametrize(
    ("training", "held_out", "warns_at"),
    [
        ([0.2, 0.4, 0.6, 0.8], [0.5, 0.4, 0.3, 0.2], 3),  # the second evaluation that is lower
        ([0.2, 0.4, 0.6, 0.8], [0.5, 0.6, 0.5, 0.4], 4),
        ([0.2, 0.2, 0.2, 0.2], [0.5, 0.4, 0.3, 0.2], None),  # nothing is learned in training either
        ([0.2, 0.4, 0.6, 0.8], [0.5, 0.4, 0.5, 0.4], None),  # back at its best in between
        ([0.2, 0.4, 0.6, 0.8], [0.5, 0.49, 0.48, 0.47], None),  # within two standard errors, sqrt(2) * 0.01 each
    ],
)
def test_held_out_rewards_that_fall_while_training_rewards_rise(
    training: list[float], held_out: list[float], warns_at: int | None
) -> None:
    """Nine held-out prompts, whose rewards have a deviation of 0.03 around their mean: a standard error of 0.01."""
    said: list[int] = []
    detectors = Detectors(DetectorLimits(window=3), {"correct": 1.0}, lambda step, text: said.append(step))
    offsets = np.array([-1.0, 0.0, 1.0] * 3)
    offsets *= 0.03 / offsets.std(ddof=1)
    for evaluation, (level, result) in enumerate(zip(training, held_out, strict=True), start=1):
        for number in range(3):
            group = [record({"correct": level + 0.01 * number}, [number]), record({"correct": level}, [9])]
            detectors.observe(group, 2, evaluation, Metrics())
        records = [record({"correct": result + offset}, [1]) for offset in offsets.tolist()]
        found = detectors.evaluated("eval", records, 1, evaluation)
        best = max(held_out[:evaluation])
        assert found == {"eval_detectors/held_out_fall": pytest.approx(best - result, abs=1e-9)}
    assert said == ([] if warns_at is None else [warns_at])
