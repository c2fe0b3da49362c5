"""The scoring of one batch whose completions come in one by one, which goes on while others are generated."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .calls import CallOutcome, Problem, RewardBatch, cut, shorten


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
        seconds: wall-clock seconds by function, of all its calls added up, second attempts included; calls run side by
            side in workers, and so do those of async functions.
        failures: what failed; unless `on_error` is "none", only samples that a worker was lost on.
        hidden_seconds: of `seconds`, of all functions, what was over when the last completion had come.
    """

    values: torch.Tensor
    extra: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: list[RewardFailure] = field(default_factory=list)
    hidden_seconds: float = 0.0


def none_if_nan(value: float) -> float | None:
    """A reward as records and tables hold it: None where there is none."""
    return None if math.isnan(value) else value


class FunctionScoring(Protocol):
    """How one function scores a batch that is filled bit by bit."""

    in_this_thread: bool  # called by `finish` itself

    @property
    def seconds(self) -> float:
        """Of the calls that are over, added up."""
        ...

    def ready(self, chunk: range) -> None:
        """The batch holds these samples now, all completions of one or more prompts."""
        ...

    def finish(self) -> CallOutcome:
        """Wait for the outcome on the whole batch. Called when all of it was `ready`."""
        ...

    def cancel(self) -> None:
        """Let go of what is under way."""
        ...


@dataclass(frozen=True)
class FailureRules:
    """What a failing function does to the run: see `RewardRunner`."""

    stop_at_error: bool
    failure_share: float

    def check(self, name: str, outcome: CallOutcome, batch: RewardBatch, step: int) -> None:
        """Raise `RewardError` where the outcome of the function `name` stops the run."""
        if not outcome.problems:
            return
        error = next((problem for problem in outcome.problems if problem.kind == "error"), None)
        if error is not None and self.stop_at_error:
            raise RewardError(_describe(name, step, error, batch), name, step, error.sample) from error.cause
        failed = {problem.sample for problem in outcome.problems}
        count = len(batch) if None in failed else len(failed)
        if count > self.failure_share * len(batch):
            problem = outcome.problems[0]
            message = (
                f"{_describe(name, step, problem, batch)}\n  It failed on {count} of {len(batch)} samples, more than "
                f"the share of {self.failure_share:g} that may fail (reward_failure_share)."
            )
            raise RewardError(message, name, step, problem.sample) from problem.cause


class Scoring:
    """A batch whose completions are added in any order; functions are called as soon as a prompt has all of its own.

    `finish` gives what scoring the whole at once would. What goes wrong in a function is raised by `finish` alone, so
    that whoever generates is not interrupted in between. It has to be finished or cancelled.

    Args:
        functions: by name, how each scores the batch.
        batch: its prompts and columns; the completions, lists as long, are filled in.
        step: the training step, for messages.
        rules: which failures stop the run.
        poll: gives the workers something to do.
        warn: gets the scores before they are returned.
    """

    def __init__(
        self,
        functions: Mapping[str, FunctionScoring],
        batch: RewardBatch,
        step: int,
        rules: FailureRules,
        poll: Callable[[], None],
        warn: Callable[[RewardScores, RewardBatch, int], None],
    ):
        self._functions, self._batch, self._step = functions, batch, step
        self._rules, self._warn, self.poll = rules, warn, poll
        self._chunk_of = {index: chunk for chunk in cut(batch.prompts) for index in chunk}
        self._missing = {chunk: set(chunk) for chunk in self._chunk_of.values()}

    def add(
        self,
        index: int,
        completion: Any,
        completion_ids: Sequence[int],
        prompt: Any = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        """A completion (text or messages) and its token ids, for place `index` of the batch.

        Args:
            prompt: instead of the one it was started with, where it has become another.
            columns: values of columns that are known only now.

        Raises:
            ValueError: there is one in that place already.
        """
        chunk = self._chunk_of[index]
        if index not in self._missing[chunk]:
            raise ValueError(f"completion {index} of the batch was added twice")
        self._batch.put(index, completion, completion_ids, prompt, columns or {})
        self._missing[chunk].remove(index)
        if not self._missing[chunk]:
            for function in self._functions.values():
                function.ready(chunk)
            self.poll()

    def finish(self) -> RewardScores:
        """Wait for the scores of all completions.

        Raises:
            RewardError: a function failed so that the run has to stop.
            RuntimeError: completions are missing, or workers cannot be started.
        """
        missing = sum(map(len, self._missing.values()))
        if missing:
            raise RuntimeError(f"{missing} of {len(self._batch)} completions were not added: there is nothing to score")
        scores = RewardScores(torch.full((len(self._batch), len(self._functions)), math.nan, dtype=torch.float32))
        if not len(self._batch):
            return scores
        scores.hidden_seconds = sum(function.seconds for function in self._functions.values())
        outcomes: dict[str, CallOutcome] = {}
        try:
            # First those that this thread calls itself: the others go on meanwhile.
            for name, function in sorted(self._functions.items(), key=lambda item: not item[1].in_this_thread):
                self.poll()
                outcomes[name] = function.finish()
                self._rules.check(name, outcomes[name], self._batch, self._step)
        except BaseException:
            self.cancel()
            raise
        _collect(scores, {name: outcomes[name] for name in self._functions})
        self._warn(scores, self._batch, self._step)
        return scores

    def cancel(self) -> None:
        """Let go of what is under way; nothing more can be added."""
        for function in self._functions.values():
            function.cancel()


def _collect(scores: RewardScores, outcomes: Mapping[str, CallOutcome]) -> None:
    """Put the functions' outcomes into `scores`."""
    metrics: dict[str, list[float]] = {}
    for column, (name, outcome) in enumerate(outcomes.items()):
        rewards = [math.nan if value is None else value for value in outcome.values]
        scores.values[:, column] = torch.tensor(rewards, dtype=torch.float32)
        scores.seconds[name] = outcome.seconds
        scores.failures += [RewardFailure(name, p.sample, p.reason, p.kind) for p in outcome.problems]
        for key, values in outcome.extra.items():
            scores.extra[f"{name}/{key}" if key in scores.extra else key] = values
        for key, numbers in outcome.metrics.items():
            metrics.setdefault(key, []).extend(numbers)
    scores.metrics = {key: sum(numbers) / len(numbers) for key, numbers in metrics.items()}


def _describe(name: str, step: int, problem: Problem, batch: RewardBatch) -> str:
    where = "" if problem.sample is None else f", sample {problem.sample}"
    lines = [f"Reward function {name!r} failed at step {step}{where}: {problem.reason}."]
    if problem.sample is not None:
        lines.append(f"  prompt: {shorten(batch.prompts[problem.sample])}")
        lines.append(f"  completion: {shorten(batch.completions[problem.sample])}")
    return "\n".join([*lines, f"  Remedy: {problem.remedy}"])
