"""Metrics between two logs, and token-weighted statistics of a step's micro-batches."""

import math

import pytest
import torch
from colora.rl.metrics import Metrics, TokenStatistics
from colora.rl.streams import Sequences


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


def sequences(*lengths: int, masked: int | None = None) -> Sequences:
    mask = torch.ones(sum(lengths), dtype=torch.bool)
    if masked is not None:
        mask[masked] = False
    return Sequences(lengths, mask)


def test_means_are_those_of_all_tokens() -> None:
    statistics = TokenStatistics()
    for part in ([1.0, -2.0, 4.0, 5.0], [7.0], []):
        statistics.add({"kl": torch.tensor(part)}, sequences(len(part)))
    kl = statistics.summaries()["kl"]
    assert kl.mean == pytest.approx(15 / 5)  # the mean of the micro-batches' means would be 4.5
    assert (kl.smallest, kl.largest) == (-2.0, 7.0)


def test_sequences_of_different_micro_batches_are_not_mixed() -> None:
    statistics = TokenStatistics()
    statistics.add({"clip": torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])}, sequences(4, 2))
    statistics.add({"clip": torch.tensor([1.0, 0.0])}, sequences(2))
    clip = statistics.summaries()["clip"]
    assert (clip.sequence_smallest, clip.sequence_largest) == (0.25, 1.0)
    assert clip.sequence_mean == pytest.approx((0.25 + 1.0 + 0.5) / 3)
    statistics.add({"clip": torch.tensor([0.0])}, sequences(1))
    assert statistics.summaries()["clip"].sequence_smallest == 0.0


def test_masked_tokens_and_sequences_without_others_do_not_count() -> None:
    statistics = TokenStatistics()
    statistics.add({"kl": torch.tensor([2.0, 9.0, 4.0])}, sequences(1, 1, 1, 0, masked=1))
    kl = statistics.summaries()["kl"]
    assert (kl.mean, kl.smallest, kl.largest, kl.sequence_mean, kl.sequence_largest) == (3.0, 2.0, 4.0, 3.0, 4.0)


def test_what_was_never_noted_is_nan() -> None:
    statistics = TokenStatistics()
    assert math.isnan(statistics.summaries()["kl"].mean)
    statistics.add({"kl": torch.tensor([1.0]), "masked": torch.tensor([1.0])}, sequences(1))
    statistics.add({"empty": torch.empty(0)}, sequences())
    statistics.add({"nothing": torch.ones(1)}, sequences(1, masked=0))
    summaries = statistics.summaries()
    assert summaries["kl"].mean == 1.0
    for name in ("empty", "nothing", "unknown"):
        assert all(map(math.isnan, vars(summaries[name]).values())), name
