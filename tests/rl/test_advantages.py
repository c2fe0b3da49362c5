"""Advantages against the oracle's plain loops, and the cases that loops get wrong."""

import math

import pytest
import torch
from colora.rl.advantages import compute_advantages
from hypothesis import given, settings
from hypothesis import strategies as st

from ..oracle import grpo as oracle


@settings(max_examples=60, deadline=None)
@given(
    rewards=st.lists(st.one_of(st.floats(-5, 5), st.just(math.nan)), min_size=12, max_size=12),
    scale=st.sampled_from(["group", "batch", "none"]),
    group=st.sampled_from([2, 3, 4, 6]),
)
def test_equals_the_oracle(rewards: list[float], scale: str, group: int) -> None:
    values = torch.tensor(rewards, dtype=torch.float32)[:, None]
    ours = compute_advantages(values, torch.ones(1), group, scale).advantages
    plain = oracle.advantages(values, torch.ones(1), oracle.Options(num_generations=group, scale_rewards=scale))
    torch.testing.assert_close(ours, plain.float(), rtol=2e-3, atol=2e-4)


def test_known_values() -> None:
    result = compute_advantages(torch.tensor([[1.0], [0.0], [3.0], [3.0]]), torch.ones(1), num_generations=2)
    half_range = 0.5 / (math.sqrt(0.5) + 1e-4)
    torch.testing.assert_close(result.advantages, torch.tensor([half_range, -half_range, 0.0, 0.0]))
    assert result.informative.tolist() == [True, True, False, False]
    assert result.zero_std.tolist() == [False, False, True, True]


def test_equal_rewards_that_do_not_sum_exactly_carry_no_signal() -> None:
    result = compute_advantages(torch.full((3, 1), 0.1), torch.ones(1), num_generations=3)
    assert not result.informative.any()


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


@pytest.mark.parametrize("options", [{"scale": "sometimes"}, {"aggregation": "product"}])
def test_unknown_options_are_named(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="sometimes|product"):
        compute_advantages(torch.zeros(2, 1), torch.ones(1), 2, **options)
