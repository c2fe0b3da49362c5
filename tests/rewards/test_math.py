"""Mathematical answers, with the real math-verify."""

import sys
import threading
import time

import pytest
from colora.rewards import math as math_reward
from colora.rewards.math import math_answer

pytest.importorskip("math_verify")

HOSTILE = ["", "$" * 999, "}{\\frac{", "\x00\ud800", "\\boxed{" * 200, "9" * 20_000, "((((" * 50, "\\int_0^x", "1/0"]


@pytest.mark.parametrize(
    "completion, reference, reward",
    [
        ("1/2", "\\frac{1}{2}", 1.0),
        ("so x is \\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("The answer is 1,000.", "1000", 1.0),
        ("She has 72 apples", "48 + 24 = 72.\n#### 72", 1.0),
        ("it is 72", "72", 1.0),
        ("5 km", "5", 1.0),
        ("x + 1", "1+x", 1.0),
        ("x + 1", "1", 0.0),
        ("2**3", 8, 1.0),
        ("\\boxed{(1,2)}", "(1, 2)", 1.0),
        ("\\boxed{(2,1)}", "(1, 2)", 0.0),
        ("sqrt(2)", "\\sqrt{2}", 1.0),
        ("first 5, then <answer>4</answer> or 6", "4", 1.0),
        ("<think>\\boxed{5}</think>I do not know", "5", 0.0),
        ("I do not know", "5", 0.0),
        ([{"role": "assistant", "content": "$7$"}], "7", 1.0),
        ("4", "no idea at all", None),
        ("4", "", None),
        ("4", None, None),
    ],
)
def test_rewards(completion, reference, reward):
    assert math_answer([completion], answer=[reference]) == [reward]


def test_either_column_and_the_share_of_unusable_references():
    logged = {}
    assert math_answer(["4", "4"], solution=["2 + 2 = \\boxed{4}", "unknown"], log_metric=logged.__setitem__) == [
        1,
        None,
    ]
    assert logged == {"math_answer/unusable_references": 0.5}
    with pytest.raises(ValueError, match="column `answer` or `solution`"):
        math_answer(["4"], result=["4"])


def test_garbage_scores_zero_and_as_a_reference_none():
    assert math_answer(HOSTILE, answer=["4"] * len(HOSTILE)) == [0.0] * len(HOSTILE)
    assert math_answer(["4"] * len(HOSTILE), answer=HOSTILE)[0] is None


def test_a_power_tower_is_given_up(monkeypatch):
    tower = "$9^{9^{9^9}}$"
    monkeypatch.setattr(math_reward, "TIMEOUT", 1)
    start = time.monotonic()
    assert math_answer([tower], answer=["4"]) == [0.0]
    assert 0.9 < time.monotonic() - start < 120  # not the minutes and gigabytes that the tower would take


def test_a_reference_that_was_read_in_a_busy_moment_is_used_all_the_same(monkeypatch):
    """The limit is on the wall clock's time, and what came of a reference is kept for the whole run."""
    math_verify, times = math_reward._math_verify(), []
    parse = math_verify.parse

    def late_once(*arguments, **options):
        times.append(options["parsing_timeout"])
        if len(times) == 1:
            raise math_verify.errors.TimeoutException
        return parse(*arguments, **options)

    monkeypatch.setattr(math_verify, "parse", late_once)
    math_reward._parse_reference.cache_clear()
    assert math_answer(["1/2", "1/2"], answer=["0.5", "0.5"]) == [1.0, 1.0]
    assert len(times) == 4  # the reference twice and no more, each answer


def test_on_another_thread_it_does_the_same():
    rewards = []
    texts, references = ["1/2", "3", *HOSTILE], ["0.5", None, *["4"] * len(HOSTILE)]
    thread = threading.Thread(target=lambda: rewards.extend(math_answer(texts, answer=references)))
    thread.start()
    thread.join()
    assert rewards == [1.0, None] + [0.0] * len(HOSTILE) == math_answer(texts, answer=references)


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    math_reward._math_verify.cache_clear()
    with pytest.raises(ImportError, match=r"pip install colora\[math\]"):
        math_answer(["4"], answer=["4"])
