"""Advantages against the oracle's plain loops in fp64, their properties, and the cases that loops get wrong."""

import math

import pytest
import torch
from colora.rl.advantages import Advantages, compute_advantages
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..oracle import grpo as oracle

KINDS = [  # estimator, scale, aggregation: every combination there is
    ("group", "group", "sum_then_normalize"),
    ("group", "batch", "sum_then_normalize"),
    ("group", "none", "sum_then_normalize"),
    ("rloo", "none", "sum_then_normalize"),
    ("rloo", "batch", "sum_then_normalize"),
    ("reinforce_pp", "batch", "sum_then_normalize"),
    ("reinforce_pp_baseline", "batch", "sum_then_normalize"),
    ("maxrl", "none", "sum_then_normalize"),
    ("group", "group", "normalize_then_sum"),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["-".join(kind) for kind in KINDS])


def advantages(values: Tensor, kind: tuple[str, str, str], group: int, weights: Tensor | None = None) -> Advantages:
    estimator, scale, aggregation = kind
    weights = torch.ones(values.shape[1], dtype=values.dtype) if weights is None else weights
    return compute_advantages(values, weights, group, scale, aggregation, estimator)


def scored(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


# Rewards as people write them: a few steps of a grid, or not scored.
reward = st.one_of(st.integers(0, 4).map(lambda steps: steps / 4), st.floats(0, 5, width=16), st.just(math.nan))


@every_kind
@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=st.lists(st.tuples(reward, reward), min_size=12, max_size=12), group=st.sampled_from([2, 3, 4, 6]))
def test_equals_the_oracle(kind: tuple[str, str, str], values: list[tuple[float, float]], group: int) -> None:
    rewards, weights = torch.tensor(values, dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
    estimator, scale, aggregation = kind
    options = oracle.Options(
        num_generations=group,
        scale_rewards=scale,
        advantage_estimator=estimator,
        multi_objective_aggregation=aggregation,
    )
    ours = advantages(rewards, kind, group, weights)
    torch.testing.assert_close(ours.advantages, oracle.advantages(rewards, weights, options), rtol=1e-10, atol=1e-10)
    assert not ours.advantages[torch.isnan(rewards).all(dim=1)].any()
    # What is left out is what is 0: nothing that would move the policy, and nothing that would not.
    torch.testing.assert_close(ours.informative, ours.advantages.abs() > 1e-10)


def test_known_values() -> None:
    result = compute_advantages(torch.tensor([[1.0], [0.0], [3.0], [3.0]]), torch.ones(1), num_generations=2)
    half_range = 0.5 / (math.sqrt(0.5) + 1e-4)
    torch.testing.assert_close(result.advantages, torch.tensor([half_range, -half_range, 0.0, 0.0]))
    assert result.informative.tolist() == [True, True, False, False]
    assert result.zero_std.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (KINDS[3], [1.0, -1 / 3, -1 / 3, -1 / 3]),  # against the mean of the three others
        (KINDS[5], [1.5, -0.5, -0.5, -0.5]),
        (KINDS[7], [3.0, -1.0, -1.0, -1.0]),  # one success in four: three times the mean above it
    ],
)
def test_one_success_among_four(kind: tuple[str, str, str], expected: list[float]) -> None:
    torch.testing.assert_close(
        advantages(scored([1, 0, 0, 0]), kind, 4).advantages, scored(expected)[:, 0], rtol=1e-3, atol=0
    )


def test_rloo_is_the_centred_reward_times_n_over_n_minus_1_of_those_scored() -> None:
    values = scored([0.5, math.nan, 2.0, 0.0, 1.0, 1.5])
    rloo = advantages(values, KINDS[3], 3).advantages.view(2, 3)
    centred = advantages(values, KINDS[2], 3).advantages.view(2, 3)
    torch.testing.assert_close(rloo, centred * torch.tensor([[2.0], [1.5]]), rtol=1e-12, atol=1e-12)


