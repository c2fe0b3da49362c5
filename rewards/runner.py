"""Calls reward functions on a batch of completions, checks what they return, and says precisely what went wrong."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .calls import CallLog, CallOutcome, Problem, RewardBatch, RewardFunction, read_result, shorten, unique_names
from .event_loop import EventLoopThread
from .pool import PoolLimits
from .pooled import PooledFunctions

logger = logging.getLogger(__name__)


class RewardError(RuntimeError):
    """A reward function failed. `function`, `step` and `sample` (None: the whole batch) say where, `__cause__` why."""

    def __init__(self, message: str, function: str, step: int, sample: int | None = None):
        super().__init__(message)
        self.function, self.step, self.sample = function, step, sample


@dataclass(frozen=True)
class RewardFailure:
    """One sample (or, `sample` None, one whole call) that a function failed on while `on_error` is "none".

    Or a sample that a worker was lost on, whatever `on_error` is: its `kind` is "timeout", "memory" or "died".
    """

    function: str
    sample: int | None
    reason: str
    kind: str = "error"


@dataclass
class RewardScores:
    """The scores of a batch of n completions.

    Attributes:
        values: float32 (n, functions), on the CPU; NaN where a function returned None or failed.
        extra: columns from `log_extra`, n values each (None where a function failed on the sample). A column that two
            functions log is kept twice, the later one as "function/column".
        metrics: from `log_metric`, the mean of all values logged under a name.
        seconds: wall-clock seconds by function, a second attempt after an exception included.
        failures: what failed; unless `on_error` is "none", only samples that a worker was lost on.
    """

    values: torch.Tensor
    extra: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: list[RewardFailure] = field(default_factory=list)


class RewardRunner:
    """Runs reward functions: sync ones one after the other, then all async ones concurrently in this process.

    With `workers`, sync functions run in worker processes where they can (see `PooledFunctions`). A sample on which a
    worker hangs, dies or takes too much memory, twice, is scored NaN with a `RewardFailure`, whatever `on_error` is.

    A function that raises on the batch is called again with one sample at a time to find the culprit, so reward
    functions should be free of side effects. `KeyboardInterrupt` and `SystemExit` pass through.

    Args:
        reward_funcs: callables by TRL's contract (see `calls`); at least one.
        weights: one finite number per function; 1.0 each by default. Only kept here: aggregation is the trainer's.
        on_error: "stop" raises `RewardError`; "none" gives the failing samples NaN, records a `RewardFailure` and
            logs a warning. A whole-batch failure (such as a wrong length) makes all samples NaN for that function.
        workers: limits of the worker processes; None runs everything in this process, without limits.
        failure_share: the run stops when a function in workers fails on more than this share of a batch, from 0 to 1.

    Raises:
        ValueError, TypeError: no functions, weights that do not fit them, or something that is not a reward function.
    """

    def __init__(
        self,
        reward_funcs: Sequence[Callable],
        weights: Sequence[float] | None = None,
        on_error: Literal["stop", "none"] = "stop",
        workers: PoolLimits | None = None,
        failure_share: float = 0.5,
    ):
        if not reward_funcs:
            raise ValueError("no reward functions given: `reward_funcs` needs at least one")
        if on_error not in ("stop", "none"):
            raise ValueError(f'on_error must be "stop" or "none", got {on_error!r}')
        self.names = unique_names(reward_funcs)
        self.weights = [1.0] * len(reward_funcs) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(reward_funcs):
            raise ValueError(
                f"{len(self.weights)} reward weights for {len(reward_funcs)} reward functions {self.names}"
            )
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"reward weights must be finite numbers, got {self.weights}")
        self.on_error = on_error
        self._functions = [RewardFunction(func, name) for func, name in zip(reward_funcs, self.names, strict=True)]
        if not 0 <= failure_share <= 1:
            raise ValueError(f"failure_share={failure_share!r} must be a share of the samples, from 0 to 1")
        self._failure_share = failure_share
        self._pooled = PooledFunctions(self._functions, workers) if workers is not None else None
        self._loop: EventLoopThread | None = None
        self._warned_all_none = False

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise `ValueError` if a function requires a parameter that a dataset with these columns does not supply."""
        columns = set(columns)
        messages = [message for function in self._functions if (message := function.missing(columns))]
        if messages:
            raise ValueError("\n".join(messages))

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any],
        columns: dict[str, list],
        trainer_state: Any = None,
        step: int = 0,
    ) -> RewardScores:
        """Score n completions.

        Args:
            prompts, completions: n texts, or n lists of chat messages.
            completion_ids: n lists of token ids.
            columns: the dataset's other columns, n values each ("prompt", "completion", "completion_ids" are left out).
            trainer_state: passed on to the functions.
            step: the training step, for messages.

        Raises:
            ValueError: lists of different lengths, a column with a reserved name, a parameter that nothing supplies.
            RewardError: a function failed and `on_error` is "stop".
        """
        batch = RewardBatch(prompts, completions, completion_ids, columns, trainer_state)
        self.check_columns(columns)
        scores = RewardScores(torch.full((len(batch), len(self._functions)), math.nan, dtype=torch.float32))
        if len(batch) == 0:
            return scores
        outcomes: dict[str, CallOutcome] = {}
        for function in (function for function in self._functions if not function.is_async):
            if self._pooled is not None and function.name in self._pooled:
                first = self._pooled.call(function, batch)
                self._check_share(function.name, first, batch, step)
            else:
                first = self._run_calls([(function, batch)])[0]
            outcomes[function.name] = self._settle(function, batch, first, step)
        concurrent = [function for function in self._functions if function.is_async]
        for function, first in zip(concurrent, self._run_calls([(f, batch) for f in concurrent]), strict=True):
            outcomes[function.name] = self._settle(function, batch, first, step)
        self._collect(scores, [outcomes[name] for name in self.names])
        self._warn(scores, batch, step)
        return scores

    def close(self) -> None:
        """End the worker processes and the thread of the async functions. Scoring again starts new ones."""
        if self._pooled is not None:
            self._pooled.close()
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _run_calls(self, calls: list[tuple[RewardFunction, RewardBatch]]) -> list[CallOutcome]:
        """The outcome of each call, in order; every call in this process goes through here."""
        outcomes = {index: _call(*call) for index, call in enumerate(calls) if not call[0].is_async}
        waiting = {index: call for index, call in enumerate(calls) if call[0].is_async}
        if waiting:
            if self._loop is None:
                self._loop = EventLoopThread("colora-rewards")
            outcomes |= zip(waiting, self._loop.run(_call_all_async(list(waiting.values()))), strict=True)
        for outcome in outcomes.values():
            if isinstance(outcome.raised, KeyboardInterrupt | SystemExit):
                raise outcome.raised
        return [outcomes[index] for index in range(len(calls))]

    def _settle(self, function: RewardFunction, batch: RewardBatch, first: CallOutcome, step: int) -> CallOutcome:
        """The final outcome of a function on a batch, after looking for the culprit if it raised."""
        outcome = first if first.raised is None else self._find_culprits(function, batch, first, step)
        problem = next((problem for problem in outcome.problems if problem.kind == "error"), None)
        if problem is not None and self.on_error == "stop":
            message = _describe(function.name, step, problem, batch)
            raise RewardError(message, function.name, step, problem.sample) from problem.cause
        return outcome

    def _check_share(self, name: str, outcome: CallOutcome, batch: RewardBatch, step: int) -> None:
        failed = {problem.sample for problem in outcome.problems}
        if len(failed) <= self._failure_share * len(batch):
            return
        problem = outcome.problems[0]
        message = (
            f"{_describe(name, step, problem, batch)}\n  It failed on {len(failed)} of {len(batch)} samples, more than "
            f"the share of {self._failure_share:g} that may fail (reward_failure_share)."
        )
        raise RewardError(message, name, step, problem.sample) from problem.cause

    def _find_culprits(
        self, function: RewardFunction, batch: RewardBatch, first: CallOutcome, step: int
    ) -> CallOutcome:
        """Call again sample by sample, up to the first failure if that stops the run, and put the parts together."""
        assert first.raised is not None
        merged = CallOutcome([None] * len(batch), seconds=first.seconds)
        if len(batch) == 1:
            merged.problems.append(_raised_problem(first.raised, 0))
            return merged
        singles = [(function, batch.sample(index)) for index in range(len(batch))]
        if self.on_error == "none":
            parts = self._run_calls(singles)
            merged.seconds += (
                max(part.seconds for part in parts) if function.is_async else sum(p.seconds for p in parts)
            )
        else:
            parts = []
            for single in singles:
                parts += self._run_calls([single])
                if parts[-1].raised is not None or parts[-1].problems:
                    break
        for index, part in enumerate(parts):
            merged.values[index] = part.values[0]
            if part.raised is not None:
                merged.problems.append(_raised_problem(part.raised, index))
            merged.problems += [Problem(p.reason, p.remedy, index, p.cause) for p in part.problems]
            for column, values in part.extra.items():
                merged.extra.setdefault(column, [None] * len(batch))[index] = values[0]
            for name, numbers in part.metrics.items():
                merged.metrics.setdefault(name, []).extend(numbers)
        if not merged.problems:
            merged.problems.append(_raised_problem(first.raised, None))
        return merged

    def _collect(self, scores: RewardScores, outcomes: list[CallOutcome]) -> None:
        """Put the functions' outcomes, in the order of `names`, into `scores`."""
        metrics: dict[str, list[float]] = {}
        for column, (name, outcome) in enumerate(zip(self.names, outcomes, strict=True)):
            rewards = [math.nan if value is None else value for value in outcome.values]
            scores.values[:, column] = torch.tensor(rewards, dtype=torch.float32)
            scores.seconds[name] = outcome.seconds
            scores.failures += [RewardFailure(name, p.sample, p.reason, p.kind) for p in outcome.problems]
            for key, values in outcome.extra.items():
                scores.extra[f"{name}/{key}" if key in scores.extra else key] = values
            for key, numbers in outcome.metrics.items():
                metrics.setdefault(key, []).extend(numbers)
        scores.metrics = {key: sum(numbers) / len(numbers) for key, numbers in metrics.items()}

    def _warn(self, scores: RewardScores, batch: RewardBatch, step: int) -> None:
        for name in self.names:
            failures = [failure for failure in scores.failures if failure.function == name]
            if failures:
                logger.warning(
                    "reward function %r: %d failure(s) on %d completions at step %d, scored as None; the first one: %s",
                    *(name, len(failures), len(batch), step, failures[0].reason),
                )
        unscored = scores.values.isnan().all(dim=1).nonzero().flatten().tolist()
        if unscored and not self._warned_all_none:
            self._warned_all_none = True  # a task may skip rows on purpose: say it once, not every step
            row = batch.sample(unscored[0])
            logger.warning(
                "all reward functions returned None for %d of %d completions at step %d, the first is sample %d "
                "(prompt: %s, completion: %s, columns: %s); such samples carry no signal. This is said once.",
                *(len(unscored), len(batch), step, unscored[0], shorten(row.prompts[0]), shorten(row.completions[0])),
                shorten({name: values[0] for name, values in row.columns.items()}),
            )


