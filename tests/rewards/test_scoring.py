"""Scoring while completions come in: the same as scoring all at once, and begun before all are there."""

import asyncio
import threading
import time

import pytest
from colora.rewards.loading import load_reward
from colora.rewards.pool import PoolLimits
from colora.rewards.runner import RewardError, RewardRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .test_pool import children

FUNCTIONS = """
import os, time
from pathlib import Path

def fragile(completions, log_extra, log_metric, level):
    log_metric("calls", len(completions) + 0.1)
    log_extra("half", [len(text) / 2 for text in completions])
    for text in completions:
        if text == "bad": raise ValueError("bad")
        if text == "exit": os._exit(4)
    return [None if text == "skip" else len(text) / 3 + n for text, n in zip(completions, level)]

def touch(completions, folder):
    for text, place in zip(completions, folder):
        Path(place, text).touch()
    return [1.0] * len(completions)
"""
PROMPTS = ["p"] * 3 + ["q"] * 5 + ["r"] * 2 + ["s"] * 4 + ["t"]
COMPLETIONS = ["a", "bad", "", "exit", "bb", "skip", "c", "a", "bad", "dd", "exit", "eee", "bad", "skip", "f"]
COLUMNS = {"level": [index / 7 for index in range(len(PROMPTS))]}


async def gathered(completions, log_metric, log_extra):
    log_metric("calls", 0.3)
    await asyncio.sleep(0)
    log_extra("half", [text.upper() for text in completions])
    return [1 / len(text) for text in completions]  # "" raises


def whole(completions):
    return [1 / len(completions)] * len(completions)


whole.in_process = True


@pytest.fixture
def load(tmp_path):
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    return lambda name: load_reward(f"{file}:{name}")


@pytest.fixture
def runner(load):
    limits = PoolLimits(2, timeout=60)
    runner = RewardRunner([load("fragile"), gathered, whole], None, "none", limits, failure_share=1, concurrency=2)
    yield runner
    runner.close()


def everything(scores):
    return scores.values.nan_to_num(-1).tolist(), scores.extra, scores.metrics, scores.failures


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(len(PROMPTS))))
def test_the_order_in_which_completions_come_changes_nothing(runner, order):
    ids = [[index] for index in range(len(PROMPTS))]
    expected = everything(runner.score(PROMPTS, COMPLETIONS, ids, COLUMNS))
    assert expected[0][4] == pytest.approx([2 / 3 + 4 / 7, 0.5, 1 / 15]) and len(expected[3]) == 6
    assert [failure.kind for failure in expected[3]] == ["error", "died", "error", "died", "error", "error"]
    scoring = runner.start(PROMPTS, COLUMNS)
    for index in order:
        scoring.add(index, COMPLETIONS[index], ids[index])
        scoring.poll()
    assert everything(scoring.finish()) == expected


def test_workers_and_async_functions_begin_with_the_first_whole_prompt(load, tmp_path):
    heard, seen = threading.Event(), []

    async def listens(completions):
        heard.set()
        return [0.0] * len(completions)

    def sees_all(completions):
        seen.append(list(completions))
        return [0.0] * len(completions)

    runner = RewardRunner([load("touch"), listens, sees_all], workers=PoolLimits(1))
    texts = list("abcdefgh")
    scoring = runner.start(["p"] * 4 + ["q"] * 4, {"folder": [str(tmp_path)] * 8})
    for index in (0, 5, 1, 2):
        scoring.add(index, texts[index], [1])
    assert not heard.is_set()  # no prompt has all of its completions
    scoring.add(3, texts[3], [1])
    deadline = time.monotonic() + 60
    while not (tmp_path / "d").exists() and time.monotonic() < deadline:
        scoring.poll()
        time.sleep(0.001)
    assert (tmp_path / "d").exists() and not (tmp_path / "f").exists() and heard.wait(60) and not seen
    for index in (4, 6, 7):
        scoring.add(index, texts[index], [1])
    assert scoring.finish().hidden_seconds > 0 and seen == [texts]
    runner.close()


def test_async_calls_are_limited(load):
    under_way, most, three = 0, 0, asyncio.Event()

    async def counts(completions):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if most == 3:
            three.set()
        await asyncio.wait_for(three.wait(), 60)
        await asyncio.sleep(0.01)  # for more to come, if they did
        under_way -= 1
        return [0.0] * len(completions)

    runner = RewardRunner([counts, counts], concurrency=3)
    runner.score([str(index // 4) for index in range(40)], ["x"] * 40, [[1]] * 40, {})
    runner.close()
    assert most == 3  # of 20 calls, of either function
    with pytest.raises(ValueError, match="concurrency=0"):
        RewardRunner([counts], concurrency=0)


def test_an_async_function_can_ask_for_the_whole_batch():
    async def ranks(completions):
        return [sorted(completions).index(text) for text in completions]

    ranks.in_process = True
    runner = RewardRunner([ranks])
    assert runner.score(list(range(6)), list("fbdace"), [[1]] * 6, {}).values[:, 0].tolist() == [5, 1, 3, 0, 2, 4]
    runner.close()


def test_what_cannot_be_sent_is_the_samples_failure(load):
    runner = RewardRunner([load("fragile")], workers=PoolLimits(1))
    levels = [1.0] * 6 + [threading.Lock()] + [1.0]
    arguments = [str(index) for index in range(8)], ["a"] * 8, [[1]] * 8, {"level": levels}
    with pytest.raises(RewardError, match=r"sample 6: it raised TypeError: its arguments cannot be sent.*_thread.lock"):
        runner.score(*arguments)
    runner.close()


def test_what_is_cancelled_leaves_nothing_behind(load):
    before = children()
    ended = threading.Event()

    async def waits(completions):
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()

    runner = RewardRunner([load("fragile"), waits], workers=PoolLimits(1))
    scoring = runner.start(["p"] * 8, {"level": [1.0] * 8})
    for index in range(8):
        scoring.add(index, "a", [1])
    scoring.cancel()
    assert ended.wait(60) and children() <= before
    assert RewardRunner([whole]).score(["p"], ["a"], [[1]], {}).values.item() == 1
    runner.close()


def test_misuse_is_refused(runner):
    scoring = runner.start(["p", "q"], {"level": [1.0, 2.0]})
    scoring.add(0, "a", [1])
    scoring.add(1, "a", [1])
    runner.close()
    with pytest.raises(RuntimeError, match="closed while a batch was being scored"):
        scoring.finish()
    scoring = runner.start(["p", "q"], {"level": [1.0, 2.0]})
    scoring.add(0, "a", [1])
    with pytest.raises(ValueError, match="completion 0 of the batch was added twice"):
        scoring.add(0, "a", [1])
    with pytest.raises(RuntimeError, match="1 of 2 completions were not added"):
        scoring.finish()


def test_failing_on_too_many_stops_whatever_the_kind_of_function():
    async def fails_on_most(completions, log_metric):
        return [1.0 if text == "a" else "no" for text in completions]

    def fails_on_all(completions):
        raise ZeroDivisionError("no")

    for failing, said in ((fails_on_most, "returned the string 'no'"), (fails_on_all, "ZeroDivisionError: no")):
        runner = RewardRunner([failing], on_error="none")
        with pytest.raises(RewardError, match=rf"(?s){said}.*It failed on [34] of 4 samples.*0\.5"):
            runner.score(["p"] * 4, list("abcd"), [[1]] * 4, {})
        runner.close()
