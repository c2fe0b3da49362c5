"""Requests that come late join those that run: fewer forwards, the same completions."""

import pytest
import torch
from colora.rollout.engine import generate
from colora.rollout.transformers_engine import TransformersEngine

from .test_transformers_engine import FAMILIES, ForwardLog, engine_of, policy_logprobs, tokens_of


def late(engine: TransformersEngine, requests: list, every: int) -> dict:
    """Submit one request every few steps; the trajectories by id."""
    waiting, found, steps = list(requests), {}, 0
    while waiting or engine.unfinished:
        if waiting and steps % every == 0:
            engine.submit([waiting.pop(0)])
        found |= {trajectory.request_id: trajectory for trajectory in engine.step()}
        steps += 1
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_the_policys_whatever_joins_and_leaves(family, make_policy, make_requests):
    """Windows of 8 are filled by some rows only, rows of several lengths come and go, padding is cut again."""
    policy = make_policy(family)
    requests = make_requests([3, 60, 1, 12, 30, 2, 2, 2], max_tokens=[70, 9, 40, 5, 60, 90, 8, 30])
    engine = engine_of(policy)
    found = late(engine, requests, every=4)
    assert {name: t.completion_ids for name, t in found.items()} == tokens_of(engine, requests)
    for trajectory in found.values():
        torch.testing.assert_close(
            torch.tensor(trajectory.logprobs), policy_logprobs(policy, trajectory), atol=1e-5, rtol=0
        )


def test_all_that_run_are_one_forward_a_step(make_policy, make_requests):
    engine = engine_of(make_policy("qwen3"))
    log = ForwardLog(engine)
    late(engine, make_requests([5] * 10, max_tokens=40), every=2)
    decodes = [shape for shape in log.shapes if shape[1] == 1]
    assert len(log.shapes) - len(decodes) == 10  # each prompt once
    assert len(decodes) <= 18 + 40
    assert max(rows for rows, _ in decodes) == 10


def test_padding_is_cut_when_the_long_rows_have_left(make_policy, make_requests):
    engine = engine_of(make_policy("llama"))
    log = ForwardLog(engine)
    short, long = make_requests([4, 200], max_tokens=[60, 5])
    engine.submit([short])
    engine.step()
    list(generate(engine, [long]))
    first_masked, last_masked = log.masked.index(True), len(log.masked) - log.masked[::-1].index(True)
    assert last_masked - first_masked <= 5 and len(log.masked) - last_masked > 40


def test_waves_of_very_different_lengths_stay_apart(make_policy, make_requests):
    """One batch of both would be mostly padding."""
    engine = engine_of(make_policy("llama", max_position_embeddings=1024))
    log = ForwardLog(engine)
    late(engine, make_requests([4, 600], max_tokens=[30, 20]), every=3)
    assert max(rows for rows, columns in log.shapes) == 1
