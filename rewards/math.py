"""A reward for mathematical answers, compared by what they mean: 1/2, 0.5 and \\frac{1}{2} are the same.

Parsing and comparing is math-verify's, whose time limits are signals and so work on a process' main thread only. Called
on another thread, the reward does its work in a process of its own, started for the call (one or two seconds).
"""

import functools
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from .text import Completion, after_thinking, extract_answer

logger = logging.getLogger(__name__)

TIMEOUT = 5  # seconds for reading one answer, and for comparing it with its reference
START_SECONDS = 120  # for a process of its own to start, on a busy machine

_DELIMITERS = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")
# Three letters in a row, or two before another word or number: "is 72", but neither "5 km" nor "xy + 1".
_WORD = re.compile(r"(?<![\\A-Za-z{])(?:[A-Za-z]{3,}|[A-Za-z]{2}(?=\s+\w))")
_FUNCTIONS = re.compile(r"sqrt|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|pi")


def math_answer(
    completions: Sequence[Completion],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where the answer equals the reference mathematically, else 0.0; None without a usable reference.

    The reference is column `answer` or, where there is none, `solution`: a number, LaTeX with or without `$`, or a text
    that ends with `\boxed{...}` or `#### 18`. Of a completion counts what is after `</think>`, of that what is in
    `<answer>` or after `####`, and of that what is boxed, else the last formula or number. What cannot be parsed or
    takes longer than `TIMEOUT` scores 0, or None where it is the reference; the share of those is logged as the metric
    `math_answer/unusable_references`.

    Raises:
        ImportError: math-verify is not installed.
        ValueError: the dataset has neither column.
        TimeoutError: called outside the main thread, and something did not heed its time limit.
    """
    references = answer if answer is not None else solution
    if references is None:
        raise ValueError("math_answer needs the dataset's column `answer` or `solution`; rename the one you have")
    _math_verify()
    texts = [after_thinking(extract_answer(completion)) for completion in completions]
    # None stays None: there is nothing to compare with.
    wanted = [None if reference is None else extract_answer(str(reference)) for reference in references]
    pairs = list(zip(texts, wanted, strict=True))
    on_main_thread = threading.current_thread() is threading.main_thread()
    rewards = _compare_all(pairs) if on_main_thread else _compare_in_process(pairs)
    if log_metric is not None and rewards:
        log_metric("math_answer/unusable_references", rewards.count(None) / len(rewards))
    return rewards


def _compare_all(pairs: Sequence[tuple[str, str | None]]) -> list[float | None]:
    return [_compare(text, reference) for text, reference in pairs]


def _compare(text: str, reference: str | None) -> float | None:
    gold = () if reference is None else _parse_reference(reference)
    if not gold:
        return None
    found = _parse(text)
    if not found:
        return 0.0
    try:
        return float(_math_verify().verify(list(gold), list(found), timeout_seconds=TIMEOUT, raise_on_error=True))
    # sympy raises whatever it likes on formulas that a model made up. Its time-out is not an Exception.
    except (Exception, _math_verify().errors.TimeoutException) as error:
        logger.debug("comparing an answer with %r gave up: %s", reference, type(error).__name__)
        return 0.0


@functools.lru_cache(maxsize=1024)  # the completions of a group share theirs
def _parse_reference(reference: str) -> tuple[Any, ...]:
    # What is kept for good must not depend on a moment in which the machine was busy: time is the wall clock's.
    return _parse(reference, attempts=2)


def _parse(text: str, attempts: int = 1) -> tuple[Any, ...]:
    """What math-verify finds in a text: one expression of sympy, or nothing. `attempts` while time runs out."""
    words = [word for word in _WORD.findall(text) if not _FUNCTIONS.fullmatch(word)]
    if text.strip() and not words and not _DELIMITERS.search(text):
        text = "$" + text.strip().replace("**", "^") + "$"  # all of it is the formula; else only numbers are found
    math_verify = _math_verify()
    # Without its fallback to text, which would compare what could not be parsed letter by letter.
    options = {"fallback_mode": "no_fallback", "parsing_timeout": TIMEOUT, "raise_on_error": True}
    for _ in range(attempts):
        try:
            return tuple(math_verify.parse(text, **options))
        except math_verify.errors.TimeoutException:
            logger.debug("parsing an answer took too long")
        except Exception as error:  # as in `_compare`
            logger.debug("parsing an answer gave up: %s", type(error).__name__)
            break
    return ()


def _compare_in_process(pairs: Sequence[tuple[str, str | None]]) -> list[float | None]:
    limit = START_SECONDS + 4 * TIMEOUT * len(pairs)
    # -P: modules in the current directory shadow nothing.
    command = [sys.executable, "-P", "-m", __name__]
    try:
        done = subprocess.run(
            command, input=json.dumps(pairs), capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(
            f"math_answer: comparing {len(pairs)} answers took more than {limit} s, in spite of its time limits"
        ) from error
    if done.returncode != 0:
        raise RuntimeError(f"math_answer: its process ended with code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def _math_verify() -> Any:
    try:
        import math_verify
        import math_verify.errors
    except ImportError as error:
        raise ImportError("math_answer needs the package math-verify: `pip install colora[math]`") from error
    return math_verify


# Reward workers share what a first comparison imports and builds, which takes a second.
math_answer.prepare_worker = functools.partial(math_answer, ["1"], ["1"])  # type: ignore[attr-defined]


if __name__ == "__main__":
    print(json.dumps(_compare_all(json.load(sys.stdin))))
