"""RewardRunner: what reward functions are given, and what becomes of what they return."""

import asyncio
import functools
import json
import logging
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from colora.rewards.runner import RewardError, RewardRunner

PROMPTS = ["2+2=", "3+3=", "4+4="]
COMPLETIONS = ["4", "7", "8!"]
IDS = [[4], [7], [8, 1]]
ANSWERS = {"answer": ["4", "6", "8"]}


def score(*functions, columns=None, **kwargs):
    runner = RewardRunner(functions)
    try:
        return runner.score(PROMPTS, COMPLETIONS, IDS, ANSWERS if columns is None else columns, **kwargs)
    finally:
        runner.close()


def column(scores, index=0):
    return scores.values[:, index].tolist()


def test_function_with_kwargs_gets_the_whole_contract():
    seen = {}

    def reward(**kwargs):
        seen.update(kwargs)
        return [0.0] * 3

    state = SimpleNamespace(global_step=5)
    columns = ANSWERS | {"prompt": PROMPTS, "completion": ["x"] * 3, "completion_ids": ["x"] * 3}
    score(reward, columns=columns, trainer_state=state)
    assert callable(seen.pop("log_extra")) and callable(seen.pop("log_metric"))
    contract = {"prompts": PROMPTS, "completions": COMPLETIONS, "completion_ids": IDS, "trainer_state": state}
    assert seen == contract | ANSWERS  # the other columns of the contract's names are left out


def test_function_without_kwargs_gets_only_what_it_names():
    def exact(completions, answer, trainer_state=None, scale=2.0):
        assert trainer_state.global_step == 5
        return [scale * (c == a) for c, a in zip(completions, answer, strict=True)]

    columns = ANSWERS | {"difficulty": [1, 2, 3]}
    assert column(score(exact, columns=columns, trainer_state=SimpleNamespace(global_step=5))) == [2.0, 0.0, 0.0]


