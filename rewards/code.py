"""Code rewards: the program in a completion is run against the tests of its row, in the sandbox.

    rewards = ["colora.rewards.code:code_reward"]       # share of the tests passed
    rewards = ["colora.rewards.code:code_reward_all"]   # 1 where all pass, else 0
    CodeReward(limits=Limits(seconds=2), concurrency=8)  # other settings

The column `tests` holds a list for each row: of `{"input": ..., "output": ...}` (standard input and the expected
standard output), or of texts with assertions, each run after the completion's program. A text alone is one test, and
None (no tests for this row) gives no reward.

What a policy can do about it: pairs of input and output are safe, the expected output never enters the sandbox.
Assertions run in the program's own process. Leaving early does not pass (a test counts when its last line was
reached), but objects that equal everything, or a search of the process's memory for what marks the end, do. Read
completions of runs whose reward rises fast, and prefer pairs.
"""

import os
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from .sandbox import LAYERS, Limits, Result, run_python
from .text import completion_text

_PYTHON = ("", "python", "python3", "py")


def extract_code(text: str) -> str | None:
    """The last complete block fenced with ``` that names Python or no language; None where there is none.

    A block inside a list keeps working: the indentation of its opening fence is taken off its lines.
    """
    found, fence = None, None
    lines: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if fence is None:
            if stripped.startswith("```"):
                fence, indent, lines = stripped[3:].strip().lower(), len(line) - len(line.lstrip()), []
        elif stripped == "```":
            if fence in _PYTHON:
                found = "\n".join(lines)
            fence = None
        else:
            lines.append(line[min(indent, len(line) - len(line.lstrip())) :])
    return found


class CodeReward:
    """A reward function by TRL's contract: the share of its tests that a completion's last fenced block passes.

    Completions without such a block score 0. Metrics: `code/no_block` (share of the completions), and for each limit
    that was hit `code/limit_<name>` (share of the programs run).

    Args:
        tests_column: the column with the tests.
        score: "share" of the tests passed, or "all" for 1 where every test passes and else 0.
        limits: for each test, by default `Limits()`.
        concurrency: programs at a time, by default the number of cores this process may use.
        most_timeouts: tests of one completion that may run out of time before the others count as failed too, so that
            an endless loop costs `most_timeouts * limits.seconds` and not that for every test.
        require: the layers of the sandbox without which nothing is run.
    """

    def __init__(
        self,
        tests_column: str = "tests",
        score: Literal["share", "all"] = "share",
        limits: Limits | None = None,
        concurrency: int | None = None,
        most_timeouts: int = 2,
        require: Sequence[str] = LAYERS,
    ):
        if score not in ("share", "all"):
            raise ValueError(f'score must be "share" or "all", got {score!r}')
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        self.concurrency = cores if concurrency is None else concurrency
        if self.concurrency < 1 or most_timeouts < 1:
            raise ValueError(f"must be at least 1: concurrency={self.concurrency}, most_timeouts={most_timeouts}")
        self.tests_column, self.score, self.limits = tests_column, score, limits or Limits()
        self.most_timeouts, self.require = most_timeouts, tuple(require)
        self.__name__ = "code_reward" if score == "share" else "code_reward_all"

    def __call__(
        self, completions: Sequence[Any], log_metric: Callable[[str, float], None] | None = None, **columns: Any
    ) -> list[float | None]:
        """One score in [0, 1] per completion, None for a row without tests.

        Raises:
            ValueError: the column is missing, or holds something else than tests.
            SandboxError: this machine lacks a required layer.
        """
        if self.tests_column not in columns:
            raise ValueError(f"{self.__name__} needs a column {self.tests_column!r}, the dataset has {sorted(columns)}")
        tests = [
            self._tests(value, f"column {self.tests_column!r}, sample {index}")
            for index, value in enumerate(columns[self.tests_column])
        ]
        programs = [extract_code(completion_text(completion)) for completion in completions]
        endings: Counter[str | None] = Counter()
        with ThreadPoolExecutor(self.concurrency) as pool:
            scored = list(pool.map(self._score, programs, tests))
        for _, limits_hit in scored:
            endings.update(limits_hit)
        if log_metric is not None and programs:
            log_metric("code/no_block", sum(program is None for program in programs) / len(programs))
            for name in filter(None, endings):
                log_metric(f"code/limit_{name}", endings[name] / endings.total())
        return [score for score, _ in scored]

    def _tests(self, value: Any, where: str) -> list[Any] | None:
        if value is None:
            return None
        tests = [value] if isinstance(value, str) else list(value)
        for test in tests:
            pair = isinstance(test, dict) and all(isinstance(test.get(key), str) for key in ("input", "output"))
            if not (pair or isinstance(test, str)):
                raise ValueError(
                    f"{where}: a test is a text with assertions or {{'input': text, 'output': text}}, got {test!r:.200}"
                )
        if not tests:
            raise ValueError(f"{where}: no tests; a row that shall get no reward holds None")
        return tests

    def _score(self, program: str | None, tests: list[Any] | None) -> tuple[float | None, list[str | None]]:
        """The score, and how each run ended."""
        if tests is None:
            return None, []
        if program is None:
            return 0.0, []
        endings: list[str | None] = []
        passed = 0
        for test in tests:
            success, result = self._passes(program, test)
            passed += success
            endings.append(result.limit)
            out_of_time = endings.count("time") + endings.count("cpu") >= self.most_timeouts
            if out_of_time or (self.score == "all" and not success):
                break
        if self.score == "all":
            return float(passed == len(tests)), endings
        return passed / len(tests), endings

    def _passes(self, program: str, test: str | dict[str, str]) -> tuple[bool, Result]:
        if isinstance(test, dict):
            result = run_python(program, test["input"], limits=self.limits, require=self.require)
            return _succeeded(result) and _lines(result.stdout) == _lines(test["output"]), result
        # Not `print`, which the program may have given another meaning.
        end = secrets.token_hex(16)
        source = f"{program}\n\n{test}\n\n__import__('os').write(1, b'{end}')\n"
        result = run_python(source, limits=self.limits, require=self.require, run_name="solution")
        return _succeeded(result) and end in result.stdout, result


def code_reward(completions: Sequence[Any], tests: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """`CodeReward()`: the share of the tests of the column `tests` that each completion's program passes."""
    return CodeReward()(completions, tests=tests, **kwargs)


def code_reward_all(completions: Sequence[Any], tests: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """`CodeReward(score="all")`: 1 where a completion's program passes all tests of the column `tests`, else 0."""
    return CodeReward(score="all")(completions, tests=tests, **kwargs)


def _succeeded(result: Result) -> bool:
    return result.status == 0 and result.limit is None


def _lines(text: str) -> list[str]:
    """Lines without trailing spaces and without blank ones at the end, as judges of programming contests compare."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
