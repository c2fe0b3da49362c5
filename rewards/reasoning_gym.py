"""Tasks of the reasoning-gym package: problems as a dataset, and the tasks' own verifiers as a reward function."""

import difflib
import functools
import json
import logging
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from .text import extract_answer

logger = logging.getLogger(__name__)

TUPLE_TAG, PAIRS_TAG = "__tuple__", "__pairs__"


def reasoning_gym_dataset(task: str, size: int, seed: int, **task_options: Any) -> Dataset:
    """`size` problems of a reasoning-gym task.

    Args:
        task: a task name of the package, such as "basic_arithmetic" or "countdown".
        size, seed: passed to the task; the same pair gives the same problems.
        task_options: the task's own options, such as `max_digits=2`.

    Returns:
        A dataset with the text columns `prompt` (the question as it is), `answer` (the reference answer; None where
        many are right), `entry` (the whole problem as JSON, tuples tagged), `task` and `task_options` (JSON): what
        `reasoning_gym_reward` needs. Datasets of several tasks can be concatenated.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: an unknown task or option, or a value that the task refuses.
    """
    options = _to_json(task_options)
    problems = _create(task, options, size=size, seed=seed)
    # By index: iterating goes over a cursor kept in the task's object.
    entries = [problems[index] for index in range(size)]
    return Dataset.from_dict(
        {
            "prompt": [entry["question"] for entry in entries],
            "answer": [None if entry["answer"] is None else str(entry["answer"]) for entry in entries],
            "entry": [_to_json(entry) for entry in entries],
            "task": [task] * size,
            "task_options": [options] * size,
        }
    )


def reasoning_gym_reward(
    completions: Sequence[Any], entry: Sequence[str], task: Sequence[str], task_options: Sequence[str], **columns: Any
) -> list[float]:
    """The task's own score (0 to 1) of the final answer in each completion; for datasets of `reasoning_gym_dataset`.

    An answer that makes the verifier raise scores 0 (verifiers parse what the model wrote, and some raise on what they
    cannot parse), unless the reference answer does so too: then verifier or entry is broken, and the exception goes up.
    """
    rewards = []
    for completion, name, options, problem in zip(completions, task, task_options, entry, strict=True):
        rewards.append(
            _score(_verifier(name, options), extract_answer(completion), json.loads(problem, object_hook=_untag))
        )
    return rewards


def _score(verifier: Any, answer: str, entry: dict[str, Any]) -> float:
    try:
        return float(verifier.score_answer(answer, entry))
    except Exception as error:  # third-party parsers raise whatever they like on text that a model made up
        if entry["answer"] is not None:
            verifier.score_answer(entry["answer"], entry)
        logger.debug("the verifier raised on answer %r, scored 0: %r", answer, error)
        return 0.0


@functools.lru_cache(maxsize=256)
def _verifier(task: str, options: str) -> Any:
    # The options count: verifiers read their configuration. Size and seed do not, but some tasks want one of each.
    return _create(task, options, size=1, seed=0)


def _create(task: str, options: str, size: int, seed: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError("reasoning-gym tasks need the package: `pip install colora[tasks]`") from error
    if task == "composite":
        raise ValueError(
            'task "composite": make a dataset for each task and join them with `datasets.concatenate_datasets`'
        )
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=5, cutoff=0.5)
        hint = f"Did you mean {near}?" if near else f"The tasks are {sorted(DATASETS)}."
        raise ValueError(f"reasoning-gym has no task {task!r}. {hint}")
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **json.loads(options, object_hook=_untag))
    except (TypeError, ValueError, AssertionError) as error:
        _, config = DATASETS[task]
        known = [name for name in config.__dataclass_fields__ if name not in ("size", "seed")]
        raise ValueError(
            f"reasoning-gym task {task!r} refused size={size}, {options}: {error}. Options: {known}"
        ) from error


def _to_json(value: Any) -> str:
    try:
        return json.dumps(_tag(value))
    except TypeError as error:
        raise ValueError(f"only plain values can be stored in the dataset: {error}") from error


def _tag(value: Any) -> Any:
    """Mark what JSON would change, since some verifiers compare tuples: tuples, and dicts whose keys are not texts."""
    if isinstance(value, tuple):
        return {TUPLE_TAG: [_tag(item) for item in value]}
    if isinstance(value, list):
        return [_tag(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _tag(item) for key, item in value.items()}
        return {PAIRS_TAG: [[_tag(key), _tag(item)] for key, item in value.items()]}
    return value


def _untag(value: dict) -> Any:
    if value.keys() == {TUPLE_TAG}:
        return tuple(value[TUPLE_TAG])
    if value.keys() == {PAIRS_TAG}:
        return dict(value[PAIRS_TAG])
    return value