def test_function_that_changes_its_lists_disturbs_nobody():
    def greedy(completions, answer, **kwargs):
        completions.clear()
        answer.reverse()
        return [0.0] * 3

    def exact(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    assert column(score(greedy, exact), 1) == [1.0, 0.0, 0.0]


def test_missing_column_names_the_columns_there_are():
    def reward(completions, anwser):
        return [0.0] * 3

    with pytest.raises(
        ValueError, match=r"'reward' requires \['anwser'\].*mean \['answer'\].*columns are \['answer'\]"
    ):
        score(reward)
    runner = RewardRunner([reward])
    runner.check_columns(["anwser"])
    with pytest.raises(ValueError, match="anwser"):
        runner.check_columns(["answer"])


@pytest.mark.parametrize(
    "returned",
    [
        [1, None, 0.5],
        (True, None, np.float32(0.5)),
        [torch.tensor(1), None, torch.tensor(0.5)],
        np.array([1.0, None, 0.5], dtype=object),
    ],
)
def test_kinds_of_return_values(returned):
    scores = score(lambda **_: returned)
    assert scores.values.dtype == torch.float32 and scores.values.shape == (3, 1)
    torch.testing.assert_close(scores.values[:, 0], torch.tensor([1.0, float("nan"), 0.5]), equal_nan=True)


@pytest.mark.parametrize(
    "returned", [torch.tensor([1.0, 0.0, 0.5], dtype=torch.bfloat16, requires_grad=True), np.array([1, 0, 0.5])]
)
def test_arrays_are_accepted(returned):
    assert column(score(lambda **_: returned)) == [1.0, 0.0, 0.5]


class Judge:
    def __init__(self, value):
        self.value = value

    def __call__(self, completions, **kwargs):
        return [self.value] * len(completions)

    def method(self, completions):
        return [self.value + 1] * len(completions)


class AsyncJudge:
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return [9.0] * len(completions)


def length(completions, unit=1.0):
    return [unit * len(c) for c in completions]


def test_names_and_order_of_every_kind_of_callable():
    def length_2(completions):
        return [0.0] * 3

    judge = Judge(3.0)
    half = functools.partial(functools.partial(length), unit=0.5)
    functions = [AsyncJudge(), length, half, length_2, judge, judge.method, functools.partial(AsyncJudge())]
    runner = RewardRunner(functions)
    assert runner.names == ["AsyncJudge", "length", "length_2", "length_2_2", "Judge", "method", "AsyncJudge_2"]
    scores = runner.score(PROMPTS, COMPLETIONS, IDS, {})
    runner.close()
    assert scores.values[2].tolist() == [9.0, 2.0, 1.0, 0.0, 3.0, 4.0, 9.0]
    assert list(scores.seconds) == runner.names


def test_async_functions_run_concurrently():
    both_inside = asyncio.Barrier(2)  # neither gets past the barrier unless both are under way at once

    async def first(completions):
        await asyncio.wait_for(both_inside.wait(), timeout=60)
        return [1.0] * len(completions)

    async def second(completions, **kwargs):
        await asyncio.wait_for(both_inside.wait(), timeout=60)
        return [2.0] * len(completions)

    def sync(completions):
        return [3.0] * len(completions)

    assert score(first, sync, second).values.tolist() == [[1.0, 3.0, 2.0]] * 3


def test_async_functions_inside_a_running_loop_and_on_the_same_loop_each_time():
    loops, others = [], set(threading.enumerate())

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    runner = RewardRunner([reward])

    async def notebook_cell():
        assert column(runner.score(PROMPTS, COMPLETIONS, IDS, {})) == [1.0] * 3
        return asyncio.get_running_loop()

    cell_loop = asyncio.run(notebook_cell())
    runner.score(PROMPTS, COMPLETIONS, IDS, {})
    assert loops[0] is loops[1] is not cell_loop
    runner.close()
    runner.close()
    assert not [each for each in set(threading.enumerate()) - others if each.name == "colora-rewards"]
    assert column(runner.score(PROMPTS, COMPLETIONS, IDS, {})) == [1.0] * 3
    runner.close()


def test_the_loop_thread_ends_with_the_runner():
    others = set(threading.enumerate())
    score_once = RewardRunner([AsyncJudge()])
    score_once.score(PROMPTS, COMPLETIONS, IDS, {})
    started = [each for each in set(threading.enumerate()) - others if each.name == "colora-rewards"]
    del score_once
    assert started and not any(thread.is_alive() for thread in started)


def test_log_extra_and_log_metric():
    def whole(completions, log_extra, log_metric):
        log_extra("parsed", [c.strip("!") for c in completions])
        log_metric("accuracy", 1.0)
        return [0.0] * 3

    async def piecewise(completions, log_extra, log_metric):
        for completion in completions:
            log_extra("parsed", [len(completion)])
        log_metric("accuracy", torch.tensor(0.0))
        log_metric("calls", 3)
        return [0.0] * 3

    scores = score(whole, piecewise)
    assert scores.extra == {"parsed": ["4", "7", "8"], "piecewise/parsed": [1, 1, 2]}
    assert scores.metrics == {"accuracy": 0.5, "calls": 3.0}


def test_seconds_by_function():
    def slow(completions):
        time.sleep(0.05)
        return [0.0] * 3

    start = time.perf_counter()
    scores = score(slow, length)
    passed = time.perf_counter() - start
    assert scores.seconds["slow"] >= 0.05 and scores.seconds["length"] >= 0.0
    assert scores.seconds["slow"] + scores.seconds["length"] <= passed  # neither counts the other's


def test_rows_that_nobody_scores_are_told_once(caplog):
    runner = RewardRunner([lambda **_: [1.0, None, None], lambda **_: [None, None, 2.0]])
    with caplog.at_level(logging.WARNING, logger="colora.rewards.runner"):
        scores = runner.score(PROMPTS, COMPLETIONS, IDS, ANSWERS, step=3)
        runner.score(PROMPTS, COMPLETIONS, IDS, ANSWERS, step=4)
    assert scores.values.isnan().tolist() == [[False, True], [True, True], [True, False]] and scores.failures == []
    (record,) = caplog.records
    message = record.getMessage()
    assert "1 of 3 completions at step 3, the first is sample 1" in message
    assert "'3+3='" in message and "'7'" in message and "{'answer': '6'}" in message


def test_empty_batch_calls_nothing():
    runner = RewardRunner([lambda **_: pytest.fail("called"), length])
    assert runner.score([], [], [], {}).values.shape == (0, 2)


def test_weights():
    assert RewardRunner([length, length]).weights == [1.0, 1.0]
    assert RewardRunner([length, length], weights=(1, 0.5)).weights == [1.0, 0.5]
    with pytest.raises(ValueError, match="1 reward weights for 2 reward functions"):
        RewardRunner([length, length], weights=[1.0])
    with pytest.raises(ValueError, match="finite"):
        RewardRunner([length], weights=[float("nan")])


def test_refusals_at_construction():
    with pytest.raises(ValueError, match="at least one"):
        RewardRunner([])
    with pytest.raises(ValueError, match="on_error"):
        RewardRunner([length], on_error="skip")
    with pytest.raises(TypeError, match="load_reward"):
        RewardRunner(["my.py:reward"])
    with pytest.raises(TypeError, match="RewardModel"):
        RewardRunner([torch.nn.Linear(1, 1)])

    def by_position(completions, /):
        return []

    with pytest.raises(TypeError, match="remove the `/`"):
        RewardRunner([by_position])


def test_batches_that_do_not_fit_the_contract():
    with pytest.raises(ValueError, match=r"\['log_extra', 'prompts'\].*rename"):
        score(length, columns={"prompts": PROMPTS, "log_extra": PROMPTS})
    with pytest.raises(ValueError, match=r"column 'answer'\": 2"):
        score(length, columns={"answer": ["1", "2"]})


def test_scores_equal_trls():
    """TRL's own method is run on a stand-in that has only the attributes it reads: no model, no training arguments."""
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer")
    from accelerate import PartialState

    PartialState()  # TRL gathers over processes

    def sync(prompts, completions, completion_ids, answer, log_extra, log_metric, trainer_state, **kwargs):
        log_extra("step", [trainer_state.global_step] * len(prompts))
        log_metric("mean_ids", sum(map(len, completion_ids)) / len(completion_ids))
        assert kwargs == {"level": [1, 2, 3]}
        return [float(c == a) + len(p) for p, c, a in zip(prompts, completions, answer, strict=True)]

    async def with_none(completions, log_metric, **kwargs):
        log_metric("mean_ids", 0.0)
        return [None if c == "7" else np.float64(0.1) for c in completions]

    functions = [with_none, sync, AsyncJudge(), functools.partial(Judge(2))]
    state = SimpleNamespace(global_step=7)
    columns = ANSWERS | {"level": [1, 2, 3]}
    runner = RewardRunner(functions)
    ours = runner.score(PROMPTS, COMPLETIONS, IDS, columns, trainer_state=state)

    extra, metrics, loop = {}, {}, asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stand_in = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=False),
        args=SimpleNamespace(report_to=[]),
        reward_funcs=functions,
        reward_processing_classes=[None] * len(functions),
        reward_func_names=runner.names,
        state=state,
        environments=None,
        async_loop=loop,
        _log_completion_extra=lambda name, values: extra.setdefault(name, []).extend(values),
        _log_metric=lambda name, value: metrics.setdefault(name, []).append(value),
    )
    rows = [
        {"prompt": prompt, **{name: values[index] for name, values in columns.items()}}
        for index, prompt in enumerate(PROMPTS)
    ]
    theirs = trainer_module.GRPOTrainer._calculate_rewards(stand_in, rows, PROMPTS, COMPLETIONS, IDS)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    runner.close()
    torch.testing.assert_close(ours.values, theirs, rtol=0, atol=0, equal_nan=True)
    assert ours.extra == extra
    assert ours.metrics == {name: sum(values) / len(values) for name, values in metrics.items()}


