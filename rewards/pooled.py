"""Reward functions in worker processes: which can go there, what travels, and what is tried again."""

import io
import logging
import pickle
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .calls import (
    ENVIRONMENTS,
    REMEDIES,
    CallLog,
    CallOutcome,
    Problem,
    RewardBatch,
    RewardFunction,
    raised_reason,
    read_result,
)
from .loading import FILE_MODULE_PREFIX
from .pool import POLL_SECONDS, PoolLimits, WorkerPool
from .worker import Answer, FunctionReference, StateView, pack_call

logger = logging.getLogger(__name__)
# What goes first. A sample that is likely to hang again goes before others: what takes longest must not start last.
FIRST_CALL, AFTER_TIMEOUT, AFTER_FAILURE = range(3)


class PooledFunctions:
    """Calls those reward functions in worker processes that can be pickled by reference.

    A call gets a few samples, the completions of one prompt (where they are consecutive) together, so a function sees
    its groups whole but not the whole batch. The samples of a call that fails or loses its worker are tried once more,
    each by itself. What stays in process: async functions, those that name `environments` (others do not get them),
    those with a true attribute `in_process`, those that hold a torch model or tensor, and what cannot be found by a
    module's name (lambdas, closures, functions of the script).
    """

    def __init__(self, functions: list[RewardFunction], limits: PoolLimits):
        self._numbers: dict[str, int] = {}
        self._references: dict[int, FunctionReference] = {}
        movable = [function for function in functions if not function.is_async and not function.requires(ENVIRONMENTS)]
        for number, function in enumerate(movable):
            try:
                self._references[number] = _reference(function)
                self._numbers[function.name] = number
            except (pickle.PicklingError, AttributeError, TypeError) as reason:
                logger.warning("reward function %r runs in this process, without limits: %s", function.name, reason)
        self.pool = WorkerPool(limits, self._references)

    def __contains__(self, name: str) -> bool:
        return name in self._numbers

    def start(self, function: RewardFunction, batch: RewardBatch) -> "PooledScoring":
        """Begin to score a batch, of which `ready` then says what has come in."""
        number = self._numbers[function.name]
        return PooledScoring(self.pool, function, number, self._references[number], batch)


class PooledScoring:
    """A function's scoring of a batch in workers, which goes on whenever the pool is polled (see `FunctionScoring`)."""

    in_this_thread = False

    def __init__(
        self, pool: WorkerPool, function: RewardFunction, number: int, reference: FunctionReference, batch: RewardBatch
    ):
        self.seconds = 0.0
        self._pool, self._function, self._batch = pool, function, batch
        self._number, self._reference = number, reference
        self._state = _plain_state(batch.trainer_state)
        self._waiting = 0
        self._first: dict[range, Answer] = {}
        self._second: dict[range, Answer] = {}

    def ready(self, chunk: range) -> None:
        """The batch holds the samples of this chunk now."""
        self._send(chunk, FIRST_CALL, self._take_first)

    def finish(self) -> CallOutcome:
        """The outcome on the whole batch, samples that were tried again included; waits for it."""
        while self._waiting:
            if not self._pool.unfinished:
                raise RuntimeError("the reward workers were closed while a batch was being scored: score it again")
            self._pool.poll(POLL_SECONDS)
        outcome = CallOutcome([None] * len(self._batch))
        for chunk, answer in sorted(self._first.items(), key=lambda item: item[0].start):
            self._put(outcome, chunk, answer)
        for single, answer in sorted(self._second.items(), key=lambda item: item[0].start):
            self._put(outcome, single, answer)
            if answer.raised is not None:
                outcome.problems.append(_problem(answer, single.start))
        outcome.problems.sort(key=lambda problem: problem.sample or 0)
        return outcome

    def cancel(self) -> None:
        """Kill the workers: some may be busy with this."""
        if self._waiting:
            self._pool.close()

    def _send(self, chunk: range, rank: int, take: Callable[[range, Answer], None]) -> None:
        self._waiting += 1
        try:
            message = self._pack(chunk)
        except Exception as error:  # any __reduce__ in a dataset's column may raise anything
            take(chunk, Answer(raised=TypeError(f"its arguments cannot be sent to a worker process: {error}")))
        else:
            self._pool.submit(message, partial(take, chunk), rank)

    def _pack(self, chunk: range) -> bytes:
        arguments = self._function.select(self._batch.part(chunk).arguments(CallLog()))
        arguments.pop(ENVIRONMENTS, None)
        logs = [name for name in ("log_extra", "log_metric") if arguments.pop(name, None) is not None]
        if "trainer_state" in arguments:
            arguments["trainer_state"] = self._state
        return pack_call(self._number, self._reference, logs, arguments)

    def _take_first(self, chunk: range, answer: Answer) -> None:
        self._first[chunk] = answer
        self._count(answer)
        if answer.raised is not None:
            rank = AFTER_TIMEOUT if answer.lost == "timeout" else AFTER_FAILURE
            for index in chunk:
                self._send(range(index, index + 1), rank, self._take_second)

    def _take_second(self, single: range, answer: Answer) -> None:
        self._second[single] = answer
        self._count(answer)

    def _count(self, answer: Answer) -> None:
        self._waiting -= 1
        self.seconds += answer.seconds

    def _put(self, outcome: CallOutcome, chunk: range, answer: Answer) -> None:
        if answer.raised is None:
            outcome.put(chunk, read_result(answer.returned, CallLog(answer.extra, answer.metrics), len(chunk)))
        outcome.seconds += answer.seconds


class _ByReference(pickle.Pickler):
    """Refuses what a worker should not hold a copy of, or could not find; `files` are what it has to load first."""

    def __init__(self, buffer: io.BytesIO):
        super().__init__(buffer)
        self.files: dict[str, None] = {}  # in order, each once

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.nn.Module | torch.Tensor):
            raise pickle.PicklingError(f"it holds a {type(obj).__name__}")
        module = getattr(obj, "__module__", None)
        if module == "__main__":
            raise pickle.PicklingError("it is defined in the main script: move it to a file of its own")
        if isinstance(module, str) and module.startswith(FILE_MODULE_PREFIX):
            self.files[str(sys.modules[module].__file__)] = None
        return NotImplemented


def _reference(function: RewardFunction) -> FunctionReference:
    if function.takes_all:
        raise pickle.PicklingError("it asks for it by `in_process`")
    buffer = io.BytesIO()
    pickler = _ByReference(buffer)
    pickler.dump(function.func)
    return FunctionReference(buffer.getvalue(), tuple(pickler.files))


def _problem(answer: Answer, sample: int) -> Problem:
    error = answer.raised
    if answer.lost is not None:
        return Problem(str(error), REMEDIES[answer.lost], sample, error, answer.lost)
    reason = raised_reason(error)
    if isinstance(error, MemoryError):
        return Problem(reason, REMEDIES["memory"], sample, error, "memory")
    return Problem(reason, "Make the function handle this input, or return None to skip a sample.", sample, error)


def _plain_state(state: Any) -> StateView | None:
    """The numbers, texts and switches of a trainer state; not its histories, which grow, nor what cannot travel."""
    if state is None:
        return None
    values = getattr(state, "__dict__", {})
    return StateView({key: value for key, value in values.items() if isinstance(value, int | float | str | None)})
