"""RewardRunner: reward functions that return nonsense, raise, or stop the program."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from colora.rewards.runner import RewardError, RewardFailure, RewardRunner

PROMPTS = ["question 0", "question 1", "question 2", "question 3"]
COMPLETIONS = ["1", "two", "3", "4"]
IDS = [[1], [2], [3], [4]]


def run(function, on_error="stop", step=12, **columns):
    runner = RewardRunner([function], on_error=on_error, failure_share=1)
    try:
        return runner.score(PROMPTS, COMPLETIONS, IDS, columns, step=step)
    finally:
        runner.close()


def returns(value):
    def reward(**kwargs):
        return value

    return reward


BAD_ELEMENTS = {
    "string": ("0.5", "the string '0.5'"),
    "nan": (float("nan"), "it returned nan, which is not a finite float32"),
    "infinity": (float("-inf"), "-inf, which is not a finite float32"),
    "too large": (1e39, "1e+39, which is not a finite float32"),
    "huge integer": (10**5000, "an integer, which is not a finite float32"),
    "list": ([1.0], r"a list ([1.0])"),
    "complex": (1j, "a complex (1j)"),
    "tensor of one": (torch.tensor([1.0]), "a Tensor (tensor([1.]))"),
}


@pytest.mark.parametrize("bad, reason", BAD_ELEMENTS.values(), ids=BAD_ELEMENTS)
def test_bad_element(bad, reason):
    function = returns([1.0, None, bad, 0.0])
    with pytest.raises(RewardError) as caught:
        run(function)
    message = str(caught.value)
    assert message.startswith("Reward function 'reward' failed at step 12, sample 2: ") and reason in message
    assert "'question 2'" in message and "completion: '3'" in message and "None to skip the sample" in message
    assert (caught.value.function, caught.value.step, caught.value.sample) == ("reward", 12, 2)
    scores = run(function, on_error="none")
    assert scores.values[:, 0].isnan().tolist() == [False, True, True, False]
    (failure,) = scores.failures
    assert (failure.function, failure.sample) == ("reward", 2) and reason in failure.reason


async def _coroutine():
    return [1.0] * 4


BAD_CONTAINERS = {
    "too few": (lambda **_: [1.0] * 3, "returned 3 rewards for 4 completions"),
    "too many": (lambda **_: (1.0,) * 5, "returned 5 rewards for 4 completions"),
    "None": (lambda **_: None, "returned None where a list of 4 rewards"),
    "number": (lambda **_: 1.0, "returned a float (1.0)"),
    "string": (lambda **_: "1234", "returned a str ('1234')"),
    "dict": (lambda **_: dict.fromkeys(range(4), 1.0), "returned a dict"),
    "generator": (lambda **_: (1.0 for _ in range(4)), "returned a generator"),
    "tensor of two dimensions": (lambda **_: torch.zeros(4, 1), "shape (4, 1), expected (4,)"),
    "coroutine": (lambda **_: _coroutine(), "coroutine"),
}


@pytest.mark.parametrize("function, reason", BAD_CONTAINERS.values(), ids=BAD_CONTAINERS)
def test_bad_container(function, reason):
    with pytest.raises(RewardError) as caught:
        run(function)
    message = str(caught.value)
    assert "'<lambda>' failed at step 12: " in message and reason in message and "Remedy: " in message
    assert caught.value.sample is None and "prompt:" not in message
    scores = run(function, on_error="none")
    assert scores.values.isnan().all()
    (failure,) = scores.failures
    assert failure.sample is None and reason in failure.reason


def parse(completions, log_extra, log_metric):
    log_metric("size", len(completions))
    numbers = [int(completion) for completion in completions]
    log_extra("number", numbers)
    return numbers


async def parse_async(completions, log_extra, log_metric):
    await asyncio.sleep(0)
    return parse(completions, log_extra, log_metric)


@pytest.mark.parametrize("function", [parse, parse_async])
def test_function_that_raises(function, caplog):
    with pytest.raises(RewardError) as caught:
        run(function)
    message = str(caught.value)
    assert "failed at step 12, sample 1: it raised ValueError: invalid literal" in message
    assert "'question 1'" in message and "completion: 'two'" in message and "return None" in message
    assert isinstance(caught.value.__cause__, ValueError)

    with caplog.at_level(logging.WARNING, logger="colora.rewards.runner"):
        scores = run(function, on_error="none")
    assert scores.values[[0, 2, 3], 0].tolist() == [1.0, 3.0, 4.0] and scores.values[1, 0].isnan()
    reason = "it raised ValueError: invalid literal for int() with base 10: 'two'"
    assert scores.failures == [RewardFailure(function.__name__, 1, reason)]
    assert scores.extra == {"number": [1, None, 3, 4]}
    assert scores.metrics == {"size": 1.0}  # what the call on the whole batch logged before it raised is dropped
    assert f"{function.__name__!r}: 1 failure(s) on 4 completions at step 12" in caplog.text


def test_culprit_is_looked_for_no_longer_than_needed():
    calls = []

    def reward(completions, answer):
        calls.append((completions, answer))
        return [int(completion) for completion in completions]

    with pytest.raises(RewardError):
        run(reward, answer=[5, 6, 7, 8])
    assert calls == [(COMPLETIONS, [5, 6, 7, 8]), (["1"], [5]), (["two"], [6])]


@pytest.mark.parametrize("error", [MemoryError(), StopIteration()])
def test_an_error_without_a_message(error):
    def reward(completions):
        raise error

    with pytest.raises(RewardError, match=rf"sample 0: it raised {type(error).__name__}\.\n"):
        run(reward)


def test_function_that_raises_only_on_the_whole_batch():
    def reward(completions):
        if len(completions) > 1:
            raise MemoryError("too large")
        return [float(len(completions[0]))]

    with pytest.raises(RewardError, match=r"step 12: it raised MemoryError: too large \(on the whole batch"):
        run(reward)
    scores = run(reward, on_error="none")
    assert scores.values[:, 0].tolist() == [1.0, 3.0, 1.0, 1.0]
    assert [failure.sample for failure in scores.failures] == [None]


def test_nonsense_in_a_sample_by_sample_call_is_that_samples_failure():
    def reward(completions):
        if len(completions) > 1:
            raise RuntimeError("batch")
        return {"1": ["x"], "two": []}.get(completions[0], [2.0])

    scores = run(reward, on_error="none")
    assert scores.values[:, 0].isnan().tolist() == [True, True, False, False]
    assert [(f.sample, f.reason) for f in scores.failures] == [
        (0, "it returned the string 'x'"),
        (1, "it returned 0 rewards for 1 completions"),
    ]


def test_single_sample_that_raises_is_not_called_twice():
    calls = []

    def reward(completions):
        calls.append(completions)
        raise KeyError("missing")

    with pytest.raises(RewardError, match="sample 0: it raised KeyError"):
        RewardRunner([reward]).score(["p"], ["c"], [[1]], {})
    assert len(calls) == 1


def test_one_failing_function_leaves_the_others_alone():
    async def fine(completions):
        await asyncio.sleep(0)
        return [5.0] * len(completions)

    runner = RewardRunner([parse_async, fine, parse], on_error="none")
    scores = runner.score(PROMPTS, COMPLETIONS, IDS, {})
    runner.close()
    assert scores.values[:, 1].tolist() == [5.0] * 4
    assert [failure.function for failure in scores.failures] == ["parse_async", "parse"]


def test_extra_column_of_the_wrong_length():
    def reward(completions, log_extra):
        log_extra("parsed", [1, 2])
        log_extra("size", [len(c) for c in completions])
        return [1.0] * 4

    with pytest.raises(RewardError, match="2 values for the extra column 'parsed' where there are 4 completions"):
        run(reward)
    scores = run(reward, on_error="none")
    assert scores.values[:, 0].tolist() == [1.0] * 4  # the scores are good
    assert scores.extra == {"size": [1, 3, 1, 1]} and len(scores.failures) == 1


def test_text_as_extra_column_is_refused():
    def reward(completions, log_extra):
        log_extra("parsed", "abcd")
        return [1.0] * 4

    with pytest.raises(RewardError, match="log_extra\\('parsed', ...\\) needs a list with one value per completion"):
        run(reward)


def test_long_texts_are_shortened_at_both_ends_kept():
    with pytest.raises(RewardError) as caught:
        RewardRunner([returns(["bad"])]).score(["x" * 5000], ["begin" + "y" * 5000 + "end"], [[1]], {})
    message = str(caught.value)
    assert "begin" in message and "end'" in message and len(message) < 1000


def test_chat_messages_appear_in_the_message():
    prompt = [{"role": "user", "content": "two plus two"}]
    answer = [{"role": "assistant", "content": "five"}]
    with pytest.raises(RewardError, match="two plus two(.|\n)*five"):
        RewardRunner([returns(["bad"])]).score([prompt], [answer], [[1]], {})


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("on_error", ["stop", "none"])
def test_interrupts_pass_through(interrupt, on_error):
    def sync(completions):
        raise interrupt

    async def asynchronous(completions):
        raise interrupt

    for function in (sync, asynchronous):
        with pytest.raises(interrupt):
            run(function, on_error=on_error)


def test_a_function_that_cancels_itself_is_a_failure():
    async def reward(completions):
        raise asyncio.CancelledError

    with pytest.raises(RewardError, match="CancelledError"):
        run(reward)


@pytest.fixture
def interruptible():
    """Python raises KeyboardInterrupt at SIGINT; a process that was started in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_from_the_keyboard_cancels_async_functions(interruptible):
    cancelled = threading.Event()

    async def reward(completions):
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(KeyboardInterrupt):
        run(reward)
    assert cancelled.is_set()  # by the time the runner is closed, not some time later


