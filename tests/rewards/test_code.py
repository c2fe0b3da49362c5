"""Code rewards with real programs in the real sandbox."""

import pytest
from colora.rewards.code import CodeReward, code_reward, code_reward_all, extract_code
from colora.rewards.runner import RewardRunner
from colora.rewards.sandbox import LAYERS, Limits, SandboxError, layers

MISSING = {name: reason for name, reason in layers().items() if reason}
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=f"the sandbox lacks layers here: {MISSING}")

PAIRS = [{"input": "2\n", "output": "4\n"}, {"input": "-3\n", "output": "9"}]
SQUARE = "print(int(input()) ** 2)"
DOUBLE = "print(int(input()) * 2)"
ASSERTIONS = ["assert square(3) == 9", "assert square(2) == 4"]


def fenced(program, language="python"):
    return f"Here it is:\n```{language}\n{program}\n```\nDone."


def test_the_last_complete_python_block_counts():
    assert extract_code(fenced("a") + fenced("b\n  c", "")) == "b\n  c"
    assert extract_code(fenced("a") + "\n" + fenced("ls", "bash") + "\n```python\ncut off") == "a"
    assert extract_code("1. So:\n   ```py\n   if x:\n       y\n\n   ```") == "if x:\n    y\n"
    assert extract_code("print(1)") is None


@needs_sandbox
def test_share_and_all_over_pairs_and_messages():
    completions = [fenced(SQUARE), fenced(DOUBLE), SQUARE, [{"role": "assistant", "content": fenced(SQUARE)}]]
    assert code_reward(completions, tests=[PAIRS] * 4) == [1.0, 0.5, 0.0, 1.0]
    assert code_reward_all(completions, tests=[PAIRS] * 4) == [1.0, 0.0, 0.0, 1.0]


@needs_sandbox
def test_a_pair_needs_the_exit_status_and_the_whole_output():
    failing = fenced(SQUARE + "\nraise SystemExit(1)")
    chatty = fenced("print('thinking')\n" + SQUARE)
    assert code_reward([failing, chatty], tests=[PAIRS, PAIRS]) == [0.0, 0.0]


@needs_sandbox
def test_assertions():
    right = fenced("def square(x):\n    return x * x\nif __name__ == '__main__':\n    raise ValueError(input())")
    half = fenced("def square(x):\n    return 9")
    assert code_reward([right, half, right], tests=[ASSERTIONS, ASSERTIONS, ASSERTIONS[0]]) == [1.0, 0.5, 1.0]


@needs_sandbox
@pytest.mark.parametrize("leave", ["raise SystemExit(0)", "import os; os._exit(0)", "print = None\n'''"])
def test_leaving_before_the_assertions_does_not_pass(leave):
    assert code_reward([fenced(leave)], tests=[ASSERTIONS]) == [0.0]


@needs_sandbox
def test_endless_loops_are_stopped_and_counted():
    metrics = {}
    reward = CodeReward(limits=Limits(seconds=0.3, cpu_seconds=60), most_timeouts=1, concurrency=2)
    scores = reward([fenced("while True: pass"), "none"], tests=[PAIRS * 50] * 2, log_metric=metrics.__setitem__)
    assert scores == [0.0, 0.0]
    assert metrics == {"code/no_block": 0.5, "code/limit_time": 1.0}


@needs_sandbox
def test_in_the_runner_with_a_row_without_tests():
    runner = RewardRunner([code_reward, CodeReward(tests_column="other", score="all")])
    columns = {"tests": [PAIRS, None], "other": [PAIRS[:1], PAIRS]}
    scores = runner.score(["p", "p"], [fenced(DOUBLE), fenced(SQUARE)], [[], []], columns)
    runner.close()
    assert scores.values[:, 1].tolist() == [1.0, 1.0]
    assert scores.values[0, 0] == 0.5
    assert scores.values[1, 0].isnan()


@pytest.mark.parametrize("tests", [[{"input": "1"}], [3], []])
def test_what_is_not_a_test(tests):
    with pytest.raises(ValueError, match="column 'tests', sample 0: "):
        code_reward([fenced(SQUARE)], tests=[tests])


def test_wrong_settings():
    with pytest.raises(ValueError, match="needs a column 'tests', the dataset has \\['answer'\\]"):
        CodeReward()(["a"], answer=["b"])
    with pytest.raises(ValueError, match="share"):
        CodeReward(score="half")
    with pytest.raises(ValueError, match="concurrency=0"):
        CodeReward(concurrency=0)


def test_a_machine_without_a_layer_stops_instead_of_scoring(monkeypatch):
    monkeypatch.setattr("colora.rewards.sandbox.layers", lambda: dict.fromkeys(LAYERS, "") | {"landlock": "no kernel"})
    from colora.rewards import sandbox

    sandbox._active_layers.cache_clear()
    try:
        with pytest.raises(SandboxError, match="lacks layers of the sandbox: {'landlock': 'no kernel'}"):
            code_reward([fenced(SQUARE)], tests=[PAIRS])
    finally:
        sandbox._active_layers.cache_clear()
