"""The hidden tests, run in the sandbox, and the form of an answer."""

from collections.abc import Sequence
from typing import Any

from colora.rewards.code import CodeReward, extract_code
from colora.rewards.format import RegexFormat
from colora.rewards.sandbox import Limits
from colora.rewards.text import Completion, completion_text

# Put behind the program: each line of standard input is the arguments of a call. What is expected stays outside the
# sandbox, so nothing that a program does there can tell it what to print.
CALLS = """
import json, sys
for line in sys.stdin:
    print(json.dumps(solve(*json.loads(line))))
"""
# The functions take microseconds. Two programs at a time in each worker: more than the cores only make them slower.
_run = CodeReward(score="all", limits=Limits(seconds=5, cpu_seconds=2), concurrency=2)

# Words, then one Python block that ends the answer.
one_block = RegexFormat(r"(?:(?!```).)+\n```python\n(?:(?!```).)+\n```")


def passes_tests(completions: Sequence[Completion], tests: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 where every hidden call of the program's `solve` gives what it should, else 0."""
    programs = [extract_code(completion_text(completion)) for completion in completions]
    called = ["" if program is None else f"```python\n{program}\n{CALLS}```" for program in programs]
    return _run(called, tests=tests, **columns)
