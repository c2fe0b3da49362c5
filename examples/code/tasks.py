"""Small programming tasks with hidden tests, made on the spot: a chain of operations on a list."""

import inspect
import json
import random
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict
from operations import OPERATIONS, RESULTS, Operation

INSTRUCTION = (
    "Explain in a sentence or two how you do it, then give the whole program in one block that begins with ```python "
    "and ends with ```. It defines the function (and what that needs), reads nothing and prints nothing."
)
WORDS = (
    "apple", "boat", "cloud", "door", "echo", "fern", "gate", "hotel", "ivory", "jungle", "kite", "lemon", "moon",
    "needle", "ocean", "piano", "queen", "river", "stone", "teapot", "up", "violet", "we", "yarn", "zoo",
)  # fmt: skip
TESTS = 8  # hidden calls of the function
LEAST_ANSWERS = 4  # different results among them: a constant does not get far
MOST_DRAWS = 200
DRAWS_A_TASK = 20  # draws after which a task that has not come up yet is taken not to exist


@dataclass(frozen=True)
class Task:
    """A function to write.

    Attributes:
        kind: what the list holds: `integers` or `words`.
        chain: operations and their `k` (None where there is none), in order; the last gives the result.
        inputs: lists; the first is shown in the statement, the function is tested on the others.
    """

    kind: str
    chain: tuple[tuple[Operation, Any], ...]
    inputs: tuple[list[Any], ...]

    def result(self, items: list[Any], chain: tuple[tuple[Operation, Any], ...] | None = None) -> Any:
        """What the function returns."""
        value: Any = items
        for operation, k in self.chain if chain is None else chain:
            value = operation.function(value) if k is None else operation.function(value, k)
        return value

    def statement(self) -> str:
        phrases = [operation.phrase.format(k=k) for operation, k in self.chain]
        steps = "\n".join(f"{number}. {phrase};" for number, phrase in enumerate(phrases[:-1], 1))
        return (
            f"Write a Python function `solve(items)`. It gets a list of {self.kind}, possibly empty, and does the "
            f"following with it, in this order:\n\n{steps}\n\nThen it returns {phrases[-1]}.\n\n"
            f"For example, `solve({self.inputs[0]!r})` returns `{self.result(self.inputs[0])!r}`."
        )

    def hidden_tests(self) -> list[dict[str, str]]:
        """One test in the form of `colora.rewards.code`: a call a line, its arguments as JSON, and the results."""
        inputs = self.inputs[1:]
        return [
            {
                "input": "".join(json.dumps([items]) + "\n" for items in inputs),
                "output": "".join(json.dumps(self.result(items)) + "\n" for items in inputs),
            }
        ]

    def solution(self) -> str:
        """A program that is right, to try verifiers on."""
        operations = {operation.function.__name__: operation.function for operation, _ in self.chain}
        sources = [inspect.getsource(function) for function in operations.values()]
        lines = [
            f"    items = {operation.function.__name__}(items{'' if k is None else f', {k!r}'})"
            for operation, k in self.chain
        ]
        return "\n\n".join(sources) + "\n\ndef solve(items):\n" + "\n".join(lines) + "\n    return items\n"


def make_task(rng: random.Random, operations: int) -> Task:
    """A task of so many operations and a result, none of which could be left out unnoticed."""
    for _ in range(MOST_DRAWS):
        kind = rng.choice(list(OPERATIONS))
        chosen = [*rng.sample(OPERATIONS[kind], operations), rng.choice(RESULTS[kind])]
        chain = tuple((operation, rng.choice(operation.choices) if operation.choices else None) for operation in chosen)
        inputs = ([], *(_items(rng, kind, rng.randint(1, 9)) for _ in range(TESTS)))
        task = Task(kind, chain, (inputs[1], inputs[0], *inputs[2:]))
        if _is_telling(task):
            return task
    raise RuntimeError(f"no task of {operations} operations in {MOST_DRAWS} draws: all were degenerate")


def problems(size: int, held_out: int, *, least: int = 2, most: int = 4, seed: int = 0) -> DatasetDict:
    """`size` tasks to train on and `held_out` others to evaluate on, as the splits `train` and `test`.

    The columns are `prompt` (messages) and `tests` (hidden from the model). The same arguments make the same tasks.

    Args:
        least, most: operations of a task, of which each number is as likely.

    Raises:
        ValueError: they are out of order, or there are not so many different tasks.
    """
    if not 1 <= least <= most <= 5:
        raise ValueError(f"a task has from 1 to 5 operations: needs 1 <= least <= most <= 5, got {least} and {most}")
    rng = random.Random(seed)
    found: dict[str, Task] = {}
    for _ in range(DRAWS_A_TASK * (size + held_out)):
        if len(found) == size + held_out:
            break
        task = make_task(rng, rng.randint(least, most))
        # By what is asked for, not by the example: no task of `test` is one of `train` with other numbers.
        found.setdefault("\n".join(operation.phrase.format(k=k) for operation, k in task.chain), task)
    if len(found) < size + held_out:
        raise ValueError(
            f"found {len(found)} different tasks of {least} to {most} operations, {size + held_out} are wanted: raise "
            "most, or lower size and held_out"
        )
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{task.statement()}\n\n{INSTRUCTION}"}],
            "tests": task.hidden_tests(),
        }
        for task in found.values()
    ]
    return DatasetDict(train=Dataset.from_list(rows[:size]), test=Dataset.from_list(rows[size:]))


def _items(rng: random.Random, kind: str, length: int) -> list[Any]:
    if kind == "words":
        return [rng.choice(WORDS) for _ in range(length)]
    return [rng.randint(-30, 60) if rng.random() < 0.5 else rng.randint(0, 9) for _ in range(length)]


def _is_telling(task: Task) -> bool:
    """Whether the hidden tests have different results, and others when an operation is left out."""
    inputs = task.inputs[1:]
    results = [task.result(items) for items in inputs]
    if len({json.dumps(result) for result in results}) < LEAST_ANSWERS:
        return False
    shorter = [task.chain[:index] + task.chain[index + 1 :] for index in range(len(task.chain) - 1)]
    return all([task.result(items, chain) for items in inputs] != results for chain in shorter)