def test_an_async_call_that_hangs_costs_its_samples_and_not_the_run():
    async def reward(prompts, completions):
        if "question 1" in prompts:
            await asyncio.sleep(60)
        return [float(len(text)) for text in completions]

    runner = RewardRunner([reward], on_error="stop", failure_share=0.5, async_timeout=0.3)
    prompts = [f"question {index // 4}" for index in range(12)]
    scores = runner.score(prompts, ["ab"] * 12, [[1]] * 12, {})
    runner.close()
    assert scores.values[:, 0].isnan().tolist() == [prompt == "question 1" for prompt in prompts]
    assert {failure.kind for failure in scores.failures} == {"timeout"}
    assert scores.failures[0].reason == "it did not return within 0.3 s"


def test_a_time_out_of_the_functions_own_is_an_error():
    async def reward(completions):
        raise TimeoutError("the service took too long")

    with pytest.raises(RewardError, match="raised TimeoutError: the service took too long"):
        run(reward)


def test_too_many_open_files_are_told_to_whoever_needs_a_loop():
    program = (
        "import os, resource\n"
        "from colora.rewards.event_loop import EventLoopThread\n"
        "next_file = os.dup(0)\n"
        "os.close(next_file)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (next_file, next_file))\n"
        "try:\n    EventLoopThread('rewards')\nexcept OSError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout == "[Errno 24] Too many open files\n"