def _call(function: RewardFunction, batch: RewardBatch) -> CallOutcome:
    log, start = CallLog(), time.perf_counter()
    try:
        returned = function.func(**function.select(batch.arguments(log)))
    except Exception as error:  # whatever a user's function raises is reported by name and sample, with the cause
        return CallOutcome([None] * len(batch), seconds=time.perf_counter() - start, raised=error)
    outcome = read_result(returned, log, len(batch))
    outcome.seconds = time.perf_counter() - start
    return outcome


async def _call_async(function: RewardFunction, batch: RewardBatch) -> CallOutcome:
    log, start = CallLog(), time.perf_counter()
    try:
        returned = await function.func(**function.select(batch.arguments(log)))
    except (Exception, asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
        # A SystemExit let through here would end the loop's thread: the caller's thread raises it instead.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return CallOutcome([None] * len(batch), seconds=time.perf_counter() - start, raised=error)
    outcome = read_result(returned, log, len(batch))
    outcome.seconds = time.perf_counter() - start
    return outcome


async def _call_all_async(calls: list[tuple[RewardFunction, RewardBatch]]) -> list[CallOutcome]:
    return await asyncio.gather(*(_call_async(function, batch) for function, batch in calls))


def _raised_problem(error: BaseException, sample: int | None) -> Problem:
    reason = f"it raised {type(error).__name__}: {error}"
    if sample is None:
        reason += " (on the whole batch; called with one sample at a time it does not)"
    remedy = "Make the function handle this input, or return None to skip a sample"
    return Problem(reason, f'{remedy}; on_error="none" does so for every sample that fails.', sample, error)


def _describe(name: str, step: int, problem: Problem, batch: RewardBatch) -> str:
    where = "" if problem.sample is None else f", sample {problem.sample}"
    lines = [f"Reward function {name!r} failed at step {step}{where}: {problem.reason}."]
    if problem.sample is not None:
        lines.append(f"  prompt: {shorten(batch.prompts[problem.sample])}")
        lines.append(f"  completion: {shorten(batch.completions[problem.sample])}")
    return "\n".join([*lines, f"  Remedy: {problem.remedy}"])
