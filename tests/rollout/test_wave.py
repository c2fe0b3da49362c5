"""Sampling by inverse CDF, and its random numbers."""

import torch
from colora.rollout.wave import sample, uniforms


def draw(logits, uniform, temperature=1.0, greedy=False):
    rows = len(uniform)
    tokens, logprobs = sample(
        torch.tensor(logits).expand(rows, -1),
        torch.full((rows,), temperature),
        torch.full((rows,), greedy),
        torch.tensor(uniform, dtype=torch.float64),
    )
    return tokens.tolist(), logprobs


def test_the_whole_interval_maps_to_tokens_in_order():
    logits = torch.tensor([0.5, 0.25, 0.25]).log().tolist()
    assert draw(logits, [0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-53])[0] == [0, 0, 1, 1, 2, 2]


def test_tokens_without_probability_are_never_taken():
    """At both ends of the interval, where rounding would take them, and in between."""
    logits = [-1000.0, 0.0, -1000.0, 0.0, -1000.0]
    assert draw(logits, [0.0, 0.5, 1 - 2**-53])[0] == [1, 3, 3]


def test_temperature_scales_and_logprobs_are_of_the_scaled_distribution():
    logits = [2.0, 0.0]
    tokens, logprobs = draw(logits, [0.5, 0.9], temperature=2.0)
    assert tokens == [0, 1]
    torch.testing.assert_close(logprobs, torch.tensor([1.0, 0.0]) - torch.tensor([1.0, 0.0]).logsumexp(0))
    assert draw(logits, [0.9], temperature=0.5)[0] == [0]


def test_greedy_rows_ignore_the_random_number():
    assert draw([0.0, 1.0, 0.5], [0.0, 0.99], greedy=True)[0] == [1, 1]


def test_uniforms_depend_on_all_of_the_seed_and_extend():
    assert (uniforms(3, 8) == uniforms(3, 20)[:8]).all()
    for other in (4, 3 + 2**32, 3 + 2**62):  # generators seeded with 32 bits would repeat
        assert (uniforms(3, 8) != uniforms(other, 8)).all()
    assert 0.0 <= uniforms(5, 1000).min() < 0.01
    assert 0.99 < uniforms(5, 1000).max() < 1.0
