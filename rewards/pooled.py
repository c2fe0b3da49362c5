"""Reward functions in worker processes: which can go there, how a batch is cut into calls, and what is tried again."""

import functools
import io
import logging
import pickle
import sys
from collections.abc import Callable
from typing import Any

import torch

from .calls import CallLog, CallOutcome, Problem, RewardBatch, RewardFunction, read_result
from .loading import FILE_MODULE_PREFIX
from .pool import PoolLimits, WorkerPool
from .worker import Answer, FunctionReference, StateView, pack_call

logger = logging.getLogger(__name__)
CHUNK = 4  # samples a call, more to keep a prompt's completions together: few enough to lose little with a bad one
REMEDIES = {
    "timeout": "Make the function faster, or raise the time limit.",
    "memory": "Make the function use less, or raise the memory limit.",
    "died": "See what the function runs that ends its process.",
}


class PooledFunctions:
    """Calls those reward functions in worker processes that can be pickled by reference.

    A batch is cut into calls of a few samples, the completions of one prompt (where they are consecutive) together, so
    a function sees its groups whole but not the whole batch. The samples of a call that fails or loses its worker are
    tried once more, each by itself. What stays in process: async functions, those with a true attribute `in_process`,
    those that hold a torch model or tensor, and what cannot be found by a module's name (lambdas, closures, functions
    of the main script).
    """

    def __init__(self, functions: list[RewardFunction], limits: PoolLimits):
        self._references: dict[str, tuple[int, FunctionReference]] = {}
        for number, function in enumerate(function for function in functions if not function.is_async):
            try:
                self._references[function.name] = number, _reference(function.func)
            except (pickle.PicklingError, AttributeError, TypeError) as reason:
                logger.warning("reward function %r runs in this process, without limits: %s", function.name, reason)
        self._pool = WorkerPool(limits)

    def __contains__(self, name: str) -> bool:
        return name in self._references

    def call(self, function: RewardFunction, batch: RewardBatch) -> CallOutcome:
        """The outcome of a function on a batch, samples that were tried again included."""
        outcome = CallOutcome([None] * len(batch))
        chunks = _chunks(batch)
        first_calls = len(chunks)

        def one_by_one(task: int) -> list[bytes]:
            if task >= first_calls:
                return []
            singles = [range(index, index + 1) for index in chunks[task]]
            chunks.extend(singles)
            return self._pack(function, batch, singles)

        answers = self._pool.run(self._pack(function, batch, chunks), one_by_one)
        for task, (chunk, answer) in enumerate(zip(chunks, answers, strict=True)):
            outcome.seconds += answer.seconds
            if answer.raised is None:
                _put(outcome, chunk, answer, len(batch))
            elif task >= first_calls:
                outcome.problems.append(_problem(answer, chunk[0]))
        outcome.problems.sort(key=lambda problem: problem.sample or 0)
        return outcome

    def close(self) -> None:
        """End the worker processes. Calling again starts new ones."""
        self._pool.close()

    def _pack(self, function: RewardFunction, batch: RewardBatch, chunks: list[range]) -> list[bytes]:
        number, reference = self._references[function.name]
        state = _plain_state(batch.trainer_state)
        calls: list[bytes] = []
        for chunk in chunks:
            part = batch.part(chunk)
            arguments = function.select(part.arguments(CallLog()))
            logs = [name for name in ("log_extra", "log_metric") if arguments.pop(name, None) is not None]
            if "trainer_state" in arguments:
                arguments["trainer_state"] = state
            calls.append(pack_call(number, reference, logs, arguments))
        return calls


class _ByReference(pickle.Pickler):
    """Refuses what a worker should not hold a copy of, or could not find."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.nn.Module | torch.Tensor):
            raise pickle.PicklingError(f"it holds a {type(obj).__name__}")
        if getattr(obj, "__module__", None) == "__main__":
            raise pickle.PicklingError("it is defined in the main script: move it to a file of its own")
        return NotImplemented


def _reference(func: Callable) -> FunctionReference:
    inner = func
    while isinstance(inner, functools.partial):
        inner = inner.func
    if getattr(inner, "in_process", False):
        raise pickle.PicklingError("it asks for it by `in_process`")
    buffer = io.BytesIO()
    _ByReference(buffer).dump(func)
    module = inner.__module__ or ""
    file = sys.modules[module].__file__ if module.startswith(FILE_MODULE_PREFIX) else None
    return FunctionReference(buffer.getvalue(), file)


def _chunks(batch: RewardBatch) -> list[range]:
    """Consecutive samples for a call each, cut only where the prompt changes."""
    starts = [0]
    for index in range(1, len(batch)):
        if index - starts[-1] >= CHUNK and batch.prompts[index] != batch.prompts[index - 1]:
            starts.append(index)
    return [range(*ends) for ends in zip(starts, [*starts[1:], len(batch)], strict=True)]


def _put(outcome: CallOutcome, chunk: range, answer: Answer, size: int) -> None:
    """Put what a call returned and logged in the place of its samples."""
    part = read_result(answer.returned, CallLog(answer.extra, answer.metrics), len(chunk))
    for offset, index in enumerate(chunk):
        outcome.values[index] = part.values[offset]
        for column, values in part.extra.items():
            outcome.extra.setdefault(column, [None] * size)[index] = values[offset]
    for name, numbers in part.metrics.items():
        outcome.metrics.setdefault(name, []).extend(numbers)
    for problem in part.problems:
        for index in chunk if problem.sample is None else [chunk[problem.sample]]:
            outcome.problems.append(Problem(problem.reason, problem.remedy, index, problem.cause))


def _problem(answer: Answer, sample: int) -> Problem:
    error = answer.raised
    if answer.lost is not None:
        return Problem(str(error), REMEDIES[answer.lost], sample, error, answer.lost)
    reason = f"it raised {type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        return Problem(reason, REMEDIES["memory"], sample, error, "memory")
    return Problem(reason, "Make the function handle this input, or return None to skip a sample.", sample, error)


def _plain_state(state: Any) -> StateView | None:
    """The numbers, texts and switches of a trainer state; not its histories, which grow, nor what cannot travel."""
    if state is None:
        return None
    values = getattr(state, "__dict__", {})
    return StateView({key: value for key, value in values.items() if isinstance(value, int | float | str | None)})