def test_what_a_function_does_to_messages_reaches_no_other_sample_function_or_record():
    question = [{"role": "user", "content": "2+2="}]
    answers = [[{"role": "assistant", "content": text}] for text in ("4", "5")]
    lengths = []

    def judge(prompts, completions, notes, **_):
        for prompt, completion, note in zip(prompts, completions, notes, strict=True):
            prompt.extend(completion)  # makes the conversation that a judge reads
            lengths.append((len(prompt), len(note["seen"])))
            completion[-1]["content"] = "changed"
            note["seen"].append(1)
        return [0.0] * len(prompts)

    def after(prompts, completions, **_):
        return [
            float(len(prompt) == 1 and c[-1]["content"] in "45") for prompt, c in zip(prompts, completions, strict=True)
        ]

    note = {"seen": []}
    runner = RewardRunner([judge, after])
    scores = runner.score([question, question], answers, [[4], [5]], {"notes": [note, note]})
    assert lengths == [(2, 0), (2, 0)]  # the samples of a group have one prompt and one row
    assert column(scores, 1) == [1.0, 1.0]
    assert question == [{"role": "user", "content": "2+2="}] and answers[0][-1]["content"] == "4" and note["seen"] == []


def test_logged_arrays_and_their_numbers_become_plain_ones():
    def reward(completions, log_extra, **_):
        log_extra("distance", np.arange(3, dtype=np.float32))
        log_extra("found", [{"ids": torch.tensor([1, 2]), "right": np.bool_(True)}] * 3)
        return [0.0] * 3

    extra = score(reward).extra
    assert json.dumps(extra["distance"]) == "[0.0, 1.0, 2.0]"
    assert json.dumps(extra["found"][0]) == '{"ids": [1, 2], "right": true}'


def test_a_logged_value_that_cannot_be_recorded_names_function_and_column():
    def reward(completions, log_extra, **_):
        log_extra("proof", ["fine", object(), "fine"])
        return [0.0] * 3

    with pytest.raises(RewardError, match=r"'reward' failed at step 0, sample 1: it logged <object.*column 'proof'"):
        score(reward)


@pytest.mark.parametrize("name", ["loss", "reward", "learning_rate"])
def test_a_metric_of_the_trainers_name_is_refused(name):
    def reward(completions, log_metric, **_):
        log_metric(name, 5.0)
        return [0.0] * 3

    with pytest.raises(RewardError, match=rf"'reward' failed.*log_metric\('{name}', ...\): the trainer logs its own"):
        score(reward)
