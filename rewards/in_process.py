"""Reward functions called in this process: sync ones on the main thread, async ones side by side on a thread's loop."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future

from .calls import REMEDIES, CallLog, CallOutcome, Problem, RewardBatch, RewardFunction, raised_reason, read_result
from .event_loop import EventLoopThread, wait_for


class InProcessFunctions:
    """Calls reward functions in this process, without limits on time and memory.

    A call that raised is made again with one sample at a time to find the culprit.

    Args:
        stop_at_error: look no further than the first sample that fails.
        concurrency: calls of async functions that are under way at once, at least 1.
        timeout: seconds that a call of an async function may wait for something; what it was to score is not scored
            then. None: no limit. One that computes instead of awaiting cannot be ended.
    """

    def __init__(self, stop_at_error: bool, concurrency: int, timeout: float | None):
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency} must be at least 1 call of async reward functions at a time")
        self.stop_at_error, self._timeout = stop_at_error, timeout
        self._slots = asyncio.Semaphore(concurrency)
        self._concurrency = concurrency
        self._loop: EventLoopThread | None = None

    def start(self, function: RewardFunction, batch: RewardBatch) -> "WholeScoring | AsyncScoring":
        """Begin to score a batch: async functions as samples come in, the others when all have.

        A sync function would keep the engine waiting, and one that asks for it (`in_process`) gets the whole batch.
        """
        as_they_come = function.is_async and not function.takes_all
        return AsyncScoring(self, function, batch) if as_they_come else WholeScoring(self, function, batch)

    def submit(self, function: RewardFunction, batch: RewardBatch) -> "Future[CallOutcome]":
        """Start a call of an async function."""
        if self._loop is None:
            self._loop = EventLoopThread("colora-rewards")
        return self._loop.submit(_call_async(function, batch, self._slots, self._timeout))

    def run(self, calls: Sequence[tuple[RewardFunction, RewardBatch]]) -> list[CallOutcome]:
        """The outcome of each call, in order; async ones concurrently. Interrupted, these are cancelled."""
        waiting = {index: self.submit(*call) for index, call in enumerate(calls) if call[0].is_async}
        try:
            return [wait_for(waiting[index]) if index in waiting else _call(*call) for index, call in enumerate(calls)]
        except BaseException:
            for future in waiting.values():
                future.cancel()
            raise

    def settle(self, function: RewardFunction, batch: RewardBatch, first: CallOutcome) -> CallOutcome:
        """The final outcome of a call, after looking for the culprit if it raised."""
        if isinstance(first.raised, KeyboardInterrupt | SystemExit):
            raise first.raised
        if first.raised is None:
            return first
        merged = CallOutcome([None] * len(batch), seconds=first.seconds)
        if len(batch) == 1:
            merged.problems.append(_problem(first.raised, 0))
            return merged
        # Together where all are wanted; else one after the other, so that no more than needed are called.
        size = 1 if self.stop_at_error else len(batch)
        for start in range(0, len(batch), size):
            indices = range(start, min(start + size, len(batch)))
            parts = self.run([(function, batch.sample(index)) for index in indices])
            for index, part in zip(indices, parts, strict=True):
                if isinstance(part.raised, KeyboardInterrupt | SystemExit):
                    raise part.raised
                merged.put(range(index, index + 1), part)
                if part.raised is not None:
                    merged.problems.append(_problem(part.raised, index))
            if self.stop_at_error and _has_error(merged):
                break
        if not merged.problems:
            merged.problems.append(_problem(first.raised, None))
        return merged

    def close(self) -> None:
        """End the loop's thread, and with it the calls that are under way. Starting again starts a new one."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None
            self._slots = asyncio.Semaphore(self._concurrency)  # the other belongs to the old loop


class WholeScoring:
    """A function's scoring of a batch in one call, made at the end (see `FunctionScoring`)."""

    in_this_thread = True

    def __init__(self, calls: InProcessFunctions, function: RewardFunction, batch: RewardBatch):
        self.seconds = 0.0
        self._calls, self._function, self._batch = calls, function, batch

    def ready(self, chunk: range) -> None:
        """It waits for the rest."""

    def finish(self) -> CallOutcome:
        """Call the function."""
        (first,) = self._calls.run([(self._function, self._batch)])
        return self._calls.settle(self._function, self._batch, first)

    def cancel(self) -> None:
        """Nothing is under way."""


class AsyncScoring:
    """An async function's scoring of a batch, some samples a call (see `FunctionScoring`)."""

    in_this_thread = False

    def __init__(self, calls: InProcessFunctions, function: RewardFunction, batch: RewardBatch):
        self._calls, self._function, self._batch = calls, function, batch
        self._futures: dict[range, Future[CallOutcome]] = {}

    @property
    def seconds(self) -> float:
        """Of the calls that are over, added up."""
        return sum(future.result().seconds for future in self._futures.values() if future.done())

    def ready(self, chunk: range) -> None:
        """Start the call of a chunk."""
        self._futures[chunk] = self._calls.submit(self._function, self._batch.part(chunk))

    def finish(self) -> CallOutcome:
        """Wait for all calls; the outcome on the whole batch."""
        outcome = CallOutcome([None] * len(self._batch))
        for chunk in sorted(self._futures, key=lambda chunk: chunk.start):
            first = wait_for(self._futures[chunk])
            outcome.put(chunk, self._calls.settle(self._function, self._batch.part(chunk), first))
            if self._calls.stop_at_error and _has_error(outcome):
                break
        return outcome

    def cancel(self) -> None:
        """End the calls that are under way."""
        for future in self._futures.values():
            future.cancel()


def _call(function: RewardFunction, batch: RewardBatch) -> CallOutcome:
    log, start = CallLog(), time.perf_counter()
    try:
        returned = function.func(**function.select(batch.arguments(log)))
    except Exception as error:  # whatever a user's function raises is reported by name and sample, with the cause
        return CallOutcome([None] * len(batch), seconds=time.perf_counter() - start, raised=error)
    outcome = read_result(returned, log, len(batch))
    outcome.seconds = time.perf_counter() - start
    return outcome


async def _call_async(
    function: RewardFunction, batch: RewardBatch, slots: asyncio.Semaphore, timeout: float | None
) -> CallOutcome:
    async with slots:
        log, start, limit = CallLog(), time.perf_counter(), asyncio.timeout(timeout)
        outcome = CallOutcome([None] * len(batch))
        try:
            async with limit:
                returned = await function.func(**function.select(batch.arguments(log)))
            outcome = read_result(returned, log, len(batch))
        except (Exception, asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
            # A SystemExit let through here would end the loop's thread: the caller's thread raises it instead.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            if limit.expired() and isinstance(error, TimeoutError):
                reason, remedy = f"it did not return within {timeout:g} s", REMEDIES["timeout"]
                outcome.problems += [Problem(reason, remedy, index, None, "timeout") for index in range(len(batch))]
            else:
                outcome.raised = error
        outcome.seconds = time.perf_counter() - start
        return outcome


def _has_error(outcome: CallOutcome) -> bool:
    """Whether something went wrong that is not a limit, which costs only the sample."""
    return any(problem.kind == "error" for problem in outcome.problems)


def _problem(error: BaseException, sample: int | None) -> Problem:
    reason = raised_reason(error)
    if sample is None:
        reason += " (on the whole batch; called with one sample at a time it does not)"
    remedy = "Make the function handle this input, or return None to skip a sample"
    return Problem(reason, f"{remedy}; `reward_errors: none` does so for every sample that fails.", sample, error)