@every_kind
def test_shift_scale_and_sum(kind: tuple[str, str, str]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(24, 1, dtype=torch.float64, generator=generator) * 100
    result = advantages(values, kind, 4).advantages
    assert result.abs().max() > 0.5
    if kind[0] == "maxrl":
        torch.testing.assert_close(advantages(values * 10, kind, 4).advantages, result)
    else:
        torch.testing.assert_close(advantages(values + 7, kind, 4).advantages, result, rtol=1e-9, atol=1e-9)
        unscaled = kind[1] == "none"
        torch.testing.assert_close(
            advantages(values * 10, kind, 4).advantages, result * (10 if unscaled else 1), rtol=1e-3, atol=0
        )
    if kind[0] != "reinforce_pp":
        torch.testing.assert_close(result.view(6, 4).sum(dim=1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(result.sum(), torch.tensor(0.0, dtype=torch.float64), rtol=0, atol=1e-9)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_carry_no_signal_but_against_the_batch(kind: tuple[str, str, str], dtype: torch.dtype) -> None:
    """0.1 three times does not sum to 0.3: a rounding error must not be taken for a signal."""
    flat = torch.full((3, 1), 0.1, dtype=dtype)
    assert not advantages(flat, kind, 3).informative.any()
    other = torch.tensor([[0.7], [0.2], [0.3]], dtype=dtype)
    informative = advantages(torch.cat([flat, other]), kind, 3).informative
    assert informative[3:].any() and bool(informative[:3].all()) == (kind[0] == "reinforce_pp")


@every_kind
def test_a_single_score_in_a_group_says_nothing_within_it(kind: tuple[str, str, str]) -> None:
    result = advantages(scored([math.nan, 1.0, math.nan, 2.0, 0.0, 0.0]), kind, 3)
    assert result.informative.tolist()[:3] == [False, kind[0] == "reinforce_pp", False]
    assert result.informative[3]
    assert torch.isfinite(result.advantages).all()


@every_kind
def test_nothing_scored_and_groups_of_one(kind: tuple[str, str, str]) -> None:
    nothing = advantages(scored([math.nan] * 4), kind, 2)
    assert not nothing.informative.any() and not nothing.advantages.any() and torch.isnan(nothing.rewards).all()
    alone = advantages(scored([1.0]), kind, 1)  # an evaluation of one prompt
    assert alone.advantages.tolist() == [0.0] and alone.rewards.tolist() == [1.0]


def test_weights_and_missing_scores() -> None:
    values = torch.tensor([[1.0, math.nan], [0.0, 2.0], [math.nan, math.nan], [1.0, 1.0]])
    result = compute_advantages(values, torch.tensor([1.0, 0.5]), num_generations=4, scale="none")
    assert result.rewards[:2].tolist() == [1.0, 1.0] and math.isnan(result.rewards[2])
    assert result.advantages[2] == 0 and not result.informative[2]
    torch.testing.assert_close(result.advantages[3], torch.tensor(1.5 - 3.5 / 3))


def test_normalize_then_sum_gives_each_function_the_same_say() -> None:
    small = torch.tensor([0.0, 0.01, 0.0, 0.01])
    large = torch.tensor([100.0, 0.0, 0.0, 100.0])
    result = compute_advantages(torch.stack([small, large], 1), torch.ones(2), 4, aggregation="normalize_then_sum")
    torch.testing.assert_close(result.advantages[0], torch.tensor(0.0), atol=0.02, rtol=0)
    assert result.advantages[3] > 1 and result.advantages[2] < -1


def test_maxrl_refuses_negative_rewards() -> None:
    with pytest.raises(ValueError, match=r"'maxrl'.*at least 0, got -0.5.*shift the reward"):
        advantages(scored([1.0, -0.5]), KINDS[7], 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "sometimes"}, "scale_rewards='sometimes'.*'group' takes group or batch or none"),
        ({"aggregation": "product"}, "'product': known are 'sum_then_normalize'"),
        ({"estimator": "gae"}, "advantage_estimator='gae': known are 'group', 'rloo'"),
        ({"estimator": "rloo"}, "scale_rewards='group'.*'rloo' takes none or batch"),
        ({"estimator": "reinforce_pp", "scale": "none"}, "'reinforce_pp' takes batch"),
        ({"estimator": "maxrl", "scale": "none", "aggregation": "normalize_then_sum"}, "its own baseline.*'maxrl'"),
    ],
)
def test_what_is_not_defined_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_advantages(torch.zeros(2, 1), torch.ones(1), 2, **options)
