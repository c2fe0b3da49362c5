"""Metrics between two logs, and token-weighted statistics of a step's micro-batches."""

import math

import pytest
import torch
from colora.rl.metrics import Metrics, TokenStatistics


def test_values_are_averaged_and_totals_are_not() -> None:
    metrics = Metrics()
    for value in (1.0, 2.0, 6.0):
        metrics.add("reward", value)
        metrics.set("num_tokens", 100 * value)
    assert metrics.drain("eval_") == {"eval_reward": 3.0, "eval_num_tokens": 600.0}


def test_a_drained_value_is_not_logged_again() -> None:
    metrics = Metrics()
    metrics.add("reward", 1.0)
    metrics.set("num_tokens", 5)
    metrics.drain()
    assert metrics.drain() == {}
    metrics.add("reward", 4.0)
    assert metrics.drain() == {"reward": 4.0}


def test_nan_is_left_out_of_a_mean_and_zero_is_not() -> None:
    metrics = Metrics()
    for value in (math.nan, 0.0, 3.0):
        metrics.add("rewards/a/mean", value)
    metrics.add("rewards/b/mean", math.nan)
    metrics.add("loss", math.inf)
    assert metrics.drain() == {"rewards/a/mean": 1.5, "loss": math.inf}


def test_means_are_those_of_all_tokens() -> None:
    statistics = TokenStatistics()
    parts = [torch.tensor([1.0, -2.0, 4.0, 5.0]), torch.tensor([7.0]), torch.empty(0)]
    for part in parts:
        statistics.add("kl", part)
    assert statistics.mean("kl") == pytest.approx(15 / 5)  # the mean of the micro-batches' means would be 4.5


def test_sequences_of_different_micro_batches_are_not_mixed() -> None:
    statistics = TokenStatistics()
    statistics.add("clip", torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 0, 1, 1]))
    statistics.add("clip", torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))  # numbered from 0 again
    assert statistics.sequence_extremes("clip") == (0.25, 1.0)
    statistics.add("clip", torch.tensor([0.0]), torch.tensor([0]))
    assert statistics.sequence_extremes("clip") == (0.0, 1.0)


def test_what_was_never_noted_is_nan() -> None:
    statistics = TokenStatistics()
    statistics.add("kl", torch.tensor([1.0]))
    statistics.add("empty", torch.empty(0), torch.empty(0, dtype=torch.int64))
    assert math.isnan(statistics.mean("empty"))
    assert all(map(math.isnan, statistics.sequence_extremes("empty")))
    assert all(map(math.isnan, statistics.sequence_extremes("kl")))  # noted without sequences
